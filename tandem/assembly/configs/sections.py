"""The sections that the commands' configs are made of. One key a field; its docstring is the key's help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from tandem.checkpoint.saver import SaveEvery
from tandem.data.gym import is_gym
from tandem.data.sources import Columns, DataSource, parse_sources, unweighted_sources
from tandem.errors import UserError
from tandem.keys import (
    A_FOLDER,
    A_MODEL,
    A_SHARE,
    A_TEXT,
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    FROM_0_TO_1,
    INFINITE,
    MAY_CHANGE,
    ONE_START,
    PATH,
    Checked,
    may_change,
    must,
    needs,
)
from tandem.models.lora.folder import AdapterFolder
from tandem.models.trusted import source_of
from tandem.rewards.kinds import kind_of
from tandem.rewards.shaping import Overlong
from tandem.types import SamplingParams


def _count_or_share(value: float) -> bool:
    return value >= 0 and (value < 1 or value == int(value))


def _counts_to_the_last_step(config: Any) -> str:
    schedule = config.optim.lr_schedule
    return "" if schedule == "constant" else f"its {schedule} learning rate falls to 0 at the last step"


@dataclass(frozen=True, kw_only=True)
class OutSection(Checked):
    """Where it is written, and with which draws."""

    out: str = field(metadata=must("a path", bool) | PATH | MAY_CHANGE)
    """Folder of the run: its config, and all that it writes."""
    seed: int = field(default=0, metadata=AT_LEAST_0)
    """Every random draw of the run is derived from it."""
    resume: bool = field(default=False, metadata=ONE_START)
    """Go on from the newest checkpoint in --out, or after the last rows."""
    accept_changed: tuple[Literal["data", "reward", "model"], ...] = field(default=(), metadata=ONE_START)
    """With --resume: go on although the data, a reward function or a model folder has changed since the run began."""
    overwrite: bool = field(default=False, metadata=ONE_START)
    """Delete the run that --out already holds."""
    dry_run: bool = field(default=False, metadata=ONE_START)
    """Print the resolved config and what the run would use, then stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise UserError("overwrite: it deletes the run that resume would go on from; give one of the two")
        if self.accept_changed and not self.resume:
            raise UserError("accept_changed: only a run that is resumed can have changed inputs; add --resume")


@dataclass(frozen=True, kw_only=True)
class RunSection(OutSection):
    """Where the run is written and how long it goes on."""

    steps: int | None = field(default=None, metadata=AT_LEAST_1 | may_change(unless=_counts_to_the_last_step))
    """Optimizer steps (offline) or rounds of sampling and training (online) in all, those before a resume included."""
    epochs: float | None = field(default=None, metadata=ABOVE_0 | may_change(unless=_counts_to_the_last_step))
    """The run's length instead of --steps: times that as many rows as --data has are trained on, in whole steps."""
    save_every: str = field(default="10m", metadata=MAY_CHANGE)
    """Time between checkpoints: '100' steps or '10m' minutes. The last step is saved too. '0': no checkpoint at all."""
    keep: int = field(default=2, metadata=AT_LEAST_1 | needs(("save_every",)) | MAY_CHANGE)
    """Checkpoints kept, newest first."""
    rollouts_logged: int = field(default=8, metadata=AT_LEAST_0 | needs(("part", "samples")) | MAY_CHANGE)
    """Samples written to rollouts.jsonl each step, in whole groups; as many held-out ones at an evaluation."""
    record: bool = field(default=False, metadata=needs(("part", "samples")) | MAY_CHANGE)
    """Write every group that is trained on, whole, to record/: what 'tandem replay' trains again from."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = field(default=(), metadata=MAY_CHANGE)
    """Where the run can be followed besides its folder (pip install 'tandem-rlhf[trackers]')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SaveEvery.parse(self.save_every)
        if self.steps is None and self.epochs is None:
            raise UserError("steps: how long shall the run be? give --steps, or --epochs")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                "epochs: steps is set too, and both say how long the run is; give one, and the other as none"
            )


PASSED = ("trained model", "frozen model", "evaluated model")
TRAINS, COMPUTES = needs(("part", "trained model")), needs(("part", *PASSED))
"""Keys of models that are trained, and of models that batches go through: a sampler is neither."""


