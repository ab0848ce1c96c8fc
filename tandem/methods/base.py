"""What a method is: frozen knobs, what it reads, the models it needs, and its losses. One file each in this room."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from tandem.batch import Asks, Batch, Outputs, TokenLoss, send
from tandem.keys import Checked, needs
from tandem.lazy import torch
from tandem.roles import LossFn, Metrics
from tandem.types import Aggregation, Example, Group, Sequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A method's items are the rows of a dataset: demonstrations (``Sequence``), preferences (``PreferencePair``),
    labelled answers (``LabelledAnswer``) or answers in labelled steps (``Solution``).
    Text is no rows: it is read as windows (``Sequence``)."""

    kind: Literal["demonstrations", "preferences", "unpaired", "steps", "text"]
    at_least: int = 1
    """Fewest rows of a step that the method can learn from."""


@dataclass(frozen=True)
class Samples:
    """A method's items are groups of samples of one prompt."""

    at_least: int = 1
    """Fewest samples of a prompt that the method can learn from."""
    rewards: Literal["required", "optional"] = "required"
    """Whether something must judge the samples. Where they are not judged, each has a reward of 0."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """A model that a method needs beside the policy. Its keys in the config and its placement follow from this."""

    role: str
    """Its name, which is that of its key, too; what it says about a batch stands in ``Batch.seen`` under it."""
    doc: str
    """The help of that key: what the folder is, and what is taken where the key is not given."""
    head: Literal["lm", "scalar"] = "lm"
    sources: tuple[str, ...] = ("model",)
    """Keys whose folder is loaded where its own key names none: the first that is given."""
    required: bool = False
    """Whether its own key must be given: nothing else makes sense."""
    trained: bool = False
    """Whether it is trained with the policy, by ``losses()[role]``. Otherwise it is frozen."""
    learning_rate: float = 1e-5
    """The default learning rate of one that is trained."""


REFERENCE = Need(
    role="reference",
    doc="Folder of the frozen reference that the KL is taken to. None: the model as it was at the start.",
)

TEACHER = Need(
    role="teacher",
    doc="Folder of the frozen teacher, or its name on the hub. It has the tokenizer of the model.",
    required=True,
)


@dataclass(kw_only=True)
class Estimate:
    """A batch with what the losses read, the method's next state, and metrics."""

    batch: Batch
    state: dict[str, float]
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(Checked):
    """A way to train a policy. The object never changes: what does (a KL controller) goes through ``estimate``.

    A simple method on samples defines ``advantages`` (one number a sample) and ``loss``; one that needs per-token
    advantages overrides ``estimate``; one on rows defines ``loss`` alone.
    """

    reads: ClassVar[Rows | Samples]
    title: ClassVar[str]
    """What a person calls it: on the display, in errors."""
    about: ClassVar[str] = ""
    """What it does, in a line; of a method on rows, with their columns and an example, all of its command's help."""
    example: ClassVar[str] = "--reward check.py:right"
    """What the example of a method on samples has beside its model and its prompts."""
    head: ClassVar[Literal["lm", "scalar"]] = "lm"
    """The policy's head."""
    models: ClassVar[tuple[Need, ...]] = ()
    """Every model that it needs with some setting of its knobs (``needs``: with these)."""
    learning_rate: ClassVar[float] = 1e-6
    """The default learning rate of the policy."""
    leads: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that say how a run of this method is doing, the first one first: what the display shows."""

    pairwise: ClassVar[bool] = False
    """Whether its losses are numbers of pairs or of whole answers, and not of tokens: one for each unit of the batch,
    at the last token of its first segment (``Batch.of_units``)."""

    aggregation: Aggregation = field(default="token", metadata=needs(("part", "losses of tokens")))
    """Which mean the loss is: over tokens, over sequences of their token means, or per sequence over a fixed length."""

    @classmethod
    def help_of(cls, command: str) -> str:
        """What the help of its command begins with: what it does, its rows, an example."""
        if isinstance(cls.reads, Rows):
            return cls.about
        return (
            f"{cls.about}\n\n"
            "Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.\n"
            f"Example: tandem {command} --model runs/sft/model {cls.example} --data prompts.jsonl\n"
            f"--out runs/{command} --steps 200"
        )

    @property
    def samples(self) -> Samples:
        """What it asks of samples with these knobs, where it learns from samples."""
        return cast(Samples, self.reads)

    def needs(self) -> tuple[Need, ...]:
        """The models that it needs beside the policy."""
        return self.models

    def needs_model(self, role: str) -> bool:
        """Whether one of them is the ``role``."""
        return any(need.role == role for need in self.needs())

    @property
    def asks(self) -> Asks:
        """What it asks of the policy's forward in training, at any temperature."""
        return Asks(entropy=isinstance(self.reads, Samples))

    def asks_of(self, role: str, temperature: float = 1.0) -> Asks:
        """What it asks of the policy's forward (``actor``), or a model's that it needs, at the run's temperature."""
        return replace(self.asks if role == "actor" else Asks(), temperature=temperature)

    @property
    def needs_old_logp(self) -> bool:
        """Whether ``estimate`` reads ``batch.proximal_logp_T``, not a loss alone."""
        return not self.pairwise and any(not need.trained for need in self.needs())

    def initial_state(self) -> dict[str, float]:
        """What ``estimate`` is given at the first step."""
        return {}

    def keep(self, item: Any) -> bool:
        """Whether an item is trained on. One that is not is replaced by the next of the source."""
        return True

    def examples(self, item: Any) -> Seq[Example]:
        """What of an item is packed into the batch: a row itself, a group's usable rollouts."""
        return item.usable if isinstance(item, Group) else [item]

    def aside(self, items: Seq[Any], longest: int | None) -> Seq[Sequence]:
        """Sequences of at most ``longest`` tokens that the policy and the other models see beside the batch.

        What they say of them stands in ``Batch.aside`` when ``estimate`` is called. Raises UserError where the items
        cannot give them.
        """
        return []

    def measured(self, metrics: Metrics) -> Metrics:
        """What follows from the means of its own metrics, beside them."""
        return {}

    def notes(self, items: Seq[Any]) -> Seq[str]:
        """What a person should know of all the rows that it is going to learn from, a line each."""
        return []

    def advantages(self, group: Group) -> list[float]:
        """One advantage for each usable rollout of the group, spread over its trainable tokens."""
        raise TypeError(f"{type(self).__name__} defines neither advantages() nor estimate()")

    def estimate(self, items: Seq[Any], batch: Batch, state: dict[str, float]) -> Estimate:
        """Fills what the losses read: ``advantage_T`` of samples. ``batch`` holds the items' examples, in order."""
        if isinstance(self.reads, Rows):
            return Estimate(batch=batch, state=state)
        advantage_T = spread([a for group in items for a in self.advantages(group)], batch)
        return Estimate(batch=replace(batch, advantage_T=advantage_T), state=state)

    def loss(self, out: Outputs, batch: Batch) -> TokenLoss:
        """The policy's unreduced loss."""
        raise TypeError(f"{type(self).__name__} does not define loss()")

    def check(self, steps: int) -> None:
        """Raises UserError where a run of so many steps is too short for these knobs."""
        return None

    def trains(self, state: dict[str, float]) -> tuple[str, ...]:
        """The roles that a step trains which begins with this state: all that have a loss, or some of them."""
        return tuple(self.losses())

    def losses(self) -> dict[str, LossFn]:
        """The loss of each model that is trained, by role; the policy is the ``actor``."""
        return {"actor": self.loss}


def spread(advantages: Seq[float], batch: Batch) -> Tensor:
    """[T]: one number a sample, at each of its trainable tokens."""
    advantage_T = torch.tensor(advantages, dtype=torch.float32).repeat_interleave(batch.bounds.diff())
    return send(advantage_T, batch.token_ids_T.device) * batch.trainable_T


def at_last_trainable(x_S: Tensor, batch: Batch) -> Tensor:
    """[T]: each segment's number at its last trainable token, 0 elsewhere."""
    segment_T = batch.segment_T
    index_T = torch.arange(batch.tokens, device=x_S.device).masked_fill(~batch.trainable_T, -1)
    last_S = index_T.new_full((batch.segments,), -1).scatter_reduce(0, segment_T, index_T, "amax")
    return torch.where(batch.trainable_T & (index_T == last_S[segment_T]), x_S[segment_T], 0.0)
