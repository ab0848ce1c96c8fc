"""Tokens per second, MFU and memory of training: Tandem on packed micro-batches, and SFT beside TRL's SFTTrainer.

    python bench/training.py --size 1.5b --json bench/results/training_1.5b.json
    python bench/training.py --size 0.5b --only packed gradients --profile /tmp/step.json.gz
    python bench/training.py --size tiny --device cpu

Method. A random model of Qwen2.5's shape; bfloat16 with float32 masters on a GPU, float32 on a CPU. Every system has a
process of its own, one after the other. A step is forward, backward and optimizer step on all its micro-batches, GPU
done, after --warm steps that meet whatever is compiled.

packed: Tandem's LocalTrainer, SFT on every token, --accumulate micro-batches of --token-budget tokens in sequences of
--sequence. The median step counts. MFU = tokens/s × FLOPs of a token / 790 TFLOP/s, with FLOPs of a token =
6·N + 6·L·D·s: N parameters (a tied head once, an untied input embedding not), L layers, D = heads × their size, s the
sequence's length; attention's causal half counts, what is computed twice does not. Of experts N has those of the few
that a token goes to.

transformers-eager, transformers-grouped_mm, of models with experts (--size 1b-moe): the same step by the model's own
forward, loss and backward, with its experts one after the other or in grouped products; bfloat16 weights without
masters, scaled_dot_product_attention, the sequences side by side (they are of one length), fused AdamW.

sft-...: one pass over --sft-sequences random sequences whose lengths are log-normal (median 300, sigma 1, from 16 to
4,096; on a CPU a sixteenth of that), --sft-batch to an optimizer step; tokens/s are of real tokens, all steps after
the warm ones together. Tandem packs them to --token-budget. TRL has bfloat16 weights (--trl-weights), its fused head
or, on a GPU and if they are installed, liger-kernel's layers (--no-trl-liger: without), no gradient checkpointing, and
micro-batches of about --trl-tokens tokens: sft-trl-pack-flex and sft-trl-pack-sdpa pack (best fit, 4,096 to a row, as
many tokens to an optimizer step), sft-trl-group pads samples of like length. Which is fastest depends on the machine:
the best that ran is TRL's.

gradients: relative error of the whole gradient, against float64 on the CPU, on a small model with sequences of several
lengths: Tandem's, and that of transformers' own forward and backward in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    PEAK_FLOPS,
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
from models import SIZES, byte_tokenizer, config_of, head_size, multiplied_parameters, random_model, write_folder
from torch import Tensor

from tandem.batch import Batch
from tandem.data.packing import pack, stamp_weights
from tandem.methods.sft import SFT
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence

LONGEST, MEDIAN, SIGMA, SHORTEST = 4096, 300, 1.0, 16


def dtype_of(device: str) -> str:
    """What is computed in."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def trainer_of(options: argparse.Namespace, module: Any, token_budget: int, dtype: Any = None) -> LocalTrainer:
    """A trainer that owns the module."""
    dtype = dtype or dtype_of(options.device)
    tokenizer = byte_tokenizer(module.config.vocab_size)
    model = prepare_module(module, tokenizer, dtype=dtype, device=options.device)
    optim = OptimParams(learning_rate=1e-6, total_steps=100)
    # As the command line does by itself.
    return LocalTrainer(model, SFT().loss, optim, token_budget=token_budget, compile="auto")


def batch_of(sequences: list[list[int]]) -> Batch:
    """SFT on every token."""
    rows = [Sequence(token_ids=ids, trainable=[True] * len(ids)) for ids in sequences]
    return stamp_weights(pack(rows), "token")


def step(trainer: LocalTrainer, batch: Batch) -> None:
    """One optimizer step."""
    trainer.forward_backward(batch)
    trainer.optim_step()


