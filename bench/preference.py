"""Tokens per second of learning from preferences: DPO, a reward model and KTO, beside TRL's trainers.

    python bench/preference.py --size 1.5b --json bench/results/preference_1.5b.json
    python bench/preference.py --size 1.5b --method dpo --only tandem
    python bench/preference.py --size tiny --device cpu

Method. A random model of Qwen2.5's shape; bfloat16 with float32 masters (TRL: bfloat16 weights) on a GPU, float32 on a
CPU. Every system has a process of its own, one after the other. One pass over --pairs random pairs, --batch of them to
an optimizer step: a prompt and two answers, whose lengths are log-normal as those of chats (prompts: median 150 tokens,
sigma 1, 16 to 2,048; answers: median 200, sigma 0.8, 16 to 1,024; on a CPU a sixteenth of that). KTO sees the same
pairs as labelled answers, two of them for a pair. The reference is the model at the start, and its log-probs are
computed before training, on both sides. A step is forward, backward and optimizer step on all its micro-batches, GPU
done, with what it takes to prepare it. Tokens are those of whole sequences, the prompt with each answer, as TRL's
trainers count them. tok/s is of all steps after --warm ones together; "reference" is that of computing the reference.

...-tandem: packed to --token-budget, prompts shared. ...-trl-N: TRL's trainer with N pairs (KTO: 2 N answers) to a
micro-batch, padded: TRL 1.16 has no packing and no padding-free batches for these. Rows of like length are side by side
in the data, which keeps the padding small; liger-kernel's layers on a GPU where it is installed (--no-trl-liger:
without), FlashAttention 2 where flash-attn is, else torch's attention; no gradient checkpointing. The best that ran is
TRL's. That both saw the same rows and trained on as many tokens is checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Record,
    Row,
    add_trl_options,
    arguments,
    measure,
    peak_gb,
    print_table,
    profiled,
    rate_row,
    require,
    resolve_device,
    resolve_trl_options,
    seconds_of,
    trl_steps,
)
from models import SIZES, byte_tokenizer, random_model, write_folder

from tandem.data.packing import pack, pack_examples
from tandem.data.tokenize import labelled_answers, preference_pair
from tandem.methods.base import Method
from tandem.methods.table import method_class
from tandem.models.loading import load_scalar, prepare_module
from tandem.rollout.known import Known
from tandem.rollout.prepare import Preparation, Prepared
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.homes import seat_of

METHODS = ("dpo", "rm", "kto")
MICRO_BATCHES = (4, 8, 16)
"""Pairs in a micro-batch of TRL's."""
PROMPTS, ANSWERS = (150, 1.0, 16, 2048), (200, 0.8, 16, 1024)
"""Median and sigma of the log-normal lengths, and their bounds, in tokens."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Text = dict[str, str]


def rows_of(options: argparse.Namespace) -> list[Text]:
    """The pairs: the same for every system. A letter is a token, and an answer ends in one more."""
    rng, small = random.Random("pairs"), 1 if options.device.startswith("cuda") else 16

    def text(median: int, sigma: float, shortest: int, longest: int) -> str:
        length = max(shortest, min(int(rng.lognormvariate(0.0, sigma) * median), longest)) // small
        return "".join(rng.choices(LETTERS, k=max(2, length)))

    columns = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ANSWERS}
    return [{name: text(*shape) for name, shape in columns.items()} for _ in range(options.pairs)]


def tokens_of(row: Text) -> int:
    """Of both sequences of a pair."""
    return 2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2


def labelled(rows: list[Text]) -> list[dict[str, Any]]:
    """Each pair as two labelled answers, the chosen ones of some pairs and then the rejected ones."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for row in rows
    ]


