"""Seconds of a GRPO step: Tandem, TRL with colocated vLLM, TRL with ``generate``; equal work.

    python bench/rl_step.py --size 0.5b --json bench/results/rl_step_0.5b.json
    python bench/rl_step.py --size 1.5b --new-tokens 512 --only tandem trl-vllm
    python bench/rl_step.py --size 0.75m --device cpu --steps 12 --json bench/results/rl_step_cpu.json

Method. A random model of Qwen2.5's shape is trained on --prompts × --samples completions a step, of --new-tokens each
(a random model hardly ever ends one early; the completion tokens of a step are in the table), from prompts of
--prompt-tokens random letters, without a KL term, with one optimizer step for each generation, and a reward function
that differs between samples. Every system has a process of its own, one after the other. The median step counts, after
--skip of them; its seconds are from the end of one optimizer step to the end of the next, GPU done.

Tandem is the command line itself, its seconds those of metrics.jsonl: bfloat16 with float32 masters (--dtype bfloat16),
the live engine, ratios against the sampler's own log-probs. TRL is GRPOTrainer with micro-batches of --trl-batch
completions, no gradient checkpointing, no second scoring forward either (no importance sampling correction; beta 0),
and with --trl-weights bfloat16 (default on a GPU: its fastest, and less exact, as its optimizer rounds too) or float32
under autocast; on a GPU with liger-kernel's layers, if they are installed (--no-trl-liger: without). Its vLLM is
colocated, awake all the time, with CUDA graphs, without detokenizing. Rewards see text.

With --lora both train adapters of that rank on all linear layers (alpha 32, no dropout), TRL through peft. With
--quantize nf4 the model is a folder in bitsandbytes' 4 bits, written a layer at a time, and both train on it as it is;
with fp8 Tandem quantises it as it reads it. The largest model, on one H200:

    python bench/rl_step.py --size 32b --lora 16 --quantize nf4 --only tandem --token-budget 8192 \\
        --tandem-flags=--activation-checkpointing

"peak GB" is what torch allocated at most in the process, "GPU used" what nvidia-smi saw. --profile adds two steps
to Tandem's that do not count, and traces from one reward to the next: a step's training and the next one's sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import string
import subprocess
import sys
import tempfile
import time
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
    require,
    resolve_device,
    resolve_trl_options,
    synchronize,
)
from models import SIZES, write_4bit_folder, write_folder

PHASES = ("sampling", "scoring", "training", "sync")
REWARD = """
import os
import torch

steps = 0
profiler = None


def spread(prompts, completions, completion_ids, **columns):
    trace()
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def trace():
    \"\"\"From the {start}th call to the next: the profiler runs through what lies between.\"\"\"
    global steps, profiler
    steps += 1
    if steps == {start} and os.environ.get("BENCH_TRACE"):
        profiler = torch.profiler.profile()
        profiler.start()
    elif profiler is not None:
        profiler.stop()
        profiler.export_chrome_trace(os.environ["BENCH_TRACE"])
        profiler = None
