"""Training on a fixed dataset: what ``tandem sft`` and ``tandem rm`` share."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tandem.cli.sections import DataSection, ModelSection, OptimSection, RunSection
from tandem.cli.wiring import (
    check_out,
    describe_counts,
    describe_model,
    due_evaluation,
    load_data,
    optim_params,
    print_plan,
    session,
)
from tandem.data.order import Order
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts
from tandem.errors import expect
from tandem.models.forward import LoadedModel
from tandem.roles import Metrics, Objective
from tandem.schedules.offline import Offline, OfflineRoles
from tandem.training.trainer import LocalTrainer
from tandem.types import Batch

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class OfflineSection:
    """How a fixed dataset is gone through."""

    batch_size: int = 32
    """Rows in an optimizer step, over all devices."""

    def __post_init__(self) -> None:
        expect(self, "1 or more", lambda value: value >= 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What every offline command's config has."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optim: OptimSection
    offline: OfflineSection


@dataclass(frozen=True, kw_only=True)
class OfflineMethod(Generic[Example]):
    """What differs between offline methods: how to load the model and the rows, how to batch them, and the loss."""

    title: str
    objective: Objective
    load_model: Callable[[], LoadedModel]
    load_examples: Callable[[Rows, Any], tuple[Seq[Example], Counts]]
    """(rows, tokenizer) → examples, and how many rows were read, truncated and dropped."""
    batch: Callable[[Seq[Example]], Batch]
    """Packed, with its weights stamped."""


def run_offline(config: OfflineConfig, method: OfflineMethod[Any]) -> Path | None:
    """Trains and exports to ``<out>/model``, which is returned. None after a dry run."""
    check_out(config.run)
    rows, eval_rows = load_data(config.data)
    model = method.load_model()
    examples, counts = method.load_examples(rows, model.tokenizer)
    held_out: Seq[Any] = ()
    if eval_rows is not None:
        held_out, _ = method.load_examples(eval_rows, model.tokenizer)
    if config.run.dry_run:
        print_plan(config, _uses(config, model, counts, len(held_out)))
        return None
    trainer = LocalTrainer(
        model,
        method.objective.loss,
        optim_params(config.optim, total_steps=config.run.steps),
        token_budget=config.model.token_budget,
    )
    order = Order(len(examples), config.run.seed)

    def batch(step: int) -> Batch:
        return method.batch([examples[i] for i in order.batch(step, config.offline.batch_size)])

    def evaluate() -> Metrics:
        return trainer.evaluate(method.batch(held_out))

    roles = OfflineRoles(
        batch=batch,
        trainer=trainer,
        evaluate=due_evaluation(config.run, config.data, evaluate if held_out else None),
    )
    with session(config, config.run, {"model": trainer}, title=method.title, counts=counts) as started:
        Offline(steps=config.run.steps).run(roles, started)
        return started.finish(trainer)


def _uses(config: OfflineConfig, model: LoadedModel, counts: Counts, held_out: int) -> dict[str, str]:
    epochs = config.run.steps * config.offline.batch_size / counts["kept"]
    return {
        "model": describe_model(model),
        "data": f"{describe_counts(counts)}, gone through {epochs:.2f} times in {config.run.steps} steps",
        "held out": f"{held_out} rows" if held_out else "none",
    }