@dataclass(frozen=True, kw_only=True)
class ModelSection(Checked):
    """The model, and what it runs on."""

    model: str = field(metadata=A_MODEL | PATH)
    """A Hugging Face folder, or a name on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation, and of sampling. The optimizer keeps float32 weights in either case."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    token_budget: int = field(default=16384, metadata=AT_LEAST_1 | COMPUTES)
    """Tokens in a micro-batch, a prompt of several samples counted once: bounds memory and changes nothing else.
    A longer sequence goes through alone, and is said."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    keep_gathered: bool = field(default=False, metadata=needs(("part", "trainer split over several workers")))
    """Over several workers: keep gathered parameters until the backward (ZeRO 1, 2) instead of gathering twice (3)."""
    offload: Literal["none", "optimizer", "parameters"] = field(default="none", metadata=TRAINS)
    """Kept on the CPU between uses: nothing, the optimizer's state, or parameters and gradients too."""
    offload_frozen: bool = field(default=False, metadata=needs(("part", "frozen model")))
    """Keep frozen models (a reference, a reward model) on the CPU between uses."""
    activation_checkpointing: bool = field(default=False, metadata=TRAINS)
    """Keep only each layer's input for the backward and compute the rest again."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=COMPUTES)
    """Run layers as compiled graphs in training and scoring: faster, after a minute of compiling. auto: on a GPU."""

    @property
    def source(self) -> str:
        """Where the model is loaded from."""
        return source_of(self.model, self.trust_remote_code)

    def sources_of(self, places: Mapping[str, str]) -> dict[str, str]:
        """Where models are loaded from, by role: folders or hub names, marked if the code there may be run."""
        return {role: source_of(place, self.trust_remote_code) for role, place in places.items()}


@dataclass(frozen=True, kw_only=True)
class SourceSection(Checked):
    """The dataset."""

    data: str = field(metadata=must("a file or the name of a dataset", bool) | PATH)
    """A .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, json@FOLDER, or the name of a dataset on the
    hub; or several of these, with commas between them."""
    split: str = field(default="train", metadata=needs(("part", "dataset with splits")))
    """Split to read, for a dataset that has splits."""
    max_samples: int | None = field(default=None, metadata=AT_LEAST_1)
    """Rows read of each source of --data, its first ones. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sources()

    def _check_sources(self) -> None:
        unweighted_sources("data", self.data)

    @property
    def sources(self) -> list[DataSource]:
        """What ``data`` names."""
        return parse_sources(self.data)


@dataclass(frozen=True, kw_only=True)
class ColumnsSection(Columns, SourceSection):
    """The dataset, and what its columns are."""