"""


def write_inputs(options: argparse.Namespace, folder: Path) -> None:
    """Model, prompts and reward."""
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    device = "cuda" if options.device.startswith("cuda") else "cpu"
    if options.quantize == "nf4":
        write_4bit_folder(options.size, folder / "model", device=device, dtype=dtype)
    else:
        write_folder(options.size, folder / "model", device=device, full_tokenizer=True, dtype=dtype)
    rng, count = random.Random(0), options.prompts * options.steps
    rows = [{"prompt": "".join(rng.choices(string.ascii_lowercase, k=options.prompt_tokens))} for _ in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD.replace("{start}", str(options.steps + 1)))


def tandem(options: argparse.Namespace, record: Record) -> None:
    """``tandem grpo`` as a user would type it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options, folder)
        samples = options.prompts * options.samples
        flags: dict[str, Any] = {
            "model": "model", "data": "prompts.jsonl", "reward": "reward.py:spread", "out": "run", "save-every": "0",
            "steps": options.steps + 2 * bool(options.profile), "prompts-per-step": options.prompts,
            "samples-per-prompt": options.samples,
            "max-new-tokens": options.new_tokens, "max-slots": options.slots or samples, "kl-coef": 0,
            "learning-rate": "1e-6", "device": options.device, "token-budget": options.token_budget,
            "dtype": "bfloat16" if options.device.startswith("cuda") else "float32",
            "engine.max-length": options.prompt_tokens + options.new_tokens + 1, "rollouts-logged": 0,
        }  # fmt: skip
        argv = [sys.executable, "-m", "tandem", "grpo", *(x for k, v in flags.items() for x in (f"--{k}", str(v)))]
        if options.lora:
            argv += ["--lora.rank", str(options.lora)]
        if options.quantize:
            argv += ["--lora.quantize", options.quantize]
        argv += shlex.split(options.tandem_flags)
        trace = {"BENCH_TRACE": str(options.profile.resolve())} if options.profile else {}
        start = time.perf_counter()
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=dict(os.environ) | trace)
        wall = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip())[-1500:])
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "seconds" in step]
    record.add(tandem_row(options, steps) | {"command": " ".join(argv[1:]), "wall_seconds": wall, "steps": steps})


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the inputs: in another process if on a GPU, whose memory the measured one is to have to itself."""
    if options.device == "cpu":
        write_inputs(options, folder)
        return
    argv = [sys.executable, __file__, "--skip", "0", "--write", str(folder)]
    for name in ("size", "device", "prompts", "prompt_tokens", "steps", "lora", "quantize"):
        if (value := getattr(options, name)) is not None:
            argv += ["--" + name.replace("_", "-"), str(value)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def tandem_row(options: argparse.Namespace, steps: list[Row]) -> Row:
    """Medians of the steps that count."""
    counted = steps[options.skip : options.steps]
    row: Row = {"system": "tandem", "seconds": statistics.median(step["seconds"] for step in counted)}
    row |= {phase: statistics.median(step[f"seconds_{phase}"] for step in counted) for phase in PHASES}
    row["completion_tokens"] = statistics.median(step["sampled_tokens"] for step in counted)
    row["samples_per_second"] = options.prompts * options.samples / row["seconds"]
    row["first_step"] = steps[0]["seconds"]
    peaks = {k.removeprefix("memory_gb_"): v for step in steps for k, v in step.items() if k.startswith("memory_gb_")}
    for phase in peaks:
        peaks[phase] = max(step[f"memory_gb_{phase}"] for step in steps if f"memory_gb_{phase}" in step)
    if peaks:
        row |= {"peak_gb": max(peaks.values()), "peak_gb_of": peaks}
    return row | {"every_second": [step["seconds"] for step in steps]}


def trl(options: argparse.Namespace, record: Record, *, with_vllm: bool) -> None:
    """TRL's GRPOTrainer in this process."""
    require("trl")
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    class Clock(TrainerCallback):
        """When each optimizer step was done."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def _now(self) -> None:
            synchronize(options.device)
            self.ends.append(time.perf_counter())

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._now()

    counts: list[int] = []

    def spread(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        counts.append(sum(map(len, completion_ids)))
        return [sum(ids) % 97 / 97 for ids in completion_ids]

    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options, folder)
        rows = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train", cache_dir=name)
        config = trl_config(options, folder, with_vllm)
        adapters = None
        if options.lora:
            from peft import LoraConfig

            adapters = LoraConfig(
                r=options.lora, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
            )
        trainer = GRPOTrainer(
            str(folder / "model"), [spread], config, train_dataset=rows, callbacks=[clock], peft_config=adapters
        )
        peak_gb(options.device)
        trainer.train()
    every = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    seconds = statistics.median(every[options.skip :])
    record.add({
        "system": "trl-vllm" if with_vllm else "trl-generate", "seconds": seconds, "first_step": every[0],
        "completion_tokens": statistics.median(counts[options.skip :]), "peak_gb": peak_gb(options.device),
        "samples_per_second": options.prompts * options.samples / seconds, "every_second": every,
        "weights": options.trl_weights, "liger": options.trl_liger, "micro_batch": config.per_device_train_batch_size,
    })  # fmt: skip


def trl_config(options: argparse.Namespace, folder: Path, with_vllm: bool) -> Any:
    """One generation of all samples, then one optimizer step."""
    from trl import GRPOConfig

    samples, on_gpu = options.prompts * options.samples, options.device.startswith("cuda")
    batch = min(options.trl_batch, samples)
    if samples % batch:
        raise ValueError(f"--trl-batch {batch} does not divide {samples} samples")
    vllm: dict[str, Any] = {}
    if with_vllm:
        vllm = {
            "use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": False,
            "vllm_gpu_memory_utilization": options.vllm_memory_share, "vllm_importance_sampling_correction": False,
            "vllm_max_model_length": options.prompt_tokens + options.new_tokens + 8,
            "generation_kwargs": {"detokenize": False},
        }  # fmt: skip
    return GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=options.steps, learning_rate=1e-6, lr_scheduler_type="constant",
        per_device_train_batch_size=batch, gradient_accumulation_steps=samples // batch,
        num_generations=options.samples, max_completion_length=options.new_tokens, beta=0.0, temperature=1.0,
        gradient_checkpointing=False, bf16=on_gpu, use_cpu=not on_gpu, use_liger_kernel=options.trl_liger,
        model_init_kwargs={"dtype": options.trl_weights}, report_to="none", save_strategy="no", logging_steps=1000,
        disable_tqdm=True, dataloader_pin_memory=on_gpu, **vllm,
    )  # fmt: skip


def trl_vllm(options: argparse.Namespace, record: Record) -> None:
    """TRL sampling with vLLM on the trainer's GPU."""
    trl(options, record, with_vllm=True)


