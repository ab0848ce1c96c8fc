"""``tandem sft``: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any

from tandem.assembly.configs import SFTConfig
from tandem.assembly.models import policy_trainer
from tandem.assembly.offline import OfflineMethod, run_offline
from tandem.assembly.wiring import following, tell_end, tokenizing
from tandem.batch import Batch
from tandem.data.packing import pack, stamp_weights
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts, build_sequences
from tandem.types import Limits, Sequence


def train(config: SFTConfig) -> Path | None:
    """Fine-tunes and returns the folder of the trained model; None after a dry run."""

    def examples(rows: Rows, tokenizer: Any, limits: Seq[Limits]) -> tuple[list[Sequence], Counts]:
        data = config.data
        with tokenizing(rows) as on_progress:
            return build_sequences(
                rows,
                tokenizer,
                data.max_length,
                data.long_rows,
                train_on=config.sft.train_on,
                limits=limits,
                on_progress=on_progress,
            )

    def batch(sequences: Seq[Sequence]) -> Batch:
        return stamp_weights(pack(sequences), config.objective.aggregation)

    method = OfflineMethod(
        title="SFT",
        head="lm",
        leads=config.objective.leads,
        build=lambda optim: partial(
            policy_trainer, section=config.model, loss=config.objective.loss, optim=optim, options={}
        ),
        load_examples=examples,
        batch=batch,
    )
    return run_offline(config, method)


def run(config: SFTConfig) -> int:
    """The command."""
    if model := train(config):
        out = Path(config.run.out)
        tell_end(
            out,
            config.objective.leads,
            following("rm", out, model=model, data="pairs.jsonl", steps=500),
            following("grpo", out, model=model, reward="check.py:right", data="prompts.jsonl", steps=200),
        )
    return 0
