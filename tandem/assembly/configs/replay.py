"""The config of ``tandem replay``: that of the run which is trained again. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from tandem.assembly.configs.evaluation_sections import SampledEvaluationSection
from tandem.assembly.configs.methods import SamplesConfig, class_over
from tandem.assembly.configs.role_sections import is_reward_model
from tandem.assembly.configs.sections import EngineSection
from tandem.config import describe, given_values, key_names, load_config, settings, with_keys
from tandem.errors import UserError
from tandem.flags import flag_of
from tandem.keys import AT_LEAST_1, MAY_CHANGE, PATH, Checked
from tandem.methods.table import SAMPLES, method_class
from tandem.runs.identity import CONFIG, IDENTITY, read_identity


@dataclass(frozen=True, kw_only=True)
class ReplaySection(Checked):
    """The run that is trained again."""

    replayed: str = field(metadata=PATH)
    """Folder of the run, which was recorded: the first word of the command."""
    last_step: int | None = field(default=None, metadata=AT_LEAST_1 | MAY_CHANGE)
    """The last step that is trained again. None: the last one recorded."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(SamplesConfig):
    """A run that trains on what another has recorded. What only samples and judges is not there."""

    replay: ReplaySection

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.run.out).resolve() == Path(self.replay.replayed).resolve():
            raise UserError(f"out: {self.run.out} is the run that is replayed; give another folder")
        there = {"engine", "reward"} & {*self.placement.roles}
        for name, value in (
            ("evaluation", SampledEvaluationSection()),
            ("engine", EngineSection()),
            ("placement", with_keys(self.placement, **dict.fromkeys(there, "actor"))),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def inherited(cls) -> Collection[str]:
        """The keys that are as the replayed run had them, with an effect or without."""
        return fixed_keys(cls)

    @property
    def sources(self) -> dict[str, str]:
        return {role: source for role, source in super().sources.items() if not is_reward_model(role)}

    @property
    def sampler(self) -> EngineSection | None:
        return None

    @property
    def length(self) -> int | None:
        return self.replay.last_step


HELP = """\
Train again on what a run has recorded (--record), without an engine and rewards: to the same parameters.

Its config is the run's. What does not change what is trained on may be given anew, to see what it does to the same
samples: optimizer, the method's knobs, minibatches, precision, device, placement. tandem replay RUN --help lists
these keys with their values. Held-out data are not evaluated.
Example: tandem replay runs/grpo --out runs/again
Example: tandem replay runs/grpo --out runs/slower --learning-rate 3e-7 --last-step 100

usage: tandem replay RUN --out NEW [--last-step STEP] [--config FILE.yaml] [--key value ...]"""
"""What --help says, before the keys of a run."""
TRAINED_ON = ("data", "sampling", "reward", "schedule")
"""Sections whose keys say what was sampled and how it was judged: they are as the run had them."""
OF_THE_RUN = {"replayed", "seed", "steps", "epochs"}
"""4 keys of other sections that are, too."""
NOT_THERE = ("evaluation", "engine")
"""Sections of what a replay does not have."""
OF_NONE = {"accept_changed", "placement.engine", "placement.reward"}
"""3 keys of other sections that have no effect in a replay."""


def idle_keys(cls: type[ReplayConfig]) -> set[str]:
    """The keys of a replay's config that have no effect."""
    return _keys(cls, *NOT_THERE) | OF_NONE


def fixed_keys(cls: type[ReplayConfig]) -> dict[str, str]:
    """The keys of a replay's config that cannot be given, each with the reason."""
    recorded = "a replay trains on what was recorded, with this key as its run had it"
    nothing = "a replay samples and judges nothing, so it has no effect"
    return dict.fromkeys(_keys(cls, *TRAINED_ON) | OF_THE_RUN, recorded) | dict.fromkeys(idle_keys(cls), nothing)


def _keys(cls: type[ReplayConfig], *sections: str) -> set[str]:
    hints = get_type_hints(cls)
    return {f"{name}.{key}" if name == "engine" else key for name in sections for key in key_names(hints[name])}


def replay_config(words: list[str]) -> tuple[type[Any], list[str]]:
    """The config of ``tandem replay RUN``, and its flags, before which the run's own config is read.

    Raises UserError where ``RUN`` is no run on samples, for a key that must be as it was in the run, and without an
    ``--out``; SystemExit after ``--help``.
    """
    helped = "--help" in words or "-h" in words
    if not words or words[0].startswith("-"):
        if helped:
            print(HELP)
            raise SystemExit(0)
        raise UserError("replay: which run? its folder comes first, as in: tandem replay runs/grpo --out runs/again")
    run, *flags = words
    folder = Path(run).expanduser()
    cls = class_over(ReplayConfig, method_of(folder))
    if helped:
        print(f"{HELP}\n\nBeside --out, --resume, --overwrite and --dry-run may be given,")
        print(f"which {run} has so:\n\n{describe(stored_config(folder, cls), {*fixed_keys(cls), 'out'})}")
        raise SystemExit(0)
    in_files, in_flags = given_values(cls, flags)
    # A file may be the config of a replay, which says what its run's does, and which of it has no effect.
    as_it_was = given_values(cls, _as_stored(folder))[0], settings(stored_config(folder, cls))
    others = [name for name, value in in_files.items() if not any(name in s and s[name] == value for s in as_it_was)]
    fixed = fixed_keys(cls)
    for name in [*in_flags, *others]:
        if name in fixed:
            raise UserError(f"{flag_of(name) if name in in_flags else name}: {fixed[name]}; leave it out")
    if "out" not in in_files | in_flags:
        raise UserError("missing --out (Folder of the run: its config, and all that it writes)")
    return cls, [*_as_stored(folder), *flags]


def stored_config(run: Path, cls: type[ReplayConfig]) -> ReplayConfig:
    """That of a replay of the run in a folder, with nothing given anew."""
    return load_config(cls, [*_as_stored(run), "--out", str(run / "replay")])


def _as_stored(run: Path) -> list[str]:
    return ["--config", str(run / CONFIG), f"--replayed={run}"]


def method_of(run: Path) -> str:
    """The command of the run in a folder. Raises UserError where it is no run on samples."""
    if missing := [name for name in (IDENTITY, CONFIG) if not (run / name).exists()]:
        raise UserError(f"{run}: not the folder of a run: it has no {missing[0]}")
    title = read_identity(run)["method"]
    found = [name for name in SAMPLES if method_class(name).title == title]
    if not found:
        raise UserError(f"{run}: a run of {title}, which samples nothing; --config {run / CONFIG} repeats it")
    return found[0]