def trl_generate(options: argparse.Namespace, record: Record) -> None:
    """TRL sampling with the model's own ``generate``."""
    trl(options, record, with_vllm=False)


SYSTEMS = {"tandem": tandem, "trl-vllm": trl_vllm, "trl-generate": trl_generate}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of the device."""
    parser = arguments(__doc__, list(SYSTEMS), SIZES, "0.5b")
    parser.add_argument("--prompts", type=int, help="of a step; default 64, on a CPU 32")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--prompt-tokens", type=int, help="default 64, on a CPU 16")
    parser.add_argument("--new-tokens", type=int, help="default 256, on a CPU 32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--skip", type=int, default=2, help="steps that do not count")
    parser.add_argument("--token-budget", type=int, default=16384, help="Tandem: tokens of a micro-batch")
    parser.add_argument("--slots", type=int, help="Tandem: completions decoded at once; default all")
    parser.add_argument("--lora", type=int, default=0, help="both train adapters of this rank on all linear layers")
    parser.add_argument("--quantize", choices=("nf4", "fp8"), help="with --lora: the base in few bits; fp8 is Tandem's")
    parser.add_argument("--tandem-flags", default="", help="more of Tandem's own, as one word")
    parser.add_argument("--trl-batch", type=int, default=64, help="TRL: completions of a micro-batch")
    add_trl_options(parser)
    parser.add_argument("--vllm-memory-share", type=float, default=0.4)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.device = resolve_device(options.device)
    on_cpu = options.device == "cpu"
    options.prompts = options.prompts or (32 if on_cpu else 64)
    options.prompt_tokens = options.prompt_tokens or (16 if on_cpu else 64)
    options.new_tokens = options.new_tokens or (32 if on_cpu else 256)
    resolve_trl_options(options)
    if options.only is None:
        options.only = ["tandem", "trl-generate"] if on_cpu else list(SYSTEMS)
    if options.quantize and not options.lora:
        parser.error(f"--quantize {options.quantize}: a base in few bits is trained on with adapters; give --lora")
    if options.steps <= options.skip:
        parser.error(f"--steps {options.steps}: nothing is left after --skip {options.skip}")
    return options


def main() -> None:
    """Measures and prints the table."""
    options = parse()
    if options.write:
        write_inputs(options, options.write)
        return
    record = Record(options)
    measure(options, record, SYSTEMS)
    seconds = {row["system"]: row["seconds"] for row in record.rows if "seconds" in row}
    for row in record.rows:
        if "seconds" in row and "tandem" in seconds:
            row["over_tandem"] = row["seconds"] / seconds["tandem"]
    record.write()
    columns = {
        "system": "system", "seconds": "step s", "over_tandem": "this / Tandem", "samples_per_second": "samples/s",
        "completion_tokens": "completion tokens", **{phase: phase for phase in PHASES}, "peak_gb": "peak GB",
        "device_used_gb": "GPU used", "first_step": "first step s",
    }  # fmt: skip
    samples = options.prompts * options.samples
    title = (
        f"GRPO step, {options.size}: {samples} samples of {options.new_tokens} tokens, {options.prompt_tokens} before"
    )
    print_table(title, columns, record.rows)


if __name__ == "__main__":
    main()
