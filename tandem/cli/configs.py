"""The configs of the commands that are no method's. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.assembly.configs import worker_parts
from tandem.assembly.needed import SamplingPlacement
from tandem.assembly.sections import ClusterSection, EngineSection, ModelSection, SamplingSection
from tandem.config import PATH, PREFIXED


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
    placement: SamplingPlacement = field(default_factory=SamplingPlacement, metadata=PREFIXED)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    @property
    def parts(self) -> set[str]:
        """What the examination has, for keys that need it (``tandem.errors.needs``)."""
        return worker_parts(self.placement, self.engine)
