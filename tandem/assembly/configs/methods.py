"""The config of each method's command. Nothing here imports torch, so ``--help`` and a mistyped flag come at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, cast

from tandem.assembly.configs.evaluation_sections import EvaluationSection, SampledEvaluationSection
from tandem.assembly.configs.role_sections import (
    ModelsSection,
    Placement,
    ReferenceModelsSection,
    RolePlacement,
    SamplingPlacement,
    models_class,
    placement_class,
)
from tandem.assembly.configs.sections import (
    FULL_TUNING,
    ClusterSection,
    ColumnsSection,
    DataSection,
    EngineSection,
    LoraSection,
    ModelSection,
    OptimSection,
    RewardSection,
    RowsSection,
    RunSection,
    SamplingSection,
    ScheduleSection,
    StepSection,
    as_adapters,
    judged_by_its_data,
)
from tandem.config import key_names, load_config, section_class, settings
from tandem.errors import UserError, listed
from tandem.flags import suggest
from tandem.keys import PREFIXED
from tandem.methods.base import Method, Rows
from tandem.methods.table import METHODS, method_class
from tandem.models.lora.folder import adapter_folder, base_of, have_one_base
from tandem.models.quantized.folder import quantized_kind
from tandem.workers.launched import launched

Base = TypeVar("Base", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run's config has. ``config_class`` adds the method's knobs and the models that it needs."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optim: OptimSection
    method: Method
    models: ModelsSection
    placement: Placement
    lora: LoraSection = field(default_factory=LoraSection, metadata=PREFIXED)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    def __post_init__(self) -> None:
        folder = adapter_folder(self.model.model)
        if folder is not None:
            for key, value in as_adapters(folder).items():
                if (given := getattr(self.lora, key)) != value:
                    raise UserError(
                        f"lora.{key}: the adapters in {self.model.model} have {value}, got {given}; leave it out, or "
                        "merge them into their base with 'tandem export' and put new ones on that"
                    )
        if self.lora.on and self.optim.optimizer == "adafactor":
            raise UserError(
                "optimizer: adafactor's steps are shares of the weights, and those of adapters begin at 0, where they "
                "would stay; take adamw, adamw8bit or muon"
            )
        if self.lora.on and self.following is not None and not self.is_view("reference"):
            raise UserError(
                "reference_every: the reference of adapters follows them on the actor's own base; leave out "
                "--reference and --placement.reference, or --reference-every"
            )
        if self.quantized is not None:
            self._require_quantizable()
        if self.lora.on and self.lora.share_critic and self.method.needs_model("critic"):
            self._require_shared("critic")

    @property
    def quantized(self) -> str | None:
        """How the linear layers of the policy's base are kept, where in few bits."""
        # Without adapters the key has no effect, which is said elsewhere.
        kind, asked = quantized_kind(self.model.model), self.lora.quantize if self.lora.on else "none"
        if kind is not None and asked not in ("none", kind):
            raise UserError(
                f"lora.quantize: the weights in {self.model.model} are {kind} already, got {asked}; leave it out, or "
                "give the model that they were made of"
            )
        return kind or (None if asked == "none" else asked)

    def _require_quantizable(self) -> None:
        """Raises UserError for what a base in few bits cannot do."""
        if not self.lora.on:
            raise UserError(
                f"model: the weights in {self.model.model} are in few bits ({self.quantized}), and only adapters can "
                "be trained on them: --lora.rank 32"
            )
        reference = self.method.needs_model("reference") and not self.is_view("reference")
        wrong = {
            "lora.dora": self.lora.dora and "the lengths of its rows are those of a whole weight; leave it out",
            "offload": self.model.offload == "parameters"
            and "its layers stay on their device; leave it at none or optimizer",
            "placement.reference": reference
            and self.sources["reference"] == self.model.model
            and "its reference is the policy without adapters, in the same place; leave it out",
        }
        for key, why in wrong.items():
            if why:
                raise UserError(f"{key}: the base is in few bits (lora.quantize {self.quantized}), and {why}")

    def _require_shared(self, role: str) -> None:
        """Raises UserError where a trained model cannot be on the policy's base."""
        source, base = self.sources[role], base_of(self.model.model)
        home, workers = self.placement.home(role), self.placement.workers("actor")
        reasons = [
            (
                not have_one_base(source, base),
                f"the {role} begins with {source}, which is not on the policy's base, {base}; give --{role} "
                f"{self.model.model}, or adapters of that base",
            ),
            (
                home != self.placement.home("actor"),
                f"the {role} lives with the {home}, and what it shares is memory; give placement.{role} 'actor'",
            ),
            (
                workers > 1,
                f"the policy is split over {workers} workers, each with slices of the layers; give it one process, or "
                "leave this out",
            ),
            (
                self.model.offload == "parameters",
                "with offload 'parameters' layers come and go by themselves; leave one of them out",
            ),
        ]
        for there, reason in reasons:
            if there:
                raise UserError(f"lora.share_critic: {reason}")

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that follow from keys that are given: what a folder of adapters has, and their learning rates."""
        folder = adapter_folder(given.get("model", ""))
        found = {} if folder is None else {f"lora.{key}": value for key, value in as_adapters(folder).items()}
        if folder is not None:
            found["lora.quantize"] = folder.quantized
        if (found | dict(given)).get("lora.rank", 0):
            method = next(f.default_factory for f in fields(cls) if f.name == "method")
            found["learning_rate"] = adapter_rate(cast(type[Method], method).learning_rate)
            for need in cast(type[Method], method).models:
                if need.trained:
                    found[f"{need.role}_learning_rate"] = adapter_rate(need.learning_rate)
        return found

    @staticmethod
    def owners(key: str) -> list[str]:
        """The methods whose configs have this key."""
        return [name for name in METHODS if key in key_names(config_class(name))]

    @property
    def sources(self) -> dict[str, str]:
        """The models of the run by role, in the order in which they are loaded, and where each is loaded from."""
        given = settings(self)
        places = {"actor": self.model.model} | {
            need.role: self.models.source(need.role)
            or next(found if isinstance(found, str) else found[0] for key in need.sources if (found := given.get(key)))
            for need in self.method.needs()
        }
        return self.model.sources_of(places)

    @property
    def items_per_step(self) -> int:
        """Rows, or prompts, in a step."""
        raise TypeError(type(self).__name__)

    def is_view(self, role: str) -> bool:
        """Whether a frozen model is the policy as it began, in its processes: with adapters it needs no second copy."""
        need = next((need for need in self.method.needs() if need.role == role), None)
        if need is None or need.trained or not self.lora.on:
            return False
        asks = self.method.asks_of(role)
        same = self.sources[role] == self.model.model and need.head == self.method.head
        return same and self.placement.home(role) == "actor" and not (asks.states or asks.top_k)

    def is_shared(self, role: str) -> bool:
        """Whether a trained model is on the policy's base."""
        return role == "critic" and self.lora.share_critic

    @property
    def leads(self) -> tuple[str, ...]:
        """Metrics that say how the run is doing, the first one first."""
        return self.method.leads

    @property
    def held_out_judge(self) -> str:
        """Who judges held-out samples, where that is somebody else than in training."""
        return ""

    def steps_over(self, size: int) -> int:
        """The run's steps with a dataset of ``size`` rows: as given, or whole ones for at least so many epochs."""
        if self.run.steps is not None:
            return self.run.steps
        return max(1, math.ceil(Fraction(str(self.run.epochs)) * size / self.items_per_step))

    @property
    def sampler(self) -> EngineSection | None:
        """What samples; None where nothing does."""
        return None

    @property
    def length(self) -> int | None:
        """The step after which it ends; None where that is not known before its data are read."""
        return self.run.steps

    @property
    def following(self) -> ReferenceModelsSection | None:
        """How the reference follows the policy, where there is one that does."""
        section = self.models
        if not isinstance(section, ReferenceModelsSection) or not self.method.needs_model("reference"):
            return None
        return section if section.reference_every > 0 else None

    def idle_for(self, steps: int) -> list[str]:
        """The keys that a run of so many steps is too short for, and why, a line each."""
        found, follows, evaluation = [], self.following, self.evaluation
        if follows is not None and follows.reference_every >= steps:
            found.append(
                f"reference_every: {follows.reference_every} steps are never over before the last of {steps}, so the "
                "reference stays as it is"
            )
        warmup = warmup_of(self.optim, steps)
        if self.optim.lr_schedule != "constant" and warmup >= steps:
            found.append(f"lr_schedule: the warmup takes all {steps} steps, so nothing is {self.optim.lr_schedule}")
        elif self.optim.warmup_steps >= 1 and warmup >= steps:
            found.append(f"learning_rate: the warmup takes all {steps} steps, so the rate never rises to it")
        every = evaluation.eval_every
        if evaluation.goals.patience > ((steps - 1) // every if every else 0):
            found.append(f"patience: {evaluation.patience} evaluations are never over before the last of {steps} steps")
        return found

    @property
    def notes(self) -> list[str]:
        """What a person should know of its settings, a line each."""
        rates = {"": (self.method.learning_rate, self.optim.learning_rate)} | {
            f" of the {need.role}": (need.learning_rate, self.models.learning_rate(need.role))
            for need in self.method.needs()
            if need.trained
        }
        return [
            f"adapters{whose}: learning rate {now:g}, {FULL_TUNING:g} x {whole:g}, which is the whole model's"
            for whose, (whole, now) in rates.items()
            if self.lora.on and now == adapter_rate(whole)
        ]

    @property
    def parts(self) -> set[str]:
        """What the run has, for keys that need it (``tandem.keys.needs``)."""
        needed = self.method.needs()
        loaded = [need for need in needed if not need.trained and not self.is_view(need.role)]
        parts = {need.role for need in needed} | {"frozen model" for _ in loaded}
        parts |= set() if self.method.pairwise else {"losses of tokens"}
        return parts | data_parts(self.data, self.evaluation) | worker_parts(self.placement)


def adapter_rate(rate: float) -> float:
    """The default learning rate of adapters where the whole model's is ``rate``."""
    return float(f"{FULL_TUNING * rate:.6g}")


def warmup_of(section: OptimSection, steps: int) -> int:
    """Steps of the warmup in a run of so many."""
    warmup = section.warmup_steps
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


OF_WHOLE_ROWS = (
    *("max_samples", "long_rows", "condition", "input_template", "apply_chat_template", "system", "chat_template"),
)
"""Keys of a dataset that have no effect on text as a stream."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig(RunConfig):
    """A run that trains on a dataset."""

    rows: RowsSection = field(default_factory=RowsSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reads.kind == "text":
            self._require_stream()
        if self.rows.batch_size < self.reads.at_least:
            raise UserError(
                f"batch_size: {self.method.title} compares the rows of a step with one another and needs "
                f"{self.reads.at_least} or more, got {self.rows.batch_size}"
            )

    @property
    def reads(self) -> Rows:
        """What kind of rows the method reads."""
        return cast(Rows, self.method.reads)

    def _require_stream(self) -> None:
        """Raises UserError for a key that asks for whole rows, where text is read as a stream."""
        if self.run.steps is None:
            raise UserError("epochs: how many windows a text has is not known before it is read; give --steps")
        for section, names in ((self.data, OF_WHOLE_ROWS), (self.evaluation, ("max_eval_samples",))):
            defaults = {f.name: f.default for f in fields(section)}
            for name in names:
                if getattr(section, name) != defaults[name]:
                    raise UserError(f"{name}: text is read as one stream, not as rows; leave it out")

    @property
    def asked_once(self) -> list[str]:
        """Frozen models of which the method reads log-probs of the rows alone: they are asked before the first step."""
        if self.following is not None:
            return []
        return [need.role for need in self.method.needs() if need.role == "reference"]

    def is_actor(self, role: str) -> bool:
        """Whether a model is the actor as it is before the first step, and has no place of its own."""
        return self.sources[role] == self.model.model and self.placement.home(role) == "actor"

    @property
    def items_per_step(self) -> int:
        return self.rows.batch_size

    @property
    def parts(self) -> set[str]:
        parts = super().parts | {self.reads.kind}
        # All windows are equally long: every mean of their losses is the same.
        parts -= {"losses of tokens"} if self.reads.kind == "text" else set()
        parts |= {"reference that stays"} if self.asked_once else set()
        frozen = [need.role for need in self.method.needs() if not need.trained]
        loaded = [role for role in frozen if role not in self.asked_once or not self.is_actor(role)]
        return parts if loaded else parts - {"frozen model"}


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(RunConfig):
    """A run that trains on samples of its own policy."""

    sampling: SamplingSection
    reward: RewardSection
    step: StepSection = field(default_factory=StepSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    evaluation: SampledEvaluationSection = field(default_factory=SampledEvaluationSection)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.samples.rewards == "required":
            object.__setattr__(self, "reward", judged_by_its_data(self.reward, self.data.data))
            self.reward.require_weight()
        knobs = settings(self)
        if self.step.old_logp == "sampler" and knobs.get("correction", "none") != "none":
            # Of a file, too: whoever asks for a correction must not train without one.
            raise UserError("correction: has no effect with --old-logp sampler; give --old-logp trainer")
        bare = knobs.get("correction") == "none" and not knobs["uncorrected"]
        if bare and self.step.old_logp == "trainer" and self.schedule.max_lag > 0:
            corrected = "a correction (token_tis), --old-logp sampler, or "
            raise UserError(
                "correction: with max_lag above 0 and old_logp 'trainer' old samples would count as if the newest "
                f"weights had drawn them; give {'' if self._unknown_logp else corrected}--uncorrected"
            )
        self._require_known_logp()
        if self.schedule.stale_cache == "keep" and self.engine.kind == "vllm":
            raise UserError(
                "stale_cache: vLLM computes the keys and values of samples that run anew when weights change, so none "
                "can be kept; leave it at auto, or sample with --engine.kind live"
            )
        settling = self.schedule.weights_change == "between-sequences"
        beside = self.engine.kind == "vllm" and self.placement.home("engine") == "actor"
        taking_turns = beside and self.engine.sleep and self.model.device != "cpu"
        if settling and taking_turns:
            raise UserError(
                "weights_change: an engine that takes turns with the trainer stops wherever its samples are, and they "
                "are computed anew; leave it at in-flight, or keep both in memory with --engine.no-sleep"
            )
        if self.schedule.stale_cache != "auto":
            alone = {"--weights-change between-sequences": settling, "--engine.way padded": self.engine.way == "padded"}
            if without := [flag for flag, given in alone.items() if given]:
                raise UserError(
                    f"stale_cache: has no effect with {without[0]}, where no sample runs when weights change; leave it "
                    "at auto"
                )
        draws = self.sampling
        units, what = (draws.prompts_per_step, "pairs") if self.method.pairwise else (draws.samples_per_step, "samples")
        if self.step.minibatches > units:
            raise UserError(
                f"minibatches: expected at most {units}, since a step has no more {what}, got {self.step.minibatches}"
            )

    @property
    def _unknown_logp(self) -> bool:
        """Whether nobody knows what the sampler's log-probs were before truncation."""
        draws = self.sampling
        return self.engine.kind == "vllm" and (draws.top_k > 0 or draws.top_p < 1 or draws.min_p > 0)

    def idle_for(self, steps: int) -> list[str]:
        found, lag = super().idle_for(steps), self.schedule.max_lag
        if self.sampler is not None and lag >= steps:
            found.append(f"max_lag: {lag} with {steps} steps: all prompts of the run are begun with the first weights")
        return found

    def _require_known_logp(self) -> None:
        """Raises UserError where such log-probs are read; of a replayed run's, too."""
        if self.method.pairwise or not self._unknown_logp:
            return
        only = "vLLM reports truncated log-probs only"
        if self.step.old_logp == "sampler":
            raise UserError(
                f"old_logp: {only}, which would bias the ratios; with top_k, top_p or min_p add --old-logp trainer"
            )
        given = {"correction": settings(self)["correction"] != "none", "ess_floor": self.step.ess_floor is not None}
        if unknown := [key for key, there in given.items() if there]:
            raise UserError(
                f"{unknown[0]}: {only}, and none to compare with the trainer's; leave it out with top_k, top_p or "
                "min_p, or sample with --engine.kind live"
            )

    @property
    def sampler(self) -> EngineSection | None:
        return self.engine

    @property
    def sources(self) -> dict[str, str]:
        found = super().sources
        return {"actor": found.pop("actor")} | self.model.sources_of(self.reward.models) | found

    @property
    def items_per_step(self) -> int:
        return self.sampling.prompts_per_step

    @property
    def leads(self) -> tuple[str, ...]:
        return (*super().leads, *(("lag_mean",) if self.schedule.max_lag else ()))

    @property
    def held_out_judge(self) -> str:
        names = self.evaluation.eval_reward
        return "" if set(names) == set(self.reward.judges) else listed([Path(name).name for name in names])

    @property
    def parts(self) -> set[str]:
        judging = bool(self.evaluation.eval_reward)
        judges = {"reward function": judging, "judge of held-out samples": judging or bool(self.reward.judges)}
        again = self.step.sample_epochs * self.step.minibatches > 1
        ratios = {
            "second optimizer step on a step's samples": again,
            "ratios other than 1": again or self.step.old_logp == "sampler",
        }
        present = {part for part, there in (judges | ratios).items() if there}
        present |= {"engine with weights of its own"} if self.lora.fold else set()
        return super().parts | {"samples"} | self.reward.parts | present | worker_parts(self.placement, self.engine)


@functools.cache
def config_class(name: str) -> type[RunConfig]:
    """The config of a method's command: its sections, a default learning rate of its own, keys for what it needs.

    Raises UserError where there is no such method.
    """
    if name not in METHODS:
        raise UserError(f"no method {name!r}{suggest(name, METHODS)}")
    return class_over(RowsConfig if isinstance(method_class(name).reads, Rows) else SamplesConfig, name)


def class_over(base: type[Base], name: str) -> type[Base]:
    """``base``, with what the method of this name adds to the config of its runs."""
    method = method_class(name)
    optim = field(default_factory=lambda: OptimSection(learning_rate=method.learning_rate))
    keys = {"optim": (OptimSection, optim, "")} | sections_of(method)
    found = section_class(f"{method.__name__}Config", keys, base)
    found.__doc__ = method.help_of(name)
    return found


def sections_of(method: type[Method]) -> dict[str, tuple[Any, Any, str]]:
    """The sections of a config that follow from its method: the knobs, the models beside the policy, their places."""
    placement = placement_class(Placement if isinstance(method.reads, Rows) else SamplingPlacement, method.models)
    models = models_class(method.models)
    optional = not any(need.required for need in method.models)
    return {
        "method": (method, field(default_factory=method), ""),
        "models": (models, field(default_factory=models) if optional else field(), ""),
        "placement": (placement, field(default_factory=placement, metadata=PREFIXED), ""),
    }


def read_config(method: str, *files: str | Path, **keys: Any) -> RunConfig:
    """The config of a run, for ``tandem.run``: what a command with these files and flags would be given.

    Keys are those of the command line, ``learning_rate=1e-5``; a prefixed one's dot is two underscores,
    ``engine__kind="vllm"``. A list is a list, None is ``none``. Raises UserError, in one line, for what the command
    refuses.
    """
    words = [word for file in files for word in ("--config", str(file))]
    for key, value in keys.items():
        values = value if isinstance(value, list | tuple) else [value]
        flag = "--" + key.replace("__", ".").replace("_", "-")
        words += [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *map(str, values)]
    return load_config(config_class(method), words, prog=f"tandem {method}")


def worker_parts(placement: RolePlacement, engine: EngineSection | None = None) -> set[str]:
    """Which of these a run has: workers, a trainer that is split over them, an engine that weights must reach."""
    own = {role for role in placement.roles if placement.workers(role)}
    vllm = engine is not None and engine.kind == "vllm" and not placement.is_here("engine")
    trains = "actor" in placement.roles
    parts = {
        "workers": bool(own) or vllm or launched(),
        "trained model": trains,
        "trainer split over several workers": trains and (placement.workers("actor") > 1 or launched()),
        "engine with weights of its own": trains and (vllm or "engine" in own or placement.workers("actor") > 1),
    }
    return {part for part, present in parts.items() if present}


def data_parts(data: ColumnsSection, evaluation: EvaluationSection | None = None) -> set[str]:
    """Which datasets may have splits."""
    held_out = [] if evaluation is None else evaluation.sources
    named = {"dataset with splits": data.sources, "held-out dataset with splits": held_out}
    return {part for part, sources in named.items() if any(one.has_splits for one in sources)}


def read_kind(method: str) -> str:
    """The kind of rows (``tandem.data.formats.COLUMNS``) that a method's command reads."""
    reads = method_class(method).reads
    return reads.kind if isinstance(reads, Rows) else "prompts"
