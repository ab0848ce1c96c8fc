"""Training on a fixed dataset: what ``tandem sft`` and ``tandem rm`` share."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from tandem.assembly.configs import OfflineConfig
from tandem.assembly.inputs import digest_inputs
from tandem.assembly.placing import Homes
from tandem.assembly.sections import EngineSection
from tandem.assembly.wiring import (
    check_out,
    describe_counts,
    evaluation_due,
    load_data,
    optim_params,
    print_plan,
    session,
)
from tandem.batch import Batch
from tandem.data.order import Order
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts
from tandem.errors import UserError
from tandem.models.description import describe_source
from tandem.models.limits import read_limits
from tandem.models.loading import load_tokenizer, pick_device
from tandem.roles import Metrics
from tandem.runs.progress import say
from tandem.schedules.offline import Offline, OfflineRoles
from tandem.training.optim import OptimParams
from tandem.types import Limits
from tandem.workers.launched import launched
from tandem.workers.process import Build
from tandem.workers.torchrun import Ranks, joined

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class OfflineMethod(Generic[Example]):
    """What differs between offline methods: how to make the trainer, read the rows, and batch them."""

    title: str
    head: Literal["lm", "scalar"]
    """Of the model that it trains."""
    leads: Seq[str]
    """Metrics that the display shows."""
    build: Callable[[OptimParams], Build]
    """Makes the trainer where it will live."""
    load_examples: Callable[[Rows, Any, Seq[Limits]], tuple[Seq[Example], Counts]]
    """(rows, tokenizer, limits of the models) → examples, and how many rows were read, truncated and dropped."""
    batch: Callable[[Seq[Example]], Batch]
    """Packed, with its weights stamped."""


def run_offline(config: OfflineConfig, method: OfflineMethod[Any]) -> Path | None:
    """Trains and exports to ``<out>/model``, which is returned.

    None after a dry run, and on ranks above 0 of a torchrun, which do what rank 0 asks for.
    """
    if not launched():
        homes = Homes(config.model, config.placement, config.cluster, EngineSection(), ["actor"])
        homes.check()
        return _drive(config, method, homes)
    if config.placement.actor != "here":
        raise UserError("placement.actor: torchrun has started the workers already; leave the key out")
    with joined(config.model.device, config.cluster.deadline) as ranks:
        if ranks.leader:
            return _drive(config, method, nullcontext(ranks))
        ranks.follow()
    return None


def _drive(
    config: OfflineConfig, method: OfflineMethod[Any], opening: AbstractContextManager[Homes | Ranks]
) -> Path | None:
    if (model := check_out(config, method.title)) is not None:
        return model
    rows, eval_rows = load_data(config.data)
    tokenizer = load_tokenizer(config.model.model, trust_remote_code=config.model.trust_remote_code)
    limits = [read_limits(config.model.model, head=method.head, trust_remote_code=config.model.trust_remote_code)]
    examples, counts = method.load_examples(rows, tokenizer, limits)
    held_out: Seq[Any] = ()
    if eval_rows is not None:
        held_out, _ = method.load_examples(eval_rows, tokenizer, limits)
    inputs = digest_inputs({"data": rows, "eval_data": eval_rows}, models={"actor": config.model.model})
    check_out(config, method.title, inputs)
    if config.run.dry_run:
        print_plan(config, _uses(config, method.head == "scalar", counts, len(held_out)))
        return None
    order = Order(len(examples), config.run.seed)
    with opening as homes:
        say(f"loading {config.model.model}")
        trainer = homes.place("actor", method.build(optim_params(config.optim, total_steps=config.run.steps)))
        say(f"  {trainer.call('describe')}")

        def batch(positions: range) -> Batch:
            return method.batch([examples[i] for i in order.take(positions)])

        def evaluate(step: int) -> Metrics:
            if not held_out or not evaluation_due(config.run, config.data, step):
                return {}
            return {f"eval/{name}": value for name, value in trainer.call("evaluate", method.batch(held_out)).items()}

        roles = OfflineRoles(
            batch=batch,
            trainer=trainer,
            evaluate=evaluate,
        )
        with session(
            config, {"model": trainer}, title=method.title, leads=method.leads, counts=counts, inputs=inputs
        ) as started:
            Offline(steps=config.run.steps, batch_size=config.offline.batch_size).run(roles, started)
            return started.finish(trainer)


def _uses(config: OfflineConfig, scalar: bool, counts: Counts, held_out: int) -> dict[str, str]:
    epochs = config.run.steps * config.offline.batch_size / counts["kept"]
    workers = config.placement.workers("actor")
    section = config.model
    model = describe_source(section.model, scalar=scalar, trust_remote_code=section.trust_remote_code)
    model += f", {pick_device(section.device)}, {section.dtype}"
    return {
        "model": model + (f", split over {workers} workers" if workers else ""),
        "data": f"{describe_counts(counts)}, gone through {epochs:.2f} times in {config.run.steps} steps",
        "held out": f"{held_out} rows" if held_out else "none",
    }
