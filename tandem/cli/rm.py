"""``tandem rm``: reward models from preferences."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any

from tandem.assembly.configs import RMConfig
from tandem.assembly.models import scalar_trainer
from tandem.assembly.offline import OfflineMethod, run_offline
from tandem.assembly.wiring import following, tell_end, tokenizing
from tandem.batch import Batch
from tandem.data.packing import pack_pairs, stamp_pair_weights
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts, build_pairs
from tandem.errors import UserError
from tandem.models.limits import read_limits
from tandem.types import Limits, PreferencePair


def train(config: RMConfig) -> Path | None:
    """Trains and returns the folder of the reward model; None after a dry run."""

    def examples(rows: Rows, tokenizer: Any, limits: Seq[Limits]) -> tuple[list[PreferencePair], Counts]:
        data = config.data
        with tokenizing(rows) as on_progress:
            return build_pairs(rows, tokenizer, data.max_length, data.long_rows, limits=limits, on_progress=on_progress)

    def batch(pairs: Seq[PreferencePair]) -> Batch:
        return stamp_pair_weights(pack_pairs(pairs))

    method = OfflineMethod(
        title="reward model",
        head="scalar",
        leads=config.objective.leads,
        build=lambda optim: partial(
            scalar_trainer,
            section=config.model,
            source=config.model.model,
            new_head="random",
            seed=config.run.seed,
            loss=config.objective.loss,
            optim=optim,
        ),
        load_examples=examples,
        batch=batch,
    )
    return run_offline(config, method)


def run(config: RMConfig) -> int:
    """The command."""
    if model := train(config):
        out = Path(config.run.out)
        tell_end(
            out,
            config.objective.leads,
            following("ppo", out, model=_policy(config), reward_model=model, data="prompts.jsonl", steps=200),
        )
    return 0


def _policy(config: RMConfig) -> str:
    """What PPO could improve against this model: the one that it began from, unless that has no language-model head."""
    section = config.model
    try:
        read_limits(section.model, head="lm", trust_remote_code=section.trust_remote_code)
    except UserError:
        return str(Path(config.run.out).with_name("sft") / "model")
    return section.model