def packed(options: argparse.Namespace, record: Record) -> None:
    """MFU on full micro-batches."""
    module = random_model(options.size, options.device)
    config, trainer = module.config, trainer_of(options, module, options.token_budget)
    rng = random.Random(0)
    count = options.accumulate * (options.token_budget // options.sequence)
    sequences = [[rng.randrange(1, config.vocab_size) for _ in range(options.sequence)] for _ in range(count)]
    batch = batch_of(sequences)
    warm = [seconds_of(partial(step, trainer, batch), options.device) for _ in range(options.warm)]
    peak_gb(options.device)
    times = [seconds_of(partial(step, trainer, batch), options.device) for _ in range(options.repeats)]
    seconds, tokens = statistics.median(times), batch.tokens
    row: Row = {
        "system": "packed", "tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens,
        "peak_gb": peak_gb(options.device), "first_step": warm[0] if warm else times[0], "every_second": times,
    }  # fmt: skip
    if options.device.startswith("cuda"):
        width = config.num_attention_heads * head_size(config)
        flops = 6 * multiplied_parameters(options.size) + 6 * config.num_hidden_layers * width * options.sequence
        row |= {"mfu": tokens / seconds * flops / PEAK_FLOPS, "flops_of_a_token": flops}
    record.add(row)
    with profiled(options.profile, options.device):
        if options.profile:
            step(trainer, batch)


def own(options: argparse.Namespace, record: Record, *, experts: str) -> None:
    """The step of ``packed`` by transformers' own modules."""
    module = random_model(options.size, options.device, dtype=getattr(torch, dtype_of(options.device))).train()
    if not hasattr(module.config, "num_experts"):
        raise ValueError(f"{options.size} has no experts: give --size 1b-moe, or another --only")
    module.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    rng, rows = random.Random(0), options.token_budget // options.sequence
    shape, count = (rows, options.sequence), rows * options.sequence
    ids = [[rng.randrange(1, module.config.vocab_size) for _ in range(count)] for _ in range(options.accumulate)]
    batches = [torch.tensor(of_one, device=options.device).view(shape) for of_one in ids]

    def step() -> None:
        for ids_BT in batches:
            (module(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    warm = [seconds_of(step, options.device) for _ in range(options.warm)]
    peak_gb(options.device)
    times = [seconds_of(step, options.device) for _ in range(options.repeats)]
    seconds, tokens = statistics.median(times), count * len(batches)
    record.add({
        "system": f"transformers-{experts}", "tokens_per_second": tokens / seconds, "seconds": seconds,
        "tokens": tokens, "peak_gb": peak_gb(options.device), "first_step": (warm or times)[0], "every_second": times,
    })  # fmt: skip


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Log-normal, as lengths of chats are."""
    rng, small = random.Random("lengths"), 1 if options.device.startswith("cuda") else 16
    drawn = (rng.lognormvariate(0.0, SIGMA) * MEDIAN for _ in range(options.sft_sequences))
    return [max(SHORTEST, min(int(n), LONGEST)) // small for n in drawn]


def sequences_of(options: argparse.Namespace) -> list[list[int]]:
    """The SFT dataset: the same for every system."""
    rng, vocabulary = random.Random("tokens"), config_of(options.size).vocab_size
    return [[rng.randrange(1, vocabulary) for _ in range(max(2, n))] for n in lengths_of(options)]


def sft_tandem(options: argparse.Namespace, record: Record) -> None:
    """Tandem over the log-normal lengths."""
    rows = sequences_of(options)
    trainer = trainer_of(options, random_model(options.size, options.device), options.token_budget)
    batches = [batch_of(rows[i : i + options.sft_batch]) for i in range(0, len(rows), options.sft_batch)]
    peak_gb(options.device)
    times = [seconds_of(partial(step, trainer, batch), options.device) for batch in batches]
    tokens = [batch.tokens for batch in batches]
    record.add(rate_row(options, "sft-tandem", times, tokens))


def sft_trl(options: argparse.Namespace, record: Record, *, packing: bool, attention: str, name: str) -> None:
    """TRL's SFTTrainer over the same lengths."""
    require("trl")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from trl import SFTTrainer

    rows = sequences_of(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = torch.bfloat16 if options.trl_weights == "bfloat16" else torch.float32
        # In a folder of its own, so that it is read as a user's model is.
        source = write_folder(options.size, Path(folder) / "model", device=options.device, dtype=weights)
        config = sft_config(options, folder, rows, packing, attention)
        trainer = SFTTrainer(source, config, train_dataset=Dataset.from_dict({"input_ids": rows}))
        peak_gb(options.device)
        times, tokens = trl_steps(trainer, options.device)
    if sum(tokens) != sum(map(len, rows)):
        raise RuntimeError(f"{sum(tokens)} tokens were trained on instead of {sum(map(len, rows))}")
    about = {"micro_batch": config.per_device_train_batch_size, "weights": options.trl_weights}
    record.add(rate_row(options, name, times, tokens) | about | {"liger": options.trl_liger})


def sft_config(options: argparse.Namespace, folder: str, rows: list[list[int]], packing: bool, attention: str) -> Any:
    """About as many tokens to an optimizer step as Tandem has."""
    from trl import SFTConfig

    on_gpu = options.device.startswith("cuda")
    longest = LONGEST if on_gpu else LONGEST // 16
    fit = max(1, options.trl_tokens // longest)
    if packing:
        # A dense mask of all tokens by all tokens makes large packed rows expensive without block masks.
        fit = fit if attention == "flex_attention" else 1
        in_a_step = sum(map(len, rows)) / len(rows) * options.sft_batch / longest
        own: dict[str, Any] = {"packing": True, "packing_strategy": "bfd"}
    else:
        in_a_step = options.sft_batch
        own = {"train_sampling_strategy": "group_by_length"}
    own["gradient_accumulation_steps"] = max(1, round(in_a_step / fit))
    return SFTConfig(
        output_dir=f"{folder}/trl", num_train_epochs=1, learning_rate=1e-6, lr_scheduler_type="constant",
        per_device_train_batch_size=fit, max_length=longest, gradient_checkpointing=False, bf16=on_gpu,
        use_cpu=not on_gpu, use_liger_kernel=options.trl_liger, report_to="none", save_strategy="no",
        logging_steps=1000, disable_tqdm=True, dataloader_pin_memory=on_gpu,
        model_init_kwargs={"dtype": options.trl_weights, "attn_implementation": attention}, **own,
    )  # fmt: skip


def gradients(options: argparse.Namespace, record: Record) -> None:
    """Errors of Tandem's gradient and of a plain one, in each precision of the device."""
    rng, size = random.Random("gradients"), "tiny"
    vocabulary = config_of(size).vocab_size
    sequences = [[rng.randrange(vocabulary) for _ in range(n)] for n in (7, 33, 64, 100, 128)]
    base = random_model(size)
    exact = plain_gradient(copy.deepcopy(base).double(), sequences)
    for dtype in ("float32", "bfloat16") if options.device.startswith("cuda") else ("float32",):
        # Two micro-batches, so that adding up is part of it.
        trainer = trainer_of(options, copy.deepcopy(base), 256, dtype)
        trainer.forward_backward(batch_of(sequences))
        ours = {name: weight.grad for name, weight in trainer.weights.items()}
        plain = plain_gradient(copy.deepcopy(base).to(options.device), sequences, getattr(torch, dtype))
        record.add({
            "system": "gradients", "dtype": dtype, "tokens": sum(map(len, sequences)),
            "gradient_error": distance(ours, exact), "plain_gradient_error": distance(plain, exact),
        })  # fmt: skip


def plain_gradient(module: Any, sequences: list[list[int]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of the mean negative log-likelihood, a sequence at a time; ``dtype`` bfloat16: under autocast."""
    device = next(module.parameters()).device
    total = sum(len(ids) - 1 for ids in sequences)
    for ids in sequences:
        ids_T = torch.tensor(ids, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_TV = module(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        (torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum") / total).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def distance(found: dict[str, Any], exact: dict[str, Tensor]) -> float:
    """|found - exact| / |exact| over all parameters. Raises RuntimeError where one has no gradient."""
    if missing := [name for name in exact if found.get(name) is None]:
        raise RuntimeError(f"no gradient: {', '.join(missing[:3])}")
    wrong = sum((found[name].double().cpu() - exact[name]).square().sum() for name in exact)
    return float((wrong / sum(g.square().sum() for g in exact.values())).sqrt())


SYSTEMS: dict[str, Any] = {
    "packed": packed,
    "transformers-eager": partial(own, experts="eager"),
    "transformers-grouped_mm": partial(own, experts="grouped_mm"),
    "sft-tandem": sft_tandem,
    "sft-trl-group": partial(sft_trl, packing=False, attention="sdpa", name="sft-trl-group"),
    "sft-trl-pack-flex": partial(sft_trl, packing=True, attention="flex_attention", name="sft-trl-pack-flex"),
    "sft-trl-pack-sdpa": partial(sft_trl, packing=True, attention="sdpa", name="sft-trl-pack-sdpa"),
    "gradients": gradients,
}


def main() -> None:
    """Measures and prints the tables."""
    parser = arguments(__doc__, list(SYSTEMS), SIZES, "0.5b")
    parser.add_argument("--token-budget", type=int, help="of a micro-batch; default 16384, on a CPU 1024")
    parser.add_argument("--sequence", type=int, help="default 1024, on a CPU 128")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches in a packed step")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--sft-sequences", type=int, help="default 1024, on a CPU 256")
    parser.add_argument("--sft-batch", type=int, default=64)
    parser.add_argument("--trl-tokens", type=int, help="of a micro-batch; default --token-budget")
    add_trl_options(parser)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    on_cpu = options.device == "cpu"
    options.token_budget = options.token_budget or (1024 if on_cpu else 16384)
    options.sequence = options.sequence or (128 if on_cpu else 1024)
    options.sft_sequences = options.sft_sequences or (256 if on_cpu else 1024)
    options.trl_tokens = options.trl_tokens or options.token_budget
    resolve_trl_options(options)
    if options.only is None and "moe" not in options.size:
        options.only = [name for name in SYSTEMS if not name.startswith("transformers-")]
    record = Record(options)
    measure(options, record, SYSTEMS)
    found = {row["system"]: row["tokens_per_second"] for row in record.rows if "seconds" in row}
    for system, ours in (("sft-trl", "sft-tandem"), ("transformers", "packed")):
        for row in record.rows:
            if row["system"].startswith(system) and "seconds" in row and ours in found:
                row["tandem_over"] = found[ours] / row["tokens_per_second"]
    record.write()
    columns = {
        "system": "system", "tokens_per_second": "tok/s", "tandem_over": "Tandem / this", "mfu": "MFU",
        "seconds": "seconds", "tokens": "tokens", "peak_gb": "peak GB", "device_used_gb": "GPU used",
        "first_step": "first step s",
    }  # fmt: skip
    checks = {"dtype": "dtype", "tokens": "tokens", "gradient_error": "Tandem's", "plain_gradient_error": "plain"}
    rates = [row for row in record.rows if row["system"] != "gradients"]
    if rates:
        note = "MFU = tok/s · (6·N + 6·layers·width·sequence) / 790 TFLOP/s; recomputation does not count"
        print_table(f"Training, {options.size}", columns, rates, note)
    if gradient_rows := [row for row in record.rows if row["system"] == "gradients"]:
        print_table("Relative error of the gradient against float64", checks, gradient_rows)


if __name__ == "__main__":
    main()
