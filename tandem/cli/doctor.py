"""``tandem doctor``: whether engines here sample with the weights that are trained, and how fast those get there."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tandem.assembly.models import load, require_engine, trained, weight_source
from tandem.assembly.placing import Homes
from tandem.assembly.wiring import WiredEngine, Wiring
from tandem.cli.configs import DoctorConfig
from tandem.cli.quickstart import make_base
from tandem.errors import UserError
from tandem.methods.grpo import GRPO
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import layers_of, model_config
from tandem.roles import Seat
from tandem.seeds import derive_seed
from tandem.sync.check import logp_bound, mean_gap
from tandem.training.optim import OptimParams
from tandem.types import Completion, Request, SamplingParams

PROMPTS, SAMPLES = 8, 4


def tell(what: str, found: str, seconds: float | None = None) -> None:
    """Prints a line of what was found, and how long that took."""
    took = "" if seconds is None else f"  ({seconds:.3f} s)"
    print(f"  {what:<22}  {found}{took}", flush=True)


def timed(what: str, work: Callable[[], Any], describe: Callable[[Any], str] = str) -> Any:
    """Does the work and prints a line for it."""
    start = time.perf_counter()
    result = work()
    tell(what, describe(result), time.perf_counter() - start)
    return result


def run(config: DoctorConfig) -> int:
    """The command: every check. Raises UserError at the first that fails, saying what it means."""
    print("tandem doctor", flush=True)
    describe_machine()
    require_engine(config.engine)
    with ExitStack() as stack:
        if not config.model.model:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-doctor-"))
            make_base(Path(folder), 0)
            config = replace(config, model=replace(config.model, model=folder))
        tokenizer = load_tokenizer(config.model.source)
        homes = Homes(config.model, config.placement, config.cluster, config.engine, ["actor", "engine"])
        timed("processes", lambda: stack.enter_context(homes), lambda _: _describe_processes(config))
        build = partial(
            trained,
            load=partial(load, section=config.model, source=config.model.source),
            section=config.model,
            loss=GRPO().loss,
            optim=OptimParams(learning_rate=1e-6, total_steps=1),
        )
        actor = timed("trainer", lambda: homes.place("actor", build), lambda found: found.call("describe"))
        sampler = timed(
            "engine",
            partial(
                Wiring(homes=homes, sampling=config.sampling, seed=0, vocabulary=len(tokenizer)).engine,
                {"actor": actor},
            ),
            lambda found: found.about,
        )
        source = homes.of("actor").place("weights", weight_source)
        _Examination(actor, source, sampler, len(tokenizer), config).run()
    print("all checks passed", flush=True)
    return 0


class _Examination:
    """Sample, zero, push, sample, restore, push, sample."""

    def __init__(self, actor: Seat, source: Seat, sampler: WiredEngine, vocabulary: int, config: DoctorConfig) -> None:
        self.sampler, self.vocabulary = sampler, vocabulary
        self.actor, self.source = actor, source
        self.dtype = config.model.dtype
        self.layers = layers_of(model_config(config.model.source))
        self.rounds = config.engine.kind == "vllm"
        params = SamplingParams(max_new_tokens=config.sampling.max_new_tokens)
        self.requests = [
            Request(
                prompt_ids=tuple((7 * place + 3 * i) % vocabulary for i in range(4 + place)),
                seeds=tuple(derive_seed(0, "doctor", place, i) for i in range(SAMPLES)),
                sampling=params,
            )
            for place in range(PROMPTS)
        ]

    def run(self) -> None:
        self._push("push")
        before = self._sample("sampling")
        self._agree(before)
        timed("zeroing the trainer", lambda: self.source.call("zero"), lambda _: "all parameters")
        self._push("push of zeros")
        self._require_nonsense(self._sample("sampling zeros"))
        timed("restoring the trainer", lambda: self.source.call("restore"), lambda _: "as they were")
        self._push("push back")
        after = self._sample("sampling again")
        self._agree(after)
        same = sum(a.token_ids == b.token_ids for a, b in zip(before, after, strict=True))
        # vLLM's rounding depends on what else is in the batch, and a draw may tip over with it. The live engine's not.
        if same < (0.9 if self.rounds else 1) * len(before):
            raise UserError(f"doctor: with the weights restored {len(before) - same} of {len(before)} samples differ "
                            "from before; the engine did not get back what it had")  # fmt: skip
        tell("as before", f"{same} of {len(before)} samples are the same, token for token")

    def _push(self, what: str) -> None:
        timed(what, lambda: self.sampler.push(0), _describe_push)

    def _sample(self, what: str) -> list[Completion]:
        def describe(samples: list[Completion]) -> str:
            return f"{len(samples)} samples, {sum(len(s.token_ids) for s in samples)} tokens"

        return timed(
            what, lambda: [c for group in self.sampler.engine.generate(self.requests) for c in group], describe
        )

    def _agree(self, samples: list[Completion]) -> None:
        """The engine's log-probs are the trainer's."""
        prompts = [request.prompt_ids for request in self.requests for _ in request.seeds]
        sequences = [[*prompt, *s.token_ids] for prompt, s in zip(prompts, samples, strict=True)]
        found = self.actor.call("logprobs", sequences)
        truth, rounding = (
            [row[-len(s.token_ids) :] for s, row in zip(samples, rows, strict=True)]
            for rows in (found, self.actor.call("rounding", sequences))
        )
        sampled = [s.untruncated_logp for s in samples]
        gaps = [abs(a - b) for x, y in zip(sampled, truth, strict=True) for a, b in zip(x, y, strict=True)]
        beyond, bound = mean_gap(truth, sampled, rounding), logp_bound(self.dtype, self.layers)
        if not beyond <= bound:
            raise UserError(
                f"doctor: the engine's log-probs are {beyond:.3g} nats from the trainer's on average (bound {bound}); "
                "it samples from another model, or from other weights, than the one that is trained"
            )
        tell("log-prob gap", f"mean {sum(gaps) / len(gaps):.2g}, largest {max(gaps):.2g} nats ({self.dtype})")

    def _require_nonsense(self, samples: list[Completion]) -> None:
        """With all weights 0 every token is as likely as any other."""
        logps = [x for s in samples for x in s.untruncated_logp]
        # Tables are often padded beyond the tokenizer's vocabulary, and padding is drawn like the rest.
        mean, uniform = sum(logps) / len(logps), -math.log(self.vocabulary)
        if max(logps) - min(logps) > 1e-2 or mean > uniform + 1e-2:
            raise UserError(
                f"doctor: with all of the trainer's weights 0 the engine still prefers some tokens (log-probs from "
                f"{min(logps):.3f} to {max(logps):.3f}, uniform is {uniform:.3f}): pushes do not reach it"
            )
        tell("it changed", f"uniform over {round(math.exp(-mean))} tokens")


def describe_machine() -> None:
    """Versions, and what there is to run on."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "ray", "vllm"):
        names = [package, f"{package}-cpu"]
        found = [v for name in names if (v := _version(name))]
        versions[package] = found[0] if found else "not installed"
    tell("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if not torch.cuda.is_available():
        tell("devices", f"no GPU; {torch.get_num_threads()} CPU threads")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        tell(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_processes(config: DoctorConfig) -> str:
    actor, engine = config.placement.actor, config.placement.engine
    where = "this process" if actor == "here" else f"{actor} for the trainer"
    return f"{where}; engine {'on the same devices' if engine == 'actor' else f'in {engine} of its own'}"


def _describe_push(metrics: dict[str, float]) -> str:
    if "sync_gb_per_second" not in metrics:
        return "nothing to move, or moved when sampling starts"
    return (
        f"{metrics['sync_seconds'] * 1e3:.1f} ms, {metrics['sync_gb_per_second']:.2f} GB/s, "
        f"check {metrics['sync_check_seconds'] * 1e3:.1f} ms"
    )
