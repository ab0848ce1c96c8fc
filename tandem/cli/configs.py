"""The configs of the commands that are no method's. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tandem.assembly.configs.methods import data_parts, read_kind, worker_parts
from tandem.assembly.configs.role_sections import SamplingPlacement
from tandem.assembly.configs.sections import ClusterSection, DataSection, EngineSection, ModelSection, SamplingSection
from tandem.data.formats import COLUMNS
from tandem.errors import UserError
from tandem.flags import suggest
from tandem.keys import ABOVE_0, ANYTHING, AT_LEAST_0, AT_LEAST_1, PATH, PREFIXED, Checked, must, needs
from tandem.methods.table import METHODS
from tandem.rewards.kinds import is_function

SERVED = needs(("part", "served model"))


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
class ServeSection(Checked):
    """What is served, and where."""

    reward: str = field(metadata=must("something to serve", bool) | PATH)
    """Folder of a model with a score head, or whatever a run's --reward may name, FILE.py:function."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0: whoever reaches this machine; set TANDEM_REWARD_TOKEN then."""
    port: int = field(default=8000, metadata=must("0 to 65535", lambda value: 0 <= value <= 65535))
    """Port to listen on. 0: one that is free, which is printed."""
    batch_limit: int = field(default=64, metadata=AT_LEAST_1)
    """Most samples in a request, and in a batch that several requests make together."""
    deadline: float = field(default=600.0, metadata=ABOVE_0 | needs(("part", "reward function")))
    """Longest time, in seconds, that one call of a function may take."""


@dataclass(frozen=True, kw_only=True)
class ServedModel(Checked):
    """How a model is computed."""

    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=SERVED)
    """Precision of the computation."""
    device: str = field(default="auto", metadata=SERVED)
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    token_budget: int = field(default=16384, metadata=AT_LEAST_1 | SERVED)
    """Tokens in a micro-batch: bounds memory."""
    normalize_scores: bool = field(default=False, metadata=SERVED)
    """Subtract the mean of its scores on the data that it learned from, and divide by their standard deviation."""
    trust_remote_code: bool = field(default=False, metadata=SERVED)
    """Run the Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class ServeRewardConfig:
    """Serve a reward model, or a reward function, to runs on other machines: --reward http://HOST:PORT.

    Answers GET /health and POST /score (docs/rewards.md has the protocol). Requests that come together are judged in
    one batch. Where the environment has TANDEM_REWARD_TOKEN, requests must carry it. SIGTERM and Ctrl-C end it once
    what is being judged is answered.
    Example: tandem serve-reward runs/rm/model --port 8000
    Example: tandem serve-reward check.py:right --host 0.0.0.0
    """

    serve: ServeSection
    model: ServedModel = field(default_factory=ServedModel)

    @property
    def parts(self) -> set[str]:
        """What is served, for keys that need it (``tandem.keys.needs``)."""
        return {"reward function" if is_function(self.serve.reward) else "served model"}


@dataclass(frozen=True, kw_only=True)
class DoctorModel(ModelSection):
    """The model to try with."""

    model: str = field(default="", metadata=ANYTHING | PATH)
    """A Hugging Face folder, or a name on the hub. Empty: a tiny random model made for the occasion."""


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
        """What the examination has, for keys that need it (``tandem.keys.needs``)."""
        return worker_parts(self.placement, self.engine)


@dataclass(frozen=True, kw_only=True)
class ShownSection(Checked):
    """What is shown, and who reads it."""

    method: str | None = None
    """The command whose rows these are, as sft, dpo or grpo. None: what their columns are for."""
    rows: int = field(default=3, metadata=AT_LEAST_0)
    """Rows shown in full, from the first one on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None and self.method not in METHODS:
            raise UserError(f"method: no method {self.method!r}{suggest(self.method, METHODS)}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """The tokenizer that the rows go through."""

    model: str | None = field(default=None, metadata=PATH)
    """A Hugging Face folder, or a name on the hub. None: rows are shown as they are read, and counted in characters."""
    trust_remote_code: bool = field(default=False, metadata=needs(("model",)))
    """Run the Python code that comes with the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Show a dataset as a model will see it: rows with what is trained of them, lengths, what is cut, sources.

    Example: tandem data demos.jsonl --model Qwen/Qwen3-0.6B
    Example: tandem data a.jsonl:0.4,b.jsonl:0.6 --model Qwen/Qwen3-0.6B --method dpo --rows 10
    """

    data: DataSection
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    shown: ShownSection = field(default_factory=ShownSection)

    def __post_init__(self) -> None:
        default = DataSection(data=self.data.data)
        for key in ("max_length", "long_rows", "train_on", "chat_template"):
            if self.tokenizer.model is None and getattr(self.data, key) != getattr(default, key):
                raise UserError(f"{key}: has no effect without --model, whose tokenizer the rows go through")

    @property
    def parts(self) -> set[str]:
        """What rows it may read, for keys that need some (``tandem.keys.needs``)."""
        kinds = [*COLUMNS] if self.shown.method is None else [read_kind(self.shown.method)]
        return {"samples" if kind == "prompts" else kind for kind in kinds} | data_parts(self.data)


@dataclass(frozen=True, kw_only=True)
class AdvisedSection(Checked):
    """The run that is looked at."""

    run: str = field(metadata=must("the folder of a run", bool) | PATH)
    """Folder of a run on samples, which may still go on."""


@dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Say what bound a run on samples (sampling, training or rewards), what overlapping could win, what to change.

    It follows from the seconds in the run's metrics.jsonl; every such run prints the same when it ends.
    Example: tandem advise runs/grpo
    """

    advised: AdvisedSection
