"""The configs of the commands that use a model without training it. Nothing here imports torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem.assembly.configs.methods import RowsConfig, config_class, data_parts, sections_of, worker_parts
from tandem.assembly.configs.role_sections import (
    JudgedPlacement,
    JudgePlacement,
    ModelsSection,
    Placement,
    UsePlacement,
)
from tandem.assembly.configs.sections import (
    ClusterSection,
    ColumnsSection,
    DataSection,
    DatasetSection,
    DrawsSection,
    EngineSection,
    LoraSection,
    ModelSection,
    OptimSection,
    OutSection,
    RewardSection,
    RunSection,
    judged_by_its_data,
)
from tandem.config import section_class
from tandem.errors import UserError
from tandem.flags import suggest
from tandem.keys import A_FOLDER, ANYTHING, AT_LEAST_0, MAY_CHANGE, PATH, PREFIXED, Checked, must, needs
from tandem.methods.base import Method
from tandem.methods.table import ROWS, method_class


@dataclass(frozen=True, kw_only=True)
class WriteSection:
    """What is written of each sample."""

    write: tuple[Literal["tokens", "logprobs"], ...] = ()
    """Beside the text: token ids, and their log-probs in nats at the sampling temperature, before any truncation."""


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """What every command that samples without training has."""

    run: OutSection
    model: ModelSection
    data: DatasetSection
    sampling: DrawsSection = field(default_factory=lambda: DrawsSection(samples_per_prompt=1))
    written: WriteSection = field(default_factory=WriteSection)
    placement: UsePlacement = field(default_factory=UsePlacement, metadata=PREFIXED)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    def __post_init__(self) -> None:
        draws = self.sampling
        if draws.temperature == 0 and draws.samples_per_prompt > 1:
            raise UserError("temperature: 0 is greedy, all samples of a prompt would be equal; sample each once")
        truncated = draws.top_k > 0 or draws.top_p < 1 or draws.min_p > 0
        if truncated and self.engine.kind == "vllm" and "logprobs" in self.written.write:
            raise UserError("write: vLLM reports log-probs of truncated distributions only; leave logprobs out")

    @property
    def rewards(self) -> RewardSection:
        """What judges the samples."""
        return RewardSection()

    @property
    def sources(self) -> dict[str, str]:
        """The models by role, and where each is loaded from."""
        return self.model.sources_of({"engine": self.model.model} | self.rewards.models)

    @property
    def parts(self) -> set[str]:
        """What it has, for keys that need it (``tandem.keys.needs``)."""
        return {"samples"} | data_parts(self.data) | worker_parts(self.placement, self.engine) | self.rewards.parts


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(UseConfig):
    """Sample the prompts of a dataset: --out/samples.jsonl, a line a sample, which --resume goes on with after a kill.

    A line has the row's prompt and other columns, and the completion: a dataset for 'tandem sft', and what
    'tandem score' reads. A sample depends on --seed, its row and its number alone.
    Example: tandem generate --model runs/sft/model --data prompts.jsonl --out runs/answers --max-new-tokens 256
    Example: tandem generate --model runs/sft/model --data prompts.jsonl --out runs/answers --engine.kind vllm
    """


@dataclass(frozen=True, kw_only=True)
class KeepSection:
    """What is made of a prompt's samples once they are judged."""

    keep: Literal["best", "pairs", "all"] = field(default="best", metadata=MAY_CHANGE)
    """best: best.jsonl, each prompt with its best completion, for 'tandem sft'. pairs: pairs.jsonl, best against worst,
    for 'tandem dpo' and 'tandem rm'. all: samples.jsonl alone, which is always there."""
    min_reward: float | None = field(default=None, metadata=needs(("keep", "best")) | MAY_CHANGE)
    """best: leave out prompts whose best completion has less. None: keep each prompt's best."""


@dataclass(frozen=True, kw_only=True)
class JudgedConfig(UseConfig):
    """What every command that judges its samples has beside."""

    reward: RewardSection
    placement: JudgedPlacement = field(default_factory=JudgedPlacement, metadata=PREFIXED)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reward", judged_by_its_data(self.reward, self.data.data))

    @property
    def rewards(self) -> RewardSection:
        return self.reward


