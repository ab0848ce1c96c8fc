"""The sections about held-out data. One key a field; its docstring is the key's help."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from os.path import expanduser

from tandem.config import PATH
from tandem.data.sources import Source, parse_sources, unweighted_sources
from tandem.errors import UserError, expect, needs

EVALUATED = ("eval_data",)
JUDGED = ("part", "judge of held-out samples")


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is held out of training, and when it is measured."""

    eval_data: tuple[str, ...] = field(default=(), metadata=PATH)
    """Held-out rows, named like --data, in one set or several: NAME=FILE, or a FILE that is its own name. Of a single
    FILE the metrics are eval/..., of others eval/NAME/.... Empty: no evaluation."""
    eval_split: str = field(default="test", metadata=needs(EVALUATED, ("part", "held-out dataset with splits")))
    """Split of --eval-data, for a dataset that has splits."""
    eval_every: int = field(default=50, metadata=needs(EVALUATED))
    """Steps between evaluations; the last step is evaluated too. 0: only the last."""
    max_eval_samples: int | None = field(default=None, metadata=needs(EVALUATED))
    """Rows read of each source of --eval-data, its first ones. None: all."""

    def __post_init__(self) -> None:
        expect(self, "files or names of datasets", all, "eval_data")
        expect(self, "0 or more", lambda value: value >= 0, "eval_every")
        expect(self, "1 or more", lambda value: value >= 1, "max_eval_samples")
        for text in self.sets.values():
            unweighted_sources("eval_data", text)

    @property
    def sets(self) -> dict[str, str]:
        """Where each held-out set is read from, by its name; the name of one that needs none is empty."""
        return named_sets(self.eval_data)

    @property
    def sources(self) -> list[Source]:
        """The sources of all sets."""
        return [one for text in self.sets.values() for one in parse_sources(text)]


@dataclass(frozen=True, kw_only=True)
class SampledEvaluationSection(EvaluationSection):
    """What is held out of training, when it is measured, and how it is sampled and judged."""

    eval_reward: tuple[str, ...] = field(default=(), metadata=PATH | needs(EVALUATED))
    """FILE.py:function that judges samples of --eval-data and is never trained on. Empty: the training rewards."""
    eval_samples: int = field(default=1, metadata=needs(EVALUATED))
    """Samples of each prompt of --eval-data."""
    eval_temperature: float | None = field(default=None, metadata=needs(EVALUATED, JUDGED))
    """Temperature of these samples. 0 is greedy. None: that of training."""
    eval_success: float | None = field(default=None, metadata=needs(EVALUATED, JUDGED))
    """The reward from which a sample is right: eval/pass@k is the chance that one of k samples of a prompt is. None:
    not reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "1 or more", lambda value: value >= 1, "eval_samples")
        expect(self, "0 or more", lambda value: value >= 0, "eval_temperature")
        if self.eval_samples > 1 and self.eval_temperature == 0:
            raise UserError("eval_samples: at --eval-temperature 0 all samples of a prompt are equal; give 1")


def named_sets(given: Seq[str]) -> dict[str, str]:
    """Held-out sets by name, from ``NAME=SOURCE`` or ``SOURCE``. Raises UserError where two have one name."""
    split = [re.fullmatch(r"(?:([\w.-]+)=)?(.+)", text, flags=re.DOTALL) for text in given]
    pairs = [(match[1] or "", expanduser(match[2])) for match in split if match]
    if len(pairs) > 1:
        pairs = [(name or own_name(source), source) for name, source in pairs]
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"eval_data: two sets are named {twice[0]!r}; give each a name of its own, as in math=a.jsonl")
    return dict(pairs)


def own_name(source: str) -> str:
    """What a set is called that is given no name: its file, without folder and ending."""
    last = re.split(r"[/\\@:]", source.rstrip("/"))[-1]
    return re.sub(r"[^\w.-]+", "_", re.sub(r"\.(jsonl|json|csv|parquet|arrow)$", "", last)) or "held_out"
