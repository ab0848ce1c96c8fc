"""The config of each command. Nothing here imports torch, so ``--help`` and a mistyped flag are answered at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tandem.assembly.sections import (
    ROLES,
    ClusterSection,
    DataSection,
    EngineSection,
    ModelSection,
    OptimSection,
    PlacementSection,
    RewardSection,
    RunSection,
    SamplingSection,
    TrainerPlacement,
)
from tandem.config import PATH, PREFIXED
from tandem.errors import expect, needs
from tandem.methods.grpo import GRPO
from tandem.methods.ppo import PPO
from tandem.methods.rm import RewardModeling
from tandem.methods.sft import SFT
from tandem.roles import Algorithm
from tandem.workers.launched import launched


def worker_parts(placement: TrainerPlacement, engine: EngineSection | None = None) -> set[str]:
    """Which of these a run has: workers, a trainer that is split over them, an engine that weights must reach."""
    own = {role for role in ROLES if hasattr(placement, role) and placement.workers(role)}
    vllm = engine is not None and engine.kind == "vllm"
    parts = {
        "workers": bool(own) or vllm or launched(),
        "trainer split over several workers": placement.workers("actor") > 1 or launched(),
        "engine with weights of its own": vllm or "engine" in own or placement.workers("actor") > 1,
    }
    return {part for part, present in parts.items() if present}


def data_parts(data: DataSection) -> set[str]:
    """Which datasets may have splits: a file has none, nor have several that a pattern names."""
    sources = {"dataset with splits": data.data, "held-out dataset with splits": data.eval_data}
    files = re.compile(r"\.(jsonl|json|parquet)$|[*?\[]")
    return {part for part, source in sources.items() if source is not None and not files.search(source)}


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
    placement: TrainerPlacement = field(default_factory=TrainerPlacement, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    @property
    def parts(self) -> set[str]:
        """What the run has, for keys that need it (``tandem.errors.needs``)."""
        return data_parts(self.data) | worker_parts(self.placement)


@dataclass(frozen=True, kw_only=True)
class SFTSection:
    """What of a row is learned."""

    train_on: Literal["completion", "all"] = "completion"
    """The completion or the assistant's turns only, or every token. Rows with only 'text' are learned whole."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Fine-tune a causal LM on demonstrations.

    Rows: text, messages, or prompt and completion (strings or lists of messages), as in TRL.
    Example: tandem sft --model ./base --data demos.jsonl --out runs/sft --steps 500
    """

    optim: OptimSection = field(default_factory=lambda: OptimSection(learning_rate=2e-5))
    sft: SFTSection = field(default_factory=SFTSection)
    objective: SFT = field(default_factory=SFT)


@dataclass(frozen=True, kw_only=True)
class RMConfig(OfflineConfig):
    """Train a reward model on preference pairs.

    Rows: chosen and rejected, with prompt or with the prompt at the start of both (strings or lists of messages),
    as in TRL; an optional margin. The model gets one scalar head named 'score'.
    Example: tandem rm --model runs/sft/model --data pairs.jsonl --out runs/rm --steps 500
    """

    optim: OptimSection = field(default_factory=lambda: OptimSection(learning_rate=1e-5))
    objective: RewardModeling = field(default_factory=RewardModeling)


@dataclass(frozen=True, kw_only=True)
class OnlineSection:
    """How a step's samples are trained on, and judged when held out."""

    reference: str | None = field(default=None, metadata=PATH | needs(("part", "reference")))
    """Folder of the frozen reference that the KL is taken to. None: the model as it was at the start."""
    epochs: int = 1
    """Times that a step's samples are gone through."""
    minibatches: int = 1
    """Optimizer steps in one epoch."""
    old_logp: Literal["sampler", "trainer"] = "sampler"
    """What ratios are taken against: the sampler's log-probs, or the trainer's own from a forward more."""
    eval_reward: tuple[str, ...] = field(default=(), metadata=PATH | needs(("eval_data",)))
    """FILE.py:function that judges samples of --eval-data and is never trained on. Empty: the training rewards."""

    def __post_init__(self) -> None:
        expect(self, "1 or more", lambda value: value >= 1, "epochs", "minibatches")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """What every online command's config has. The command adds ``algorithm``, and its critic where it has one."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optim: OptimSection
    sampling: SamplingSection
    reward: RewardSection
    online: OnlineSection = field(default_factory=OnlineSection)
    placement: PlacementSection = field(default_factory=PlacementSection, metadata=PREFIXED)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    @property
    def parts(self) -> set[str]:
        """What the run has, for keys that need it (``tandem.errors.needs``)."""
        algorithm: Algorithm = vars(self)["algorithm"]  # of each command's own class
        models = {
            "critic": algorithm.needs_critic,
            "reference": algorithm.needs_reference,
            "reward model": self.reward.reward_model is not None,
            "reward function": bool(self.reward.reward or self.online.eval_reward),
        }
        parts = {"samples"} | {model for model, present in models.items() if present}
        return parts | data_parts(self.data) | worker_parts(self.placement, self.engine)


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """The critic of an algorithm that has one."""

    critic: str | None = field(default=None, metadata=PATH)
    """Folder it starts from. None: the reward model, or without one the model with a head that says 0."""
    critic_learning_rate: float = 1e-5
    """Its learning rate: higher than the policy's, which must stay near the reference."""

    def __post_init__(self) -> None:
        expect(self, "more than 0", lambda value: value > 0, "critic_learning_rate")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Improve a model against a reward with PPO: actor, critic, and a frozen reference for the KL.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem ppo --model runs/sft/model --reward-model runs/rm/model --data prompts.jsonl --out runs/ppo
    --steps 200
    """

    critic: CriticSection = field(default_factory=CriticSection)
    algorithm: PPO = field(default_factory=PPO)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """Improve a model against a reward with GRPO: the other samples of a prompt are the baseline.

    Rows: prompt (a string or a list of messages); other columns go to the reward functions, as in TRL.
    Example: tandem grpo --model runs/sft/model --reward check.py:right --data prompts.jsonl --out runs/grpo
    --steps 200
    """

    algorithm: GRPO = field(default_factory=GRPO)


@dataclass(frozen=True, kw_only=True)
class QuickstartSection:
    """Where the quickstart goes and what it starts from."""

    out: str = field(default="runs/quickstart", metadata=PATH)
    """Folder for everything it makes. An earlier quickstart in it is replaced."""
    seed: int = 0
    """The model's first weights, the data and every sample follow from it."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """SFT, a reward model and PPO on a task that is made on the spot, in about a minute on two cores."""

    quickstart: QuickstartSection = field(default_factory=QuickstartSection)


@dataclass(frozen=True, kw_only=True)
class DoctorModel(ModelSection):
    """The model to try with."""

    model: str = field(default="", metadata=PATH)
    """A Hugging Face folder, or a name on the hub. Empty: a tiny random model made for the occasion."""

    def __post_init__(self) -> None:
        if self.model:
            super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check that sampling and training fit together here: versions, devices, engine, weight sync, each with its time.

    Starts the trainer and an engine as they are placed, samples, sets the trainer's weights to zero, pushes, checks
    that the engine now draws at random, puts the weights back, pushes, and checks that all is as it was.
    Example: tandem doctor
    Example: tandem doctor --model ./base --engine.kind vllm --placement.actor 1 --placement.engine 1
    """

    model: DoctorModel = field(default_factory=DoctorModel)
    sampling: SamplingSection = field(default_factory=lambda: SamplingSection(max_new_tokens=32))
    placement: PlacementSection = field(default_factory=PlacementSection, metadata=PREFIXED)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    @property
    def parts(self) -> set[str]:
        """What the examination has, for keys that need it (``tandem.errors.needs``)."""
        return worker_parts(self.placement, self.engine)
