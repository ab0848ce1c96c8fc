"""Seconds for all weights to reach the engines: from the driver's call until every engine may sample.

    python bench/weight_sync.py --size 7b --actor 1 --engine 1 --json bench/results/weight_sync.json
    python bench/weight_sync.py --size 7b --actor 1 --engine actor      # on the same GPU
    python bench/weight_sync.py --size tiny --device cpu --kind live

Method. A random model of Qwen2.5's shape, float32 weights with bfloat16 computation, is trained by ``--actor`` workers
(sharded by FSDP2 where there are several). Engines (vLLM starting from dummy weights) hold it in bfloat16. Each push
gathers, casts, sends and loads all weights, drops the prefix cache, and commits the version on both sides. The truth
check of all tensors is on in every other push, and the difference is what it costs; the probe of log-probs, which every
256th push makes, is timed by itself. The first pushes, which make connections and learn how to load, stand apart;
medians are over the others. Between pushes the trainer's weights change, and the check proves that the new ones arrive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine
from models import SIZES, random_model, write_folder

from tandem.assembly.configs.role_sections import SamplingPlacement
from tandem.assembly.configs.sections import ClusterSection, EngineSection, ModelSection, SamplingSection
from tandem.assembly.placing import Homes
from tandem.assembly.wiring import Wiring
from tandem.methods.grpo import GRPO
from tandem.models.loading import load_tokenizer, prepare_module
from tandem.roles import Seat
from tandem.sync.check import PROBE_EVERY
from tandem.sync.push import WeightPush
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.workers.process import Site

WARM = 3


def trainer(site: Site, size: str, folder: str, dtype: Any) -> LocalTrainer:
    """A random model of the size, made where it trains."""
    device = str(site.world.device)
    model = prepare_module(random_model(size, device), load_tokenizer(folder), dtype=dtype, device=device)
    optim = OptimParams(learning_rate=1e-6, total_steps=1)
    return LocalTrainer(model, GRPO().loss, optim, token_budget=4096, world=site.world)


class Nudge:
    """Beside the trainer: changes its weights as a step would."""

    def __init__(self, site: Site) -> None:
        self.trainer: LocalTrainer = site.roles["actor"]

    def nudge(self) -> None:
        with torch.no_grad():
            for weight in self.trainer.weights.values():
                (weight.to_local() if hasattr(weight, "to_local") else weight).mul_(1.001)
        self.trainer._changed()


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Pushes ``--repeats`` times after the first."""
    arguments = {"load_format": "dummy", "enforce_eager": True} if options.kind == "vllm" else {}
    on_gpu = options.device != "cpu"
    model = ModelSection(model=folder, dtype="bfloat16" if on_gpu else "float32", device=options.device)
    engine = EngineSection(
        kind=options.kind,
        arguments=json.dumps(arguments),
        transport=options.transport,
        memory_share=options.memory_share,
        tensor_parallel=options.tensor_parallel,
        max_length=512,
        sleep=False,
    )
    placement = SamplingPlacement(actor=options.actor, engine=options.engine)
    with Homes(model, placement, ClusterSection(), engine, ["actor", "engine"]) as homes:
        homes.place("actor", partial(trainer, size=options.size, folder=folder, dtype=model.dtype))
        nudge = homes.place("nudge", Nudge, beside="actor")
        sampling = SamplingSection(max_slots=64, max_new_tokens=8)
        sampler = Wiring(homes=homes, sampling=sampling, seed=0, vocabulary=256, others={}).engine()
        push = sampler.link
        if push is None:
            raise SystemExit("nothing travels: the engine samples on the trainer's own weights")
        pushes: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        # The first ones connect, learn how to load, and probe: they are reported by themselves.
        first = [_timed(nudge, push, step) for step in range(WARM)]
        for step in range(WARM, WARM + 2 * options.repeats):
            # Alternating, so that both meet the same neighbours.
            push.check.on = step % 2 == 0
            pushes[push.check.on].append(_timed(nudge, push, step))
    return {"about": sampler.about, "first": first, "checked": pushes[True], "unchecked": pushes[False]}


def _timed(nudge: Seat, push: WeightPush, step: int) -> dict[str, float]:
    """A push of changed weights, with the seconds from the call to its return."""
    nudge.call("nudge")
    start = time.perf_counter()
    return push(step) | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kind", choices=("vllm", "live"), default="vllm")
    parser.add_argument("--actor", default="1", help="trainer workers")
    parser.add_argument("--engine", default="1", help="engines, or 'actor' for the trainer's own GPUs")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--memory-share", type=float, default=None)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # vLLM and the trainer make random weights of their own; a live engine reads its first ones.
        write_folder(options.size, Path(folder), weights=options.kind == "live")
        result = measure(options, folder)
    print(table(options, result))
    if options.json:
        record = {"options": {k: str(v) for k, v in vars(options).items()}, "machine": machine(), **result}
        old = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps([*old, record], indent=1) + "\n")


def table(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """What was measured, for a person to read."""
    gb = sum(p.numel() for p in random_shapes(options.size)) * (4 if options.device == "cpu" else 2) / 1e9
    medians: dict[str, float] = {}
    lines = [
        f"{options.size}, {gb:.2f} GB, {result['about']}; {options.repeats} pushes of each kind",
        f"{'':10}{'median s':>10}{'min s':>10}{'max s':>10}{'GB/s':>8}",
    ]
    for kind in ("unchecked", "checked"):
        seconds = [push["seconds"] for push in result[kind]]
        medians[kind] = statistics.median(seconds)
        lines.append(f"{kind:10}{medians[kind]:10.4f}{min(seconds):10.4f}{max(seconds):10.4f}{gb / medians[kind]:8.1f}")
    cost = (medians["checked"] - medians["unchecked"]) / medians["unchecked"]
    # The second push probes as every 256th does; in the first, the models are still warming up.
    probe = result["first"][1]["sync_check_seconds"]
    lines.append(
        f"the check of all tensors costs {cost:+.1%} of a push; the probe {probe:.4f} s in every {PROBE_EVERY}th, "
        f"{probe / PROBE_EVERY / medians['unchecked']:.1%} of a push on average"
    )
    lines.append("first pushes: " + ", ".join(f"{push['seconds']:.2f} s" for push in result["first"]))
    return "\n".join(lines)


def random_shapes(size: str) -> list[torch.Tensor]:
    """The parameters of that size, without memory behind them."""
    return list(random_model(size, "meta").parameters())


if __name__ == "__main__":
    main()