@dataclass(frozen=True, kw_only=True)
class SampleConfig(JudgedConfig):
    """Sample prompts, judge the samples, and keep the best, or the best against the worst, as a dataset to train on.

    The loop of rejection sampling and of iterative DPO; recipes/ has both.
    Example: tandem sample --model runs/sft/model --data prompts.jsonl --reward check.py:right --out runs/best
    Example: tandem sample --model runs/sft/model --data prompts.jsonl --reward-model runs/rm/model --out runs/pairs
      --keep pairs
    """

    sampling: DrawsSection = field(default_factory=DrawsSection)
    kept: KeepSection = field(default_factory=KeepSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept.keep != "all":
            self.reward.require_weight()
        if self.kept.keep == "pairs" and self.sampling.samples_per_prompt < 2:
            raise UserError("samples_per_prompt: a pair is of 2 samples of a prompt; give 2 or more, got 1")


@dataclass(frozen=True, kw_only=True)
class ScoreModel(ModelSection):
    """The tokenizer that reward functions are given ids of, and what the reward model runs on."""

    model: str = field(default="", metadata=ANYTHING | PATH)
    """A model whose tokenizer makes the 'completion_ids' of reward functions. Empty: they are the rows' token_ids."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Judge answers that are there already: --out/scored.jsonl has each row of --data with its rewards.

    Rows have a prompt and a completion, or chosen and rejected, of which the accuracy is reported.
    Example: tandem score --data runs/answers/samples.jsonl --reward check.py:right --out runs/scored
    Example: tandem score --data pairs.jsonl --reward-model runs/rm/model --out runs/scored-pairs
    """

    run: OutSection
    data: ColumnsSection
    reward: RewardSection
    model: ScoreModel = field(default_factory=ScoreModel)
    placement: JudgePlacement = field(default_factory=JudgePlacement, metadata=PREFIXED)
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    def __post_init__(self) -> None:
        if not self.reward.judges:
            raise UserError("reward: nothing judges the rows; give --reward FILE.py:function or --reward-model DIR")
        if self.reward.overlong_buffer is not None:
            raise UserError("overlong_buffer: the answers are there, and none was sampled too long; leave it out")

    @property
    def sources(self) -> dict[str, str]:
        """The models by role, and where each is loaded from."""
        return self.model.sources_of(self.reward.models)

    @property
    def parts(self) -> set[str]:
        """What it has, for keys that need it (``tandem.keys.needs``)."""
        rows = {"samples", "demonstrations", "preferences"}
        return rows | data_parts(self.data) | worker_parts(self.placement) | self.reward.parts


@dataclass(frozen=True, kw_only=True)
class ExportSection(Checked):
    """What is exported, and where to."""

    model: str = field(metadata=A_FOLDER | PATH)
    """Folder of a run (its finished model, or else its newest checkpoint), of a checkpoint, or of a model."""
    out: str = field(metadata=A_FOLDER | PATH)
    """The Hugging Face folder that is written: weights as safetensors, config and tokenizer."""
    step: int | None = field(default=None, metadata=AT_LEAST_0)
    """Of a run's folder: the checkpoint after that step."""
    role: str = "actor"
    """Of a run's folder or a checkpoint: the model that is written, if not the policy: critic, say, of a checkpoint."""
    base: str | None = field(default=None, metadata=A_FOLDER | PATH)
    """Of a checkpoint: the model that its run began with, whose config and tokenizer it has. None: as the run says."""
    ema: bool = False
    """Of a checkpoint: the running average of the weights that its run keeps (--ema-decay), not the weights."""
    merge: bool = True
    """Adapters: write a whole model, their base with them added. False: of a checkpoint, a folder that peft reads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are written in. A checkpoint holds float32."""
    push_to_hub: str | None = field(default=None, metadata=must("OWNER/NAME", bool))
    """Name of a repository on the Hugging Face hub that the folder is pushed to, made if it is not there."""
    private: bool = field(default=False, metadata=needs(("push_to_hub",)))
    """Make it a private one."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    overwrite: bool = False
    """Replace --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema and self.role != "actor":
            raise UserError(f"ema: a run keeps a running average of its policy, none of its {self.role}; leave it out")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a Hugging Face folder of a run, of any of its checkpoints, or of a model in another dtype.

    Example: tandem export --model runs/grpo --out models/grpo --dtype bfloat16
    Example: tandem export --model runs/grpo/checkpoints/step_00000100 --out models/grpo-100 --push-to-hub me/grpo-100
    """

    export: ExportSection


@dataclass(frozen=True, kw_only=True)
class SuccessSection:
    """When a sample is right."""

    eval_success: float | None = None
    """The reward from which a sample is right: pass@k is the chance that one of k samples of a prompt is. None: not
    reported."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(JudgedConfig):
    """Sample held-out prompts and judge the samples: the mean reward with its standard error, and pass@k.

    Of rows: tandem eval METHOD --help, with sft, rm, dpo or another method that trains on a dataset.
    Example: tandem eval --model runs/grpo/model --data heldout.jsonl --reward check.py:right --out runs/eval
      --samples-per-prompt 8 --eval-success 1
    """

    success: SuccessSection = field(default_factory=SuccessSection)


@dataclass(frozen=True, kw_only=True)
class EvalRowsConfig:
    """What measures a model on rows, as a method's own run measures its held-out ones. ``eval_class`` adds the rest."""

    run: OutSection
    model: ModelSection
    data: DataSection
    method: Method
    models: ModelsSection
    placement: Placement
    cluster: ClusterSection = field(default_factory=ClusterSection, metadata=PREFIXED)

    def __post_init__(self) -> None:
        for need in self.method.needs():
            if self.models.source(need.role) is None:
                raise UserError(
                    f"{need.role}: give the folder of the {need.role}; a model compared with itself prefers nothing"
                )

    @property
    def as_run(self) -> RowsConfig:
        """The run that would train on these rows."""
        name = next(name for name in ROWS if type(self.method) is method_class(name))
        kind = config_class(name)
        adapters = {key: value for key, value in kind.implied({"model": self.model.model}).items() if "lora." in key}
        found = kind(
            run=RunSection(out=self.run.out, seed=self.run.seed, steps=1),
            model=self.model,
            data=self.data,
            optim=OptimSection(),
            method=self.method,
            models=self.models,
            placement=self.placement,
            lora=LoraSection(**{key.removeprefix("lora."): value for key, value in adapters.items()}),
            cluster=self.cluster,
        )
        assert isinstance(found, RowsConfig)
        return found

    @property
    def parts(self) -> set[str]:
        """What it has, for keys that need it (``tandem.keys.needs``)."""
        trains = {"trained model", "trainer split over several workers"}
        return self.as_run.parts - trains | {"evaluated model"}


def eval_config(words: list[str]) -> tuple[type[Any], list[str]]:
    """What the flags of ``tandem eval`` are read into, and those flags: after a method's name, what measures rows."""
    if not words or words[0].startswith("-"):
        return EvalConfig, words
    name, *flags = words
    if name not in ROWS:
        raise UserError(f"eval: no method {name!r} that trains on a dataset{suggest(name, ROWS)}")
    return eval_class(name), flags


@functools.cache
def eval_class(name: str) -> type[EvalRowsConfig]:
    """The config of ``tandem eval NAME``."""
    found = section_class(f"Eval{name}", sections_of(method_class(name)), EvalRowsConfig)
    models = "".join(f" --{need.role} runs/{need.role}/model" for need in method_class(name).models)
    found.__doc__ = (
        f"Measure a model on held-out rows as 'tandem {name}' measures its own: the loss, and what goes with it.\n\n"
        f"Example: tandem eval {name} --model runs/{name}/model{models} --data heldout.jsonl --out runs/eval"
    )
    return found