@dataclass(frozen=True, kw_only=True)
class DatasetSection(ColumnsSection):
    """The dataset, and how its rows are read and tokenized."""

    max_length: int = field(default=4096, metadata=AT_LEAST_1)
    """Longest row in tokens; of an online dataset, longest prompt."""
    long_rows: Literal["refuse", "truncate", "drop"] = "refuse"
    """What becomes of longer rows: an error that names the first, their left end cut off, or left out and counted."""
    chat_template: str | None = field(default=None, metadata=A_TEXT | PATH)
    """A file with the chat template to use, and to keep with the trained model; or the name of one of the tokenizer's.
    None: the tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class DataSection(DatasetSection):
    """The dataset that is trained on."""

    data: str = field(metadata=PATH)
    """A .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, json@FOLDER, or the name of a dataset on the
    hub; or several of these, with commas between them, each with :WEIGHT behind it or none: a.jsonl:0.4,b.jsonl:0.6."""
    train_on: Literal["completion", "last", "all"] = field(
        default="completion", metadata=needs(("part", "demonstrations"))
    )
    """What of a demonstration is learned: the completion or the assistant's turns, only the last of these turns, or
    every token. Rows with only 'text' are learned whole."""

    step_separator: str = field(default="\\n", metadata=A_TEXT | needs(("part", "steps")))
    """Put behind each step; its last token is where the step is judged. \\n is a line break."""
    step_placeholder: str | None = field(default=None, metadata=A_TEXT | needs(("part", "steps")))
    """What ends each step in 'prompt', for rows that have no column of steps (OpenRLHF's placeholder token)."""

    @property
    def separator(self) -> str:
        """The step separator, unescaped."""
        return self.step_separator.replace("\\n", "\n").replace("\\t", "\t")

    def _check_sources(self) -> None:
        try:
            parse_sources(self.data)
        except UserError as error:
            raise UserError(f"data: {error}") from error


@dataclass(frozen=True, kw_only=True)
class OptimSection(Checked):
    """The optimizer and its learning rate."""

    learning_rate: float = field(default=1e-6, metadata=A_SHARE)
    """Its peak, after the warmup. Meant for models of 0.1B parameters and more; those of a million learn with 1e-3."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (pip install 'tandem-rlhf[quant]'), adafactor only means of a matrix's rows
    and columns (its learning rate is a share of the weights: 1e-3, say), muon steps hidden matrices orthogonally."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warmup: stay, or fall to 0 at the last step."""
    warmup_steps: float = field(default=0.03, metadata=must("a whole number, or a share in [0, 1)", _count_or_share))
    """The run's steps over which the learning rate rises linearly; below 1, their share of all."""
    weight_decay: float = field(default=0.0, metadata=AT_LEAST_0)
    """Decoupled, on matrices only."""
    betas: tuple[float, float] = field(
        default=(0.9, 0.95),
        metadata=must("2 numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas))
        | needs(("optimizer", "adamw", "adamw8bit", "muon")),
    )
    """AdamW's decay of the two moment estimates."""
    max_grad_norm: float = field(default=1.0, metadata=ABOVE_0 | INFINITE)
    """The gradient is scaled down to this norm. .inf: never."""
    aux_loss_coef: float = field(default=0.0, metadata=AT_LEAST_0)
    """Weight of the load-balancing loss of the policy's routers, where it is a mixture of experts: each sequence's, in
    the mean over the sequences of an optimizer step; 0.001, say. 0: none."""
    bias_update_speed: float = field(default=0.0, metadata=AT_LEAST_0 | needs(("lora.rank", 0)))
    """What each optimizer step adds to the bias of every expert that had fewer of its tokens than the mean, and takes
    off the others' (balancing without a loss, of DeepSeek V3, GLM 4.5 and their kin); 0.001, say. 0: they stay."""
    ema_decay: float | None = field(default=None, metadata=must("more than 0 and below 1", lambda decay: 0 < decay < 1))
    """Decay, at each optimizer step, of a running average of the policy's weights, written to model-ema; 0.99, say.
    None: no average."""


@dataclass(frozen=True, kw_only=True)
class LoraSection(Checked):
    """Adapters (LoRA, arXiv:2106.09685) that are trained in place of the model (pip install 'tandem-rlhf[lora]'). A
    folder of adapters as --model is trained on, with its own rank, alpha and targets."""

    prefix: ClassVar = "lora."

    rank: int = field(default=0, metadata=AT_LEAST_0)
    """Rank of the adapters on linear layers, 32, say. 0: the whole model is trained."""
    alpha: float = field(default=32.0, metadata=ABOVE_0 | needs(("lora.rank",)))
    """Scales what they add, by alpha / rank; with rslora by alpha / sqrt(rank)."""
    targets: tuple[str, ...] = field(
        default=("all-linear",),
        metadata=must("names of layers, all-linear or experts", lambda names: names and all(names))
        | needs(("lora.rank",)),
    )
    """What gets them, by the last part of its name: q_proj, embed_tokens, lm_head; experts: those that are stacked.
    all-linear: all linear layers but the head."""
    dora: bool = field(default=False, metadata=needs(("lora.rank",)))
    """Train each row's length apart from its direction (DoRA, arXiv:2402.09353). Sampling and training are slower."""
    rslora: bool = field(default=False, metadata=needs(("lora.rank",)))
    """Scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones (arXiv:2312.03732)."""
    fold: bool = field(default=False, metadata=needs(("lora.rank",), ("part", "samples")))
    """Sample from a copy of the model with the adapters folded in, made anew when they have changed: it decodes faster
    and is one model more in memory. False: they stay apart, and alone travel to engines with weights of their own."""
    quantize: Literal["none", "nf4", "fp8"] = field(default="none", metadata=needs(("lora.rank",)))
    """Keep the linear layers of the frozen model in few bits (QLoRA, arXiv:2305.14314): nf4 in 4.13 bits a number
    (pip install 'tandem-rlhf[quant]'), fp8 in 8. none: as --dtype says."""
    share_critic: bool = field(default=False, metadata=needs(("lora.rank",), ("part", "critic")))
    """The critic is adapters of its own and a head on the policy's base, which is in memory once. It begins with that
    base, or with adapters of it, and lives in the policy's one process."""

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0


def as_adapters(found: LoraSection | AdapterFolder) -> dict[str, Any]:
    """What adapters are, by key: those that a section asks for, or those of a folder."""
    return {key: getattr(found, key) for key in ("rank", "alpha", "targets", "dora", "rslora")}


FULL_TUNING = 10.0
"""The learning rate of adapters by default: 10 times that of the whole model (Schulman et al., LoRA Without Regret)."""


@dataclass(frozen=True, kw_only=True)
class RowsSection(Checked):
    """How a fixed dataset is gone through."""

    batch_size: int = field(default=32, metadata=AT_LEAST_1)
    """Rows in an optimizer step, over all devices."""
    reference_cache: str | None = field(
        default=None, metadata=A_FOLDER | PATH | needs(("part", "reference that stays")) | MAY_CHANGE
    )
    """Folder where the reference's log-probs are kept, by the content of rows and reference: runs that share it compute
    them once. None: in the run's own folder."""


@dataclass(frozen=True, kw_only=True)
class DrawsSection(Checked):
    """How often each prompt is sampled, and how."""

    samples_per_prompt: int = field(default=8, metadata=AT_LEAST_1)
    """Completions sampled for each prompt."""
    max_new_tokens: int = field(default=512, metadata=AT_LEAST_1)
    """Longest completion, in tokens."""
    temperature: float = field(default=1.0, metadata=AT_LEAST_0)
    """Divides the logits. 0 is greedy."""
    top_k: int = field(default=0, metadata=AT_LEAST_0)
    """Draw from the k likeliest tokens. 0: from all."""
    top_p: float = field(default=1.0, metadata=A_SHARE)
    """Draw from the fewest tokens whose probabilities sum to this."""
    min_p: float = field(default=0.0, metadata=FROM_0_TO_1)
    """Draw from tokens at least this likely relative to the likeliest."""
    stop: tuple[str, ...] = field(default=(), metadata=must("no empty string", all))
    """Strings that end a completion."""
    max_slots: int = field(default=256, metadata=AT_LEAST_1)
    """Completions decoded at a time: bounds memory and changes nothing else."""

    @property
    def params(self) -> SamplingParams:
        """What an engine is asked for."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop=self.stop,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingSection(DrawsSection):
    """What is sampled each step, and how."""

    prompts_per_step: int = field(default=32, metadata=AT_LEAST_1)
    """Prompts in a step, over all devices."""

    @property
    def samples_per_step(self) -> int:
        """Samples in a step, over all devices."""
        return self.prompts_per_step * self.samples_per_prompt


def judged_by_its_data(section: RewardSection, data: str) -> RewardSection:
    """The section, with reasoning-gym's own checker where nothing judges and the data are its tasks.

    Raises UserError where nothing judges other data.
    """
    tasks = [is_gym(source.name) for source in parse_sources(data)]
    if section.judges:
        return section
    if not all(tasks):
        raise UserError("reward: nothing judges the samples; give --reward FILE.py:function or --reward-model DIR")
    return replace(section, reward=("reasoning-gym",))


@dataclass(frozen=True, kw_only=True)
class RewardSection(Checked):
    """What judges the samples. Several rewards are summed with their weights."""

    reward: tuple[str, ...] = field(default=(), metadata=PATH)
    """FILE.py:function, each f(prompts, completions, completion_ids, **columns) -> list[float | None]; or
    http://HOST:PORT, judge:FILE.yaml, math, reasoning-gym, format:REGEX."""
    reward_model: tuple[str, ...] = field(default=(), metadata=must("folders", all) | PATH)
    """Folders of models with a score head, as 'tandem rm' writes them. Several are an ensemble, whose mean counts."""
    normalize_scores: bool = field(default=False, metadata=needs(("part", "reward model")))
    """Reward models: less the mean and divided by the standard deviation that 'tandem rm' wrote into their configs."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each --reward, then one for each --reward-model. Empty: 1 each, and for each of n reward models
    1/n."""
    reward_deadline: float = field(default=600.0, metadata=ABOVE_0 | needs(("part", "reward function")))
    """Longest time, in seconds, that one call of a --reward may take, calls made again included."""
    reward_processes: int | None = field(
        default=None, metadata=AT_LEAST_1 | needs(("part", "reward function")) | MAY_CHANGE
    )
    """Processes for each --reward that judges a sample or a group at a time. None: one for every second core, at most
    8."""
    missing_eos: Literal["none", "replace", "subtract"] = field(default="none", metadata=needs(("part", "reward")))
    """A completion that max_new_tokens cut off keeps its reward, gets -missing_eos_penalty instead, or loses that."""
    missing_eos_penalty: float = field(
        default=1.0, metadata=must("from 0 to 1e15", lambda penalty: 0 <= penalty <= 1e15) | needs(("missing_eos",))
    )
    """How much that is."""
    overlong_buffer: int | None = field(default=None, metadata=AT_LEAST_1 | needs(("part", "reward")))
    """The last tokens before overlong_length, over which a punishment of length rises from 0. None: length costs
    nothing."""
    overlong_length: int | None = field(default=None, metadata=AT_LEAST_1 | needs(("overlong_buffer",)))
    """Sampled tokens at which the punishment is whole. None: max_new_tokens."""
    overlong_penalty: float = field(
        default=1.0,
        metadata=must("more than 0 and at most 1e15", lambda penalty: 0 < penalty <= 1e15)
        | needs(("overlong_buffer",)),
    )
    """The whole punishment, which comes off the reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            for source in self.reward:
                kind_of(source)
        except UserError as error:
            raise UserError(f"reward: {error}") from error
        count = len(self.judges)
        if len(self.reward_weights) not in (0, count):
            raise UserError(f"reward_weights: expected {count} weights, one a reward, got {self.reward_weights!r}")

    def require_weight(self) -> None:
        """Raises UserError where the rewards of all samples are 0, whatever they are judged."""
        ends = self.missing_eos != "none" and self.missing_eos_penalty
        if not (any(self.weights) or ends or self.overlong_buffer):
            raise UserError("reward_weights: all are 0, so no sample is better than another; give one that is not")

    def overlong(self, max_new_tokens: int) -> Overlong | None:
        """What length costs samples of at most so many tokens. Raises UserError for a punishment that none can get."""
        if self.overlong_buffer is None:
            return None
        length = self.overlong_length or max_new_tokens
        if self.overlong_buffer > length:
            raise UserError(f"overlong_buffer: expected at most overlong_length, {length}, got {self.overlong_buffer}")
        if max_new_tokens <= length - self.overlong_buffer:
            raise UserError(
                f"max_new_tokens: samples longer than {length - self.overlong_buffer} tokens are to be punished, and "
                f"there are none; give more, got {max_new_tokens}"
            )
        return Overlong(length, self.overlong_buffer, self.overlong_penalty)

    @property
    def judges(self) -> list[str]:
        """The rewards by name, in the order of their weights."""
        return [*self.reward, *("reward_model" for _ in self.reward_model)]

    @property
    def models(self) -> dict[str, str]:
        """The reward models by role: ``reward``, ``reward_2`` and so on, which all live where the first one does."""
        return {"reward" if i == 1 else f"reward_{i}": source for i, source in enumerate(self.reward_model, start=1)}

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of the ``judges``."""
        models = len(self.reward_model)
        return self.reward_weights or (1.0,) * len(self.reward) + (1 / max(models, 1),) * models

    @property
    def parts(self) -> set[str]:
        """Which of these there are, for keys that need them."""
        parts = {
            "reward": bool(self.judges),
            "frozen model": bool(self.reward_model),
            "reward model": bool(self.reward_model),
            "reward function": bool(self.reward),
        }
        return {part for part, present in parts.items() if present}


@dataclass(frozen=True, kw_only=True)
class StepSection(Checked):
    """How a step's samples are trained on."""

    sample_epochs: int = field(default=1, metadata=AT_LEAST_1)
    """Times that a step's samples are gone through."""
    minibatches: int = field(default=1, metadata=AT_LEAST_1)
    """Optimizer steps in each of them."""
    old_logp: Literal["sampler", "trainer"] = field(default="sampler", metadata=needs(("part", "losses of tokens")))
    """What ratios are taken against: the sampler's log-probs, or the trainer's own from a forward more."""
    ess_floor: float | None = field(default=None, metadata=A_SHARE | needs(("part", "losses of tokens")))
    """Where the effective sample size of a minibatch is below this share of its tokens, the policy's learning rate is
    scaled down by the ratio of the two for its step. None: never."""


LIVE, VLLM = needs(("engine.kind", "live")), needs(("engine.kind", "vllm"))
TRAVEL = needs(("part", "engine with weights of its own"))


@dataclass(frozen=True, kw_only=True)
class ScheduleSection(Checked):
    """How far sampling may run ahead of training (docs/async.md). With max_lag 0 each step trains on samples of its own
    weights, and waits for the longest of them. From 1 on samples of so many more steps are open: those that have ended
    are trained on, the others go on under the new weights. Begin with 1; more is for lengths or rewards that are very
    uneven."""

    max_lag: int = field(default=0, metadata=AT_LEAST_0)
    """Steps for which prompts are sampled beyond the one that is trained: its samples may be so many steps old. 0: none
    is."""
    window: float = field(default=0.3, metadata=FROM_0_TO_1 | needs(("max_lag",)))
    """How far a prompt may be passed by younger ones that have ended first, as a share of all that are open; so much
    older, too, its samples may be. 0: not at all, 1: as far as there are any."""
    stale_cache: Literal["auto", "keep", "recompute"] = field(default="auto", metadata=needs(("max_lag",)))
    """When weights change under samples that run: they go on from the keys and values of the old ones, or from new ones
    of their tokens. auto: the live engine keeps them, vLLM always recomputes."""
    weights_change: Literal["in-flight", "between-sequences"] = field(
        default="in-flight", metadata=needs(("max_lag",), *TRAVEL["needs"])
    )
    """Engines with weights of their own take new ones between any two steps, or once the samples that run have ended,
    with none begun meanwhile."""


@dataclass(frozen=True, kw_only=True)
class EngineSection(Checked):
    """What samples, and how weights reach it."""

    prefix: ClassVar = "engine."

    kind: Literal["live", "vllm"] = "live"
    """live samples with the trainer's own model code; vllm with vLLM (pip install 'tandem-rlhf[vllm]')."""
    way: Literal["auto", "captured", "slots", "padded"] = field(default="auto", metadata=LIVE)
    """live: captured graphs over a paged cache, single steps over a cache of slots, or the model's own generate. auto:
    the first that the device has and the model can."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """live, captured: keep keys and values as the model computes them, or in 8 bits: nearly twice the tokens fit, and
    the sampler's log-probs differ by more from the trainer's."""
    tensor_parallel: int = field(default=1, metadata=AT_LEAST_1 | VLLM)
    """vllm: GPUs that one engine is split over."""
    memory_share: float | None = field(default=None, metadata=A_SHARE | VLLM)
    """vllm: part of a GPU's memory that an engine may take. None: vLLM's own default, or 0.6 on shared devices."""
    sleep: bool = field(default=True, metadata=needs(("engine.kind", "vllm"), ("placement.engine", "actor")))
    """vllm on the actor's GPUs: each side gives its memory away while the other works. False: both stay."""
    max_length: int | None = field(default=None, metadata=must("2 or more", lambda value: value >= 2))
    """Longest prompt and completion together, in tokens. None: what the model allows."""
    seeded: bool = field(default=True, metadata=VLLM)
    """vllm: draw each sample from its own seed, so that a run can be repeated; without, sampling is faster."""
    arguments: str = field(
        default="{}",
        metadata=must("a JSON object such as '{\"enforce_eager\": true}'", lambda text: isinstance(_json(text), dict))
        | VLLM,
    )
    """vllm: more arguments for its engine, as JSON: '{"enforce_eager": true}'."""
    transport: Literal["auto", "nccl", "gloo", "ipc"] = field(default="auto", metadata=TRAVEL)
    """How weights travel to engines in other processes. auto: ipc on the same GPU, nccl to another, gloo on CPUs."""
    check_weights: bool = field(default=True, metadata=TRAVEL)
    """Prove after each push that the engine holds the trainer's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "vllm" and self.kv_cache_dtype != "auto":
            raise UserError(
                "engine.kv_cache_dtype: it is the live engine's; give vLLM its own, as --engine.arguments "
                f'\'{{"kv_cache_dtype": "{self.kv_cache_dtype}"}}\''
            )

    @property
    def vllm_arguments(self) -> dict[str, Any]:
        return _json(self.arguments)


@dataclass(frozen=True, kw_only=True)
class ClusterSection(Checked):
    """The Ray cluster that workers live on, where there are any."""

    prefix: ClassVar = "cluster."

    address: str | None = field(default=None, metadata=needs(("part", "workers")) | MAY_CHANGE)
    """HOST:PORT of a running cluster, or 'auto' for this machine's. None: one is started here for the run."""
    deadline: float = field(default=1800.0, metadata=ABOVE_0 | needs(("part", "workers")) | MAY_CHANGE)
    """Longest time, in seconds, that one call to a worker may take before the run ends and says who did not answer."""
    heartbeat: float = field(default=30.0, metadata=ABOVE_0)
    """Longest time, in seconds, that a worker or Ray itself may be stopped (as by SIGSTOP) before it is killed."""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
