"""The sections that follow from the models which a method needs: what is loaded for each role, and where it lives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from tandem.config import section_class
from tandem.errors import UserError
from tandem.keys import A_MODEL, A_SHARE, AT_LEAST_0, MAY_CHANGE, PATH, Checked, needs
from tandem.methods.base import Need


@dataclass(frozen=True, kw_only=True)
class RolePlacement:
    """Which processes each role lives in, one process a GPU (or CPU)."""

    def __post_init__(self) -> None:
        for role in self.roles:
            value, words = getattr(self, role), self.words(role)
            if not (value in words or _is_count(value)):
                either = " or ".join(map(repr, words))
                raise UserError(f"placement.{role}: expected a number of processes or {either}, got {value!r}")
            self.home(role)

    @property
    def roles(self) -> list[str]:
        """The roles that can be placed."""
        return [f.name for f in fields(self)]

    def words(self, role: str) -> list[str]:
        """What may stand for a role besides a number."""
        return ["here"]

    def home(self, role: str) -> str:
        """The role whose processes ``role`` lives in: itself where it has its own."""
        seen = ["reward" if is_reward_model(role) else role]
        while (value := getattr(self, seen[-1])) in self.roles:
            if value in seen:
                raise UserError(f"placement.{role}: {' shares with '.join([*seen, value])}, so none has processes")
            seen.append(value)
        return seen[-1]

    def workers(self, role: str) -> int:
        """Worker processes that a role has of its own; 0 where it shares another's or is here."""
        value = getattr(self, role, "")
        return int(value) if _is_count(value) else 0

    def where(self, role: str) -> str:
        """For a person: what processes a role has of its own, and nothing where it has none."""
        count = self.workers(role)
        return f", {count} worker{'s' if count > 1 else ''} of its own" if count else ""

    def is_here(self, role: str) -> bool:
        """Whether the placement has the role and puts it into this process by name."""
        return getattr(self, role, None) == "here"


@dataclass(frozen=True, kw_only=True)
class UsePlacement(RolePlacement):
    """Which processes the sampler lives in, one process a GPU (or CPU)."""

    engine: str = field(default="here", metadata=MAY_CHANGE)
    """The sampler: 'here' (this process, no Ray), or a number of engines in processes of their own."""


@dataclass(frozen=True, kw_only=True)
class JudgePlacement(RolePlacement):
    """Which processes the reward model lives in, one process a GPU (or CPU)."""

    reward: str = field(default="here", metadata=needs(("part", "reward model")) | MAY_CHANGE)
    """The reward model: 'here', or the number of worker processes it is split over."""


@dataclass(frozen=True, kw_only=True)
class JudgedPlacement(JudgePlacement, UsePlacement):
    """Which processes the sampler and the reward model live in, one process a GPU (or CPU)."""


@dataclass(frozen=True, kw_only=True)
class Placement(RolePlacement):
    """Which processes each role lives in, one process a GPU (or CPU)."""

    actor: str = field(default="here", metadata=MAY_CHANGE)
    """The trainer: 'here' (this process, no Ray), or the number of worker processes it is split over."""

    def words(self, role: str) -> list[str]:
        if role == "actor":
            return ["here"]
        return ["actor"] if role == "engine" else [other for other in self.roles if other not in (role, "engine")]


@dataclass(frozen=True, kw_only=True)
class SamplingPlacement(Placement):
    """Which processes each role lives in, one process a GPU (or CPU)."""

    reward: str = field(default="actor", metadata=needs(("part", "reward model")) | MAY_CHANGE)
    """The reward model: a number, or the role whose processes it shares."""
    engine: str = field(default="actor", metadata=MAY_CHANGE)
    """The sampler: 'actor' takes turns on the actor's devices (shared), a number is so many engines apart (split)."""


def is_reward_model(role: str) -> bool:
    """Whether a role is that of one of the reward models, which live in one place (``RewardSection.models``)."""
    return re.fullmatch(r"reward(_\d+)?", role) is not None


def placement_class(base: type[Placement], models: Iterable[Need]) -> type[Placement]:
    """``base``, with a key for each model that a method may need."""
    keys: dict[str, tuple[Any, Any, str]] = {}
    for need in models:
        what = f"The trainer of the {need.role}" if need.trained else f"The frozen {need.role}"
        doc = f"{what}: a number of workers of its own, or the role whose processes it shares."
        keys[need.role] = str, field(default="actor", metadata=needs(("part", need.role)) | MAY_CHANGE), doc
    return section_class("Placement", keys, base)


@dataclass(frozen=True, kw_only=True)
class ModelsSection(Checked):
    """The models beside the policy."""

    def source(self, role: str) -> str | None:
        """The folder or hub name that is given for a role."""
        found: str | None = getattr(self, role)
        return found

    def learning_rate(self, role: str) -> float:
        """The learning rate of a role that is trained."""
        found: float = getattr(self, f"{role}_learning_rate")
        return found


@dataclass(frozen=True, kw_only=True)
class ReferenceModelsSection(ModelsSection):
    """The models beside the policy."""

    reference_every: int = field(default=0, metadata=AT_LEAST_0 | needs(("part", "reference")))
    """Steps from one refresh of the reference to the next: it becomes the policy of that step. 0: it stays."""
    reference_mix: float = field(default=1.0, metadata=A_SHARE | needs(("reference_every",)))
    """The policy's share in the refreshed reference, the rest being the reference so far. 1: all of it."""


def models_class(models: Iterable[Need]) -> type[ModelsSection]:
    """A key for the folder of each model that a method may need, and for the learning rate of one that is trained."""
    keys: dict[str, tuple[Any, Any, str]] = {}
    base = ReferenceModelsSection if any(need.role == "reference" for need in models) else ModelsSection
    for need in models:
        part = needs(("part", need.role))
        keys[need.role] = (
            (str, field(metadata=PATH | A_MODEL), need.doc)
            if need.required
            else (str | None, field(default=None, metadata=PATH | A_MODEL | part), need.doc)
        )
        if need.trained:
            doc = f"The learning rate of the {need.role}, which may be higher than the policy's."
            keys[f"{need.role}_learning_rate"] = (
                float,
                field(default=need.learning_rate, metadata=A_SHARE | part),
                doc,
            )
    return section_class("Models", keys, base)


def _is_count(value: str) -> bool:
    return value.isdigit() and int(value) >= 1
