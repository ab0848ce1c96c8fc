"""``tandem sft``: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tandem.cli.build import policy_trainer
from tandem.cli.offline import OfflineConfig, OfflineMethod, run_offline
from tandem.cli.wiring import tokenizing
from tandem.config import load_config
from tandem.data.packing import pack, stamp_weights
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts, build_sequences
from tandem.objectives.sft import SFT
from tandem.types import Batch, Sequence


@dataclass(frozen=True, kw_only=True)
class SFTSection:
    """What of a row is learned."""

    train_on: Literal["completion", "all"] = "completion"
    """The completion or the assistant's turns only, or every token. Rows with only 'text' are learned whole."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Fine-tune a causal LM on demonstrations.

    Rows: text, messages, or prompt and completion (strings or lists of messages), as in TRL.
    Example: tandem sft --model ./base --data demos.jsonl --out runs/sft --steps 500 --learning-rate 1e-5
    """

    sft: SFTSection = field(default_factory=SFTSection)
    objective: SFT = field(default_factory=SFT)


def train(config: SFTConfig) -> Path | None:
    """Fine-tunes and returns the folder of the trained model; None after a dry run."""

    def examples(rows: Rows, tokenizer: Any) -> tuple[list[Sequence], Counts]:
        data = config.data
        with tokenizing(rows) as on_progress:
            return build_sequences(
                rows,
                tokenizer,
                data.max_length,
                data.long_rows,
                train_on=config.sft.train_on,
                on_progress=on_progress,
            )

    def batch(sequences: Seq[Sequence]) -> Batch:
        return stamp_weights(pack(sequences), config.objective.aggregation)

    method = OfflineMethod(
        title="SFT",
        build=lambda optim: partial(
            policy_trainer, section=config.model, loss=config.objective.loss, optim=optim, options={}
        ),
        load_examples=examples,
        batch=batch,
    )
    return run_offline(config, method)


def run(argv: list[str]) -> int:
    """The command."""
    train(load_config(SFTConfig, argv, prog="tandem sft"))
    return 0