def tandem(options: argparse.Namespace, record: Record, *, name: str) -> None:
    """Tandem over the pairs."""
    method, tokenizer = method_class(name)(), byte_tokenizer()
    trainer = trainer_of(options, method, tokenizer)
    rows, steps = rows_of(options), []
    for start in range(0, len(rows), options.batch):
        part = rows[start : start + options.batch]
        steps.append(
            [answer for row in labelled(part) for answer in labelled_answers(row, tokenizer)]
            if name == "kto"
            else [preference_pair(row, tokenizer) for row in part]
        )
    known, actor = Known(None, {}), seat_of(trainer)

    def ask(first: int, last: int) -> None:
        for items in steps[first:last]:
            known.ask(actor, [pack_examples(items), *([pack(aside)] if (aside := method.aside(items, None)) else [])])

    about: Row = {}
    if method.needs():
        # The first step meets whatever is compiled.
        ask(0, 1)
        seconds = seconds_of(partial(ask, 1, len(steps)), options.device)
        about["reference_tokens_per_second"] = sum(map(tokens_of, rows[options.batch :])) / seconds if seconds else None
    prepare = Preparation(method=method, models={"actor": actor, "reference": seat_of(known)})
    counted: list[int] = []

    def step(number: int) -> None:
        prepared: Prepared = prepare(steps[number], {}, number + 1)
        for batch in prepared:
            trainer.forward_backward(batch)
        trainer.optim_step()
        counted.append(prepared.batch.tokens)

    peak_gb(options.device)
    times = [seconds_of(partial(step, number), options.device) for number in range(len(steps))]
    require_equal(sum(counted), rows)
    record.add(rate_row(options, f"{name}-tandem", times, counted) | about)
    with profiled(options.profile, options.device):
        if options.profile:
            step(len(steps) - 1)


def trainer_of(options: argparse.Namespace, method: Method, tokenizer: Any) -> LocalTrainer:
    """Of a policy, or of a model with a new scalar head."""
    dtype: Any = "bfloat16" if options.device.startswith("cuda") else "float32"
    if method.head == "scalar":
        with tempfile.TemporaryDirectory() as folder:
            source = write_folder(options.size, Path(folder), device=options.device)
            model = load_scalar(source, new_head="random", seed=0, dtype=dtype, device=options.device)
    else:
        module = random_model(options.size, options.device)
        model = prepare_module(module, tokenizer, dtype=dtype, device=options.device)
    optim = OptimParams(learning_rate=1e-6, total_steps=100)
    # As the command line does by itself.
    return LocalTrainer(model, method.loss, optim, token_budget=options.token_budget, compile="auto")


def require_equal(tokens: int, rows: list[Text]) -> None:
    """Raises RuntimeError where something else than all rows once was trained on."""
    if tokens != (expected := sum(map(tokens_of, rows))):
        raise RuntimeError(f"{tokens} tokens were trained on instead of {expected}")


def trl(options: argparse.Namespace, record: Record, *, name: str, pairs: int) -> None:
    """TRL's trainer over the same pairs, so many of them to a micro-batch."""
    require("trl")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from trl import DPOTrainer, KTOTrainer, RewardTrainer

    if options.batch % pairs:
        raise ValueError(f"{options.batch} pairs of a step do not divide into micro-batches of {pairs}")
    cls: Any = {"dpo": DPOTrainer, "kto": KTOTrainer, "rm": RewardTrainer}[name]
    reference_seconds: list[float] = []

    class Timed(cls):  # type: ignore[misc]
        """Says how long it computes the reference's log-probs."""

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            reference_seconds.append(time.perf_counter() - start)
            return found

    rows = rows_of(options)
    # Rows of like length together, in an order in which steps are alike; the longest first, so that a lack of memory
    # shows at once.
    ordered = sorted(rows, key=tokens_of, reverse=True)
    parts = [ordered[i : i + pairs] for i in range(0, len(ordered), pairs)]
    random.Random("order").shuffle(others := parts[1:])
    parts = parts[:1] + others
    data = [row for part in parts for row in (labelled(part) if name == "kto" else part)]
    with tempfile.TemporaryDirectory() as folder:
        weights = torch.bfloat16 if options.trl_weights == "bfloat16" else torch.float32
        # In a folder of its own, so that it is read as a user's model is.
        source = write_folder(options.size, Path(folder) / "model", device=options.device, dtype=weights)
        config = trl_config(options, folder, name, pairs)
        columns = {key: [row[key] for row in data] for key in data[0]}
        trainer = Timed(source, args=config, train_dataset=Dataset.from_dict(columns))
        peak_gb(options.device)
        times, tokens = trl_steps(trainer, options.device)
    require_equal(sum(tokens), rows)
    about: Row = {"liger": options.trl_liger, "attention": options.trl_attention, "weights": options.trl_weights}
    if reference_seconds:
        about["reference_tokens_per_second"] = sum(tokens) / sum(reference_seconds)
    record.add(rate_row(options, f"{name}-trl-{pairs}", times, tokens) | about)


