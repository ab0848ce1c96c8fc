"""The sections about held-out data. One key a field; its docstring is the key's help."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from os.path import expanduser

from tandem.data.sources import DataSource, parse_sources, unweighted_sources
from tandem.errors import UserError
from tandem.keys import AT_LEAST_0, AT_LEAST_1, MAY_CHANGE, PATH, Checked, must, needs
from tandem.runs.goals import Goal, Goals, Threshold

EVALUATED = ("eval_data",)
JUDGED = ("part", "judge of held-out samples")


@dataclass(frozen=True, kw_only=True)
class EvaluationSection(Checked):
    """What is held out of training, and when it is measured."""

    eval_data: tuple[str, ...] = field(default=(), metadata=must("files or names of datasets", all) | PATH)
    """Held-out rows, named like --data, in one set or several: NAME=FILE, or a FILE that is its own name. Of a single
    FILE the metrics are eval/..., of others eval/NAME/.... Empty: no evaluation."""
    eval_split: str = field(default="test", metadata=needs(EVALUATED, ("part", "held-out dataset with splits")))
    """Split of --eval-data, for a dataset that has splits."""
    eval_every: int = field(default=50, metadata=AT_LEAST_0 | needs(EVALUATED))
    """Steps between evaluations; the last step is evaluated too. 0: only the last."""
    max_eval_samples: int | None = field(default=None, metadata=AT_LEAST_1 | needs(EVALUATED))
    """Rows read of each source of --eval-data, its first ones. None: all."""
    keep_best: str | None = field(default=None, metadata=needs(EVALUATED))
    """Metric, as eval/reward, whose best model so far stays in OUT/best, and its checkpoint. A sign before a name that
    does not say which is better: - for less, + for more."""
    patience: int = field(default=0, metadata=AT_LEAST_0 | needs(("keep_best",)) | MAY_CHANGE)
    """Evaluations in which the metric of --keep-best has got no better after which the run ends. 0: it goes on."""
    stop_when: str | None = field(default=None, metadata=needs(EVALUATED) | MAY_CHANGE)
    """Ends the run after an evaluation of which this holds, as 'eval/accuracy>=0.95'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.sets.values():
            unweighted_sources("eval_data", text)
        prefixes = ["eval/"] if "" in self.sets else [f"eval/{name}/" for name in self.sets]
        for key, metric in self.goals.metrics.items():
            # As far as its name says.
            if not metric.startswith(tuple(prefixes)):
                wanted = " or ".join(f"{prefix}..." for prefix in prefixes)
                raise UserError(f"{key}: expected a held-out metric, {wanted}, got {metric}")

    @property
    def sets(self) -> dict[str, str]:
        """Where each held-out set is read from, by its name; the name of one that needs none is empty."""
        return named_sets(self.eval_data)

    @property
    def sources(self) -> list[DataSource]:
        """The sources of all sets."""
        return [one for text in self.sets.values() for one in parse_sources(text)]

    @property
    def goals(self) -> Goals:
        """What is wanted of the metrics, where anything is held out."""
        if not self.eval_data:
            return Goals()
        return Goals(
            keep_best=Goal.parse(self.keep_best) if self.keep_best is not None else None,
            stop_when=Threshold.parse(self.stop_when) if self.stop_when is not None else None,
            patience=self.patience,
        )


@dataclass(frozen=True, kw_only=True)
class SampledEvaluationSection(EvaluationSection):
    """What is held out of training, when it is measured, and how it is sampled and judged."""

    eval_reward: tuple[str, ...] = field(default=(), metadata=PATH | needs(EVALUATED))
    """FILE.py:function that judges samples of --eval-data and is never trained on. Empty: the training rewards."""
    eval_samples: int = field(default=1, metadata=AT_LEAST_1 | needs(EVALUATED))
    """Samples of each prompt of --eval-data."""
    eval_temperature: float | None = field(default=None, metadata=AT_LEAST_0 | needs(EVALUATED, JUDGED))
    """Temperature of these samples. 0 is greedy. None: that of training."""
    eval_success: float | None = field(default=None, metadata=needs(EVALUATED, JUDGED))
    """The reward from which a sample is right: eval/pass@k is the chance that one of k samples of a prompt is. None:
    not reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
