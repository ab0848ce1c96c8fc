"""Peak memory of log-probs with their gradient, in chunks and with full logits; and of each phase of a GRPO step.

    python bench/memory.py --size 1.5b --json bench/results/memory_1.5b.json
    python bench/memory.py --size 0.5b --rl-step bench/results/rl_step_0.5b.json
    python bench/memory.py --size tiny --device cpu --tokens 2048

Method. chunked and full: log-probs of --tokens targets under a head of the model's width and vocabulary, forward and
backward, bfloat16 on a GPU, float32 on a CPU. What counts is the most that is held at a time above the hidden states,
the head and the gradients of both. full is log_softmax of all logits in float32, as trainers without chunks do it. On
a GPU it is torch's own count of allocated bytes; on a CPU nobody keeps one, so bytes of tensors are counted as
operations make them and as they are let go. Log-probs and gradients of the two are compared in the same run.

phases: the most that was allocated in each phase of ``tandem grpo``'s steps on a GPU (metrics.jsonl: memory_gb_...):
from the record of bench/rl_step.py that --rl-step names, or from a run of --steps made for it.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rl_step
import torch
from common import Record, Row, arguments, measure, print_table, resolve_device, seconds_of
from models import SIZES, config_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tandem.functional.logprobs import chunked_head

CHUNK = 2048


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside make, while they are held: ``now`` and the ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._known or not size:
            return
        self._known.add(pointer)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._let_go, pointer, size)

    def _let_go(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


def full_logprobs(head: nn.Module, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """[N], by way of all logits in float32."""
    return torch.log_softmax(head(hidden_ND).float(), -1).gather(-1, target_N[:, None])[:, 0]


def of_chunks(head: nn.Module, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """[N], as Tandem's trainer computes them without entropies."""
    return chunked_head(head, hidden_ND, target_N).logp_N


def head_and_inputs(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A head, hidden states and targets. Both have a gradient, which is there before anything is counted."""
    torch.manual_seed(0)
    config, device = config_of(options.size), options.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
    hidden_ND = torch.randn(options.tokens, config.hidden_size, device=device, dtype=dtype).requires_grad_()
    target_N = torch.randint(config.vocab_size, (options.tokens,), device=device)
    for tensor in (head.weight, hidden_ND):
        tensor.grad = torch.zeros_like(tensor)
    return head, hidden_ND, target_N


def peak_of(run: Callable[[], None], device: str) -> float:
    """Most GB that a call holds above what was there before."""
    if not device.startswith("cuda"):
        with HeldBytes() as held:
            run()
        return held.most / 1e9
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def of_logprobs(options: argparse.Namespace, record: Record, name: str) -> None:
    """One way's peak and time, and how far its results are from the other way's in float64 on a part of the tokens."""
    compute = {"chunked": of_chunks, "full": full_logprobs}[name]
    head, hidden_ND, target_N = head_and_inputs(options)

    def run() -> None:
        compute(head, hidden_ND, target_N).mean().backward()

    run()
    peak = peak_of(run, options.device)
    seconds = min(seconds_of(run, options.device) for _ in range(options.repeats))
    vocabulary = config_of(options.size).vocab_size
    record.add({
        "system": name, "tokens": options.tokens, "vocabulary": vocabulary, "peak_gb": peak,
        "float32_logits_gb": options.tokens * vocabulary * 4 / 1e9, "seconds": seconds,
        **errors(compute, head, hidden_ND, target_N),
    })  # fmt: skip


def errors(compute: Callable[..., Tensor], head: nn.Module, hidden_ND: Tensor, target_N: Tensor) -> Row:
    """Largest log-prob gap and relative gradient error of a few thousand tokens against float64 of the same inputs."""
    hidden_nD, target_n = hidden_ND[: CHUNK + 100].detach().clone().requires_grad_(), target_N[: CHUNK + 100]
    logp_n = compute(head, hidden_nD, target_n)
    (found,) = torch.autograd.grad(logp_n.mean(), hidden_nD)
    gap, wrong, size = 0.0, 0.0, 0.0
    for start in range(0, len(target_n), 256):
        part_nD = hidden_nD[start : start + 256].detach().double().requires_grad_()
        logits_nV = part_nD @ head.weight.detach().double().T
        exact_n = torch.log_softmax(logits_nV, -1).gather(-1, target_n[start : start + 256, None])[:, 0]
        (exact,) = torch.autograd.grad(exact_n.sum() / len(target_n), part_nD)
        gap = max(gap, (logp_n[start : start + 256] - exact_n).abs().max().item())
        wrong += (found[start : start + 256] - exact).square().sum().item()
        size += exact.square().sum().item()
    return {"gap_max": gap, "gradient_error": (wrong / size) ** 0.5}


def chunked(options: argparse.Namespace, record: Record) -> None:
    """Tandem's way."""
    of_logprobs(options, record, "chunked")


def full(options: argparse.Namespace, record: Record) -> None:
    """All logits at once."""
    of_logprobs(options, record, "full")


def phases(options: argparse.Namespace, record: Record) -> None:
    """Peaks of a GRPO step's phases."""
    if not options.device.startswith("cuda"):
        raise RuntimeError("only on a GPU: torch keeps no count of a process's memory on a CPU")
    if options.rl_step is not None:
        rows = json.loads(options.rl_step.read_text())["rows"]
    else:
        argv = ["--size", options.size, "--device", options.device, "--only", "tandem", "--steps", "3", "--skip", "1"]
        of_run = rl_step.parse(argv)
        inner = Record(of_run)
        rl_step.tandem(of_run, inner)
        rows = inner.rows
    of_tandem = next(row for row in rows if row["system"] == "tandem")
    for phase, peak in of_tandem["peak_gb_of"].items():
        record.add({"system": "phases", "phase": phase, "peak_gb": peak})


SYSTEMS = {"chunked": chunked, "full": full, "phases": phases}


def main() -> None:
    """Measures and prints the table."""
    parser = arguments(__doc__, list(SYSTEMS), SIZES, "0.5b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rl-step", type=Path, help="a record of bench/rl_step.py")
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    record = Record(options)
    measure(options, record, SYSTEMS)
    columns = {
        "system": "system", "phase": "phase", "tokens": "tokens", "vocabulary": "vocabulary", "peak_gb": "peak GB",
        "float32_logits_gb": "logits would take", "seconds": "seconds", "gap_max": "log-prob gap at most",
        "gradient_error": "gradient error",
    }  # fmt: skip
    print_table(f"Peak memory, {options.size}", columns, record.rows)


if __name__ == "__main__":
    main()