def trl_config(options: argparse.Namespace, folder: str, name: str, pairs: int) -> Any:
    """As many rows to an optimizer step as Tandem has."""
    from trl import DPOConfig, KTOConfig, RewardConfig

    on_gpu = options.device.startswith("cuda")
    rows = 2 * pairs if name == "kto" else pairs
    own: dict[str, Any] = {} if name == "rm" else {"precompute_ref_log_probs": True, "beta": 0.1}
    if options.trl_liger:
        # TRL's own head does without the logits, and refuses liger's beside it.
        own["liger_kernel_config"] = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    cls: Any = {"dpo": DPOConfig, "kto": KTOConfig, "rm": RewardConfig}[name]
    return cls(
        output_dir=f"{folder}/trl", num_train_epochs=1, learning_rate=1e-6, lr_scheduler_type="constant",
        per_device_train_batch_size=rows, gradient_accumulation_steps=options.batch // pairs,
        train_sampling_strategy="sequential", max_length=PROMPTS[3] + ANSWERS[3] + 1, gradient_checkpointing=False,
        bf16=on_gpu, use_cpu=not on_gpu, use_liger_kernel=options.trl_liger, report_to="none", save_strategy="no",
        logging_steps=1000, disable_tqdm=True, dataloader_pin_memory=on_gpu,
        model_init_kwargs={"dtype": options.trl_weights, "attn_implementation": options.trl_attention}, **own,
    )  # fmt: skip


SYSTEMS: dict[str, Any] = {
    f"{name}-{system}": run
    for name in METHODS
    for system, run in {
        "tandem": partial(tandem, name=name),
        **{f"trl-{pairs}": partial(trl, name=name, pairs=pairs) for pairs in MICRO_BATCHES},
    }.items()
}


def main() -> None:
    """Measures and prints the tables."""
    parser = arguments(__doc__, ["tandem", "trl", *SYSTEMS], SIZES, "1.5b")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--token-budget", type=int, help="of Tandem's micro-batches; default 16384, on a CPU 1024")
    parser.add_argument("--pairs", type=int, help="default 512, on a CPU 64")
    parser.add_argument("--batch", type=int, help="pairs of an optimizer step; default 64, on a CPU 16")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--trl-attention", help="default flash_attention_2 where flash-attn is installed, else sdpa")
    add_trl_options(parser)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    on_cpu = options.device == "cpu"
    options.token_budget = options.token_budget or (1024 if on_cpu else 16384)
    options.pairs = options.pairs or (64 if on_cpu else 512)
    options.batch = options.batch or (16 if on_cpu else 64)
    if options.pairs % options.batch or options.pairs // options.batch <= options.warm:
        parser.error("--pairs must be several --batch, and more of them than --warm")
    has_flash = not on_cpu and importlib.util.find_spec("flash_attn") is not None
    options.trl_attention = options.trl_attention or ("flash_attention_2" if has_flash else "sdpa")
    resolve_trl_options(options)
    wanted = options.only or ["tandem", "trl"]
    options.only = [
        name
        for name in SYSTEMS
        for method, _, system in [name.partition("-")]
        if method in options.method and (name in wanted or system.partition("-")[0] in wanted)
    ]
    if not options.only:
        parser.error("--only names systems of other methods than --method")
    record = Record(options)
    measure(options, record, SYSTEMS)
    for name in METHODS:
        rates = {r["system"]: r["tokens_per_second"] for r in record.rows if "seconds" in r}
        theirs = [rate for system, rate in rates.items() if system.startswith(f"{name}-trl")]
        for row in record.rows:
            if theirs and row["system"] == f"{name}-tandem" and "seconds" in row:
                row["over_trl"] = row["tokens_per_second"] / max(theirs)
    record.write()
    columns = {
        "system": "system", "tokens_per_second": "tok/s", "over_trl": "over TRL's best",
        "reference_tokens_per_second": "reference tok/s", "seconds": "seconds", "tokens": "tokens",
        "peak_gb": "peak GB", "device_used_gb": "GPU used", "first_step": "first step s",
    }  # fmt: skip
    print_table(f"Learning from preferences, {options.size}", columns, record.rows)


if __name__ == "__main__":
    main()
