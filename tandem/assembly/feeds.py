"""What a run's items are made of: a dataset's rows, or prompts with an engine and rewards. Read and checked first."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tandem.assembly.asked_once import AskedOnce
from tandem.assembly.configs.evaluation_sections import EvaluationSection
from tandem.assembly.configs.methods import RowsConfig, RunConfig, SamplesConfig
from tandem.assembly.configs.role_sections import is_reward_model
from tandem.assembly.configs.sections import DataSection
from tandem.assembly.configs.uses import UseConfig
from tandem.assembly.digests import digest_inputs
from tandem.assembly.judging import judge_of, reward_models, score_scales, start_rewards
from tandem.assembly.models import heads, require_engine
from tandem.assembly.placing import Homes
from tandem.assembly.reading import by_key, describe_data, load_data, load_held_out, ordered, tokenized
from tandem.assembly.wiring import Wiring
from tandem.data.chat import set_template
from tandem.data.items import Counts, build_pairs, build_prompts, build_sequences, build_solutions, build_unpaired
from tandem.data.order import InTurn, Order
from tandem.data.room import Room
from tandem.data.rows import Dataset
from tandem.data.tokenize import require_same_tokenizer, same_tokenizer
from tandem.errors import UserError, counted
from tandem.futures import Future
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import read_limits
from tandem.rewards.function import FunctionReward
from tandem.rewards.model import SCORED, ScoreScale, score_scale
from tandem.roles import Metrics, Seat, Source
from tandem.rollout.ahead import made_up
from tandem.rollout.evaluate import Evaluation, HeldOut, HeldOutRows, HeldOutSamples, named
from tandem.rollout.judging import Judge
from tandem.rollout.measure import held_out_names
from tandem.rollout.prepare import Preparation
from tandem.rollout.recorded import Replayed
from tandem.rollout.rows import Tokenized
from tandem.rollout.sampling import Sampling
from tandem.runs.identity import Inputs
from tandem.runs.progress import Progress, say
from tandem.schedules.buffer import Buffer
from tandem.schedules.session import Evaluate
from tandem.types import Limits, Prompt, Sequence

PART = re.compile("/reward/")
"""In the name of a held-out metric that is a part of a reward."""

BuildItems = Callable[..., tuple[list[Any], Counts]]
"""As ``build_sequences``."""


@dataclass(frozen=True, kw_only=True)
class Fed:
    """A feed at work: its part of a ``Crew``."""

    source: Source[Any]
    prepare: Preparation
    push_weights: Callable[[int], Metrics] | None = None
    evaluate: Evaluate = lambda step, progress: Evaluation()
    ahead: Callable[[Progress], Seq[Future[Any]]] = lambda progress: ()


class Feed:
    """The items of a run before anything runs: read, tokenized, and known to fit. What most kinds do not do is here."""

    size: int
    """Rows that are gone through."""
    steps: int
    """The step after which the run ends."""
    planned: int
    """The length that its learning rate follows, and what else falls or begins with its steps."""
    inputs: Inputs
    order: Order | InTurn | Replayed
    """The order in which the run meets its items."""
    counts: Counts | None = None
    """What became of its rows; None where that is not known before they are read."""
    once: AskedOnce | None = None
    """What is asked of models before the first step, and never again."""
    idle: Collection[str] = ()
    """Keys of the config that have no effect on such a run."""

    @property
    def bits(self) -> float:
        """About how much there is to learn in the run's items: 1 bit a trained token, pair, label or sample."""
        raise TypeError(type(self).__name__)

    def check(self) -> None:
        """Raises UserError where what was read does not fit together."""

    def uses(self) -> dict[str, str]:
        """What the run would use, for a dry run."""
        raise TypeError(type(self).__name__)

    def begin(self, homes: Homes) -> None:
        """Begins what can be made while the models are loaded."""

    def start(self, models: Mapping[str, Seat]) -> Fed:
        """Starts what it needs beside the models."""
        raise TypeError(type(self).__name__)

    def numbers(self, models: Mapping[str, Seat], progress: Progress) -> Mapping[str, float | None]:
        """What is to stand in the config of the model as it is now, where it is written; None: not there."""
        return {}


class RowsFeed(Feed):
    """The rows of a dataset."""

    order: Order
    counts: Counts
    once: AskedOnce

    def __init__(self, config: RowsConfig) -> None:
        self.config = config
        kind = config.reads.kind
        self.rows, held_out = load_data(config.data, kind), load_held_out(config.evaluation, config.data, kind)
        self.tokenizer = load_tokenizers(config)
        limits = limits_of_models(config, self.tokenizer)
        self.room = Room(config.data.max_length, limits, long_rows=config.data.long_rows)
        self.longest = self.room.limit
        if config.method.asks.divergence is not None:
            require_words(limits, 1 + max(self.tokenizer.get_vocab().values()))
        self.examples, self.counts = self._tokenize(self.rows)
        self.held_out = {name: self._tokenize(one)[0] for name, one in held_out.items()}
        self.size = len(self.examples)
        self.steps = self.planned = config.steps_over(self.size)
        self.order = ordered(self.rows, self.counts, config.run.seed)
        self.once = AskedOnce(
            config=config,
            rows=self.examples,
            held_out=self.held_out,
            order=self.order,
            steps=self.steps,
            longest=self.longest,
        )
        self.inputs = digest_inputs(
            by_key(self.rows, held_out), models=config.sources, template=config.data.chat_template
        )

    @property
    def bits(self) -> float:
        rows = self.examples
        return float(sum(sum(row.trainable) if isinstance(row, Sequence) else 1 for row in rows))

    def uses(self) -> dict[str, str]:
        config = self.config
        items = self.steps * config.rows.batch_size
        return {
            "data": describe_data(self.rows, self.counts, self.order, items, self.steps),
            "held out": describe_sets(self.held_out, "rows"),
        } | self.once.uses()

    def check(self) -> None:
        """Says what the method has to say about the rows. Raises UserError where it can learn nothing from them, or
        the held-out ones cannot be measured."""
        method = self.config.method
        for note in method.notes(self.examples):
            say(f"data: {note}")
        if empty := sum(isinstance(row, Sequence) and sum(row.trainable) == 1 for row in self.examples):
            say(f"data: {empty} of {self.size} rows have an empty answer: its end alone is learned")
        for rows in self.held_out.values():
            method.aside(rows, self.longest)

    def start(self, models: Mapping[str, Seat]) -> Fed:
        measure = self.measure({**models, **self.once.seats()}, self.held_out)
        evaluate = when_due(self.config.evaluation, measure, last=self.steps)
        return Fed(source=Tokenized(self.examples), prepare=measure.prepare, evaluate=evaluate)

    def measure(self, models: Mapping[str, Seat], sets: Mapping[str, Seq[Any]]) -> HeldOutRows:
        """What measures the policy on some rows."""
        prepare = Preparation(method=self.config.method, models=models, longest=self.longest, seed=self.config.run.seed)
        return HeldOutRows(sets=sets, actor=models["actor"], prepare=prepare)

    def numbers(self, models: Mapping[str, Seat], progress: Progress) -> Mapping[str, float | None]:
        """Of a reward model, the mean and the spread of its scores, of held-out rows or, without any, of its own."""
        if self.config.method.head != "scalar" or self.config.reads.kind != "preferences":
            return {}
        rows = [row for one in self.held_out.values() for row in one] or self.examples
        with progress.phase("scoring"):
            scale = score_scale(models["actor"], rows[:SCORED])
        if scale is None:
            progress.note("the scores of all rows are one number, or none: the model's config says nothing of them")
            return dict.fromkeys(ScoreScale._fields)
        return scale._asdict()

    def _tokenize(self, rows: Dataset) -> tuple[list[Any], Counts]:
        return tokenized(builders(self.config.data)[self.config.reads.kind], rows, self.tokenizer, self.room)


class SamplesFeed(Feed):
    """Prompts, an engine that answers them, and what judges the answers."""

    order: Order
    counts: Counts
    wiring: Wiring

    def __init__(self, config: SamplesConfig, stack: ExitStack) -> None:
        """``stack``: what ends the processes of its rewards."""
        self.config = config
        # Begun first, so that it imports the functions while the data is read.
        names = [*config.reward.reward, *config.evaluation.eval_reward]
        rewards_of = start_rewards(config.reward, names, config.run.out, stack)
        self.rows = load_data(config.data, "prompts")
        held_out = load_held_out(config.evaluation, config.data, "prompts")
        self.tokenizer = load_tokenizers(config)
        self.limits = limits_of_models(config, self.tokenizer)
        require_readers(self.limits, len(self.tokenizer))
        self.prompts, self.counts = self._tokenize(self.rows)
        self.held_out = {name: self._tokenize(one)[0] for name, one in held_out.items()}
        self.size = len(self.prompts)
        self.steps = self.planned = config.steps_over(self.size)
        self.order = ordered(self.rows, self.counts, config.run.seed)
        functions = rewards_of()
        self.inputs = digest_inputs(by_key(self.rows, held_out), functions, config.sources, config.data.chat_template)
        trained_on = len(config.reward.reward)
        self.functions, self.eval_rewards = functions[:trained_on], functions[trained_on:]

    def check(self) -> None:
        """Raises UserError where a reward wants a column that no row has, a reward model's scores have no scale, or a
        goal is a metric that no evaluation has."""
        score_scales(self.config.reward, self.config.model)
        require_columns(self.functions, self.prompts, self.config.data.data)
        section = self.config.evaluation
        # What a reward's parts are called, and what a method measures where nothing judges, is known once it has.
        if "judge of held-out samples" in self.config.parts and not any(
            map(PART.search, section.goals.metrics.values())
        ):
            measured = dict.fromkeys(held_out_names(section.eval_samples, section.eval_success), 0.0)
            section.goals.require(full for name in self.held_out for full in named(name, measured))
        for name, source in section.sets.items():
            require_columns(self.eval_rewards or self.functions, self.held_out[name], source)

    @property
    def bits(self) -> float:
        return float(self.steps * self.config.sampling.samples_per_step)

    def uses(self) -> dict[str, str]:
        config = self.config
        sampling, engine, step = config.sampling, config.engine, config.step
        items = self.steps * sampling.prompts_per_step
        place = config.placement.where("engine")
        buffer = Buffer(
            items_per_step=config.items_per_step, max_lag=config.schedule.max_lag, window=config.schedule.window
        )
        return {
            "rewards": ", ".join(config.reward.judges) or "none",
            "engine": f"{engine.kind}{place or ', on the actor' + chr(39) + 's devices'}, {sampling.max_slots} slots",
            "prompts": describe_data(self.rows, self.counts, self.order, items, self.steps),
            "a step": f"{sampling.samples_per_step} samples of at most {sampling.max_new_tokens} tokens, "
            + counted(step.sample_epochs * step.minibatches, "optimizer step"),
            "schedule": f"{buffer.size} prompts open, each trained on at most {buffer.bound} steps after it was begun"
            if buffer.max_lag
            else "synchronous",
            "held out": describe_sets(self.held_out, "prompts"),
        }

    def begin(self, homes: Homes) -> None:
        self.wiring = Wiring(
            homes=homes,
            sampling=self.config.sampling,
            seed=self.config.run.seed,
            vocabulary=len(self.tokenizer),
            schedule=self.config.schedule,
        )
        self.wiring.begin()

    def start(self, models: Mapping[str, Seat]) -> Fed:
        config = self.config
        engine = self.wiring.engine(models)
        source = Sampling(
            engine=engine.engine,
            prompts=self.prompts,
            params=config.sampling.params,
            samples_per_prompt=config.sampling.samples_per_prompt,
            judge=self._judge(models),
            seed=config.run.seed,
        )
        prepare = preparation(config, models)
        evaluate = when_due(config.evaluation, self._measure(source, prepare), last=self.steps)
        ahead = partial(self._ahead, models)
        return Fed(source=source, prepare=prepare, push_weights=engine.push, evaluate=evaluate, ahead=ahead)

    def _ahead(self, models: Mapping[str, Seat], progress: Progress) -> list[Future[Any]]:
        """Has the models of each step compile while the first samples are drawn, where engines are apart from them."""
        config, compile, homes = self.config, self.config.model.compile, self.wiring.homes
        on = compile == "on" or (compile == "auto" and homes.device().type == "cuda")
        if not on or homes.placement.home("engine") == "actor":
            return []
        batch = made_up(
            prompts=config.sampling.prompts_per_step // config.step.minibatches,
            samples=config.sampling.samples_per_prompt,
            prompt=sorted(len(prompt.token_ids) for prompt in self.prompts)[self.size // 2],
            longest=config.sampling.max_new_tokens,
            vocabulary=words_of(self.limits[0], len(self.tokenizer)),
            tokens=config.model.token_budget,
            ranks=max(1, homes.placement.workers("actor")),
        )
        needs = (*config.method.losses(), *(need.role for need in config.method.needs()))
        roles = [role for role in dict.fromkeys(needs) if role in models and not config.is_view(role)]
        progress.note(f"compiling for the {' and the '.join(roles)} while the first samples are drawn")
        return [models[role].submit("compile_ahead", batch) for role in roles]

    def _measure(self, source: Sampling, prepare: Preparation) -> HeldOutSamples:
        section, params, own = self.config.evaluation, source.params, tuple(self.eval_rewards)
        if section.eval_temperature is not None:
            params = replace(params, temperature=section.eval_temperature)
        return HeldOutSamples(
            sets=self.held_out,
            engine=source.engine,
            params=params,
            samples_per_prompt=section.eval_samples,
            judge=Judge(rewards=own, weights=(1.0,) * len(own)) if own else source.judge,
            success=section.eval_success,
            prepare=prepare,
            seed=self.config.run.seed,
        )

    def _judge(self, models: Mapping[str, Seat]) -> Judge:
        section = self.config.reward
        found = reward_models(section, self.config.model, models, self.tokenizer)
        return judge_of(section, [*self.functions, *found], self.config.sampling.max_new_tokens)

    def _tokenize(self, rows: Dataset) -> tuple[list[Prompt], Counts]:
        return tokenized(build_prompts, rows, self.tokenizer, room_to_sample(self.config, self.limits))


def room_to_sample(config: SamplesConfig | UseConfig, limits: Seq[Limits]) -> Room:
    """That of prompts. ``limits`` are of the models that read them and what is sampled, first of the policy."""
    policy, *others = limits
    own = Limits(positions=config.engine.max_length, whose="the engine (engine.max_length)")
    every = [policy.sampling, *others, own]
    return Room(config.data.max_length, every, config.sampling.max_new_tokens, long_rows=config.data.long_rows)


def preparation(config: SamplesConfig, models: Mapping[str, Seat]) -> Preparation:
    """What stands between a step's groups and the trainers."""
    return Preparation(
        method=config.method,
        models=models,
        old_logp=config.step.old_logp,
        epochs=config.step.sample_epochs,
        minibatches=config.step.minibatches,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.run.seed,
    )


def builders(data: DataSection) -> dict[str, BuildItems]:
    """What makes the items of a run of a dataset's rows, by the kind of the rows."""
    return {
        "demonstrations": partial(build_sequences, train_on=data.train_on),
        "text": partial(build_sequences, train_on="all"),
        "preferences": build_pairs,
        "unpaired": build_unpaired,
        "steps": partial(build_solutions, separator=data.separator, placeholder=data.step_placeholder),
    }


def check_sampling(config: SamplesConfig) -> None:
    """Raises UserError where the method could not learn from such samples, or the engine is not installed."""
    sampling, method = config.sampling, config.method
    at_least = method.samples.at_least
    if sampling.samples_per_prompt < at_least:
        raise UserError(
            f"samples_per_prompt: {method.title} compares the samples of a prompt with one another and needs "
            f"{at_least} or more, got {sampling.samples_per_prompt}"
        )
    config.reward.overlong(sampling.max_new_tokens)
    if sampling.temperature == 0:
        raise UserError("temperature: 0 is greedy, all samples of a prompt would be equal; give more than 0")
    require_engine(config.engine)


def load_tokenizers(config: RunConfig) -> Any:
    """The policy's. Raises UserError where a model that reads the policy's token ids has another one."""
    tokenizer = load_tokenizer(config.model.source)
    set_template(tokenizer, config.data.chat_template)
    for need in config.method.needs():
        source = config.sources[need.role]
        if source != config.model.model:
            other = load_tokenizer(source)
            require_same_tokenizer(tokenizer, other, policy="the model", other=f"the {need.role}")
    return tokenizer


def limits_of_models(config: RunConfig, tokenizer: Any) -> list[Limits]:
    """The limits of every model that reads the policy's token ids."""
    head_of = heads(config)
    return [
        read_limits(source, head=head_of[role])
        for role, source in config.sources.items()
        if not is_reward_model(role) or same_tokenizer(tokenizer, load_tokenizer(source))
    ]


def words_of(policy: Limits, tokens: int) -> int:
    """How many of the ``tokens`` of the tokenizer the policy may sample. Rows of its embedding beyond are padding."""
    return min(tokens, policy.vocabulary or tokens)


def require_readers(limits: Seq[Limits], tokens: int) -> None:
    """Raises UserError where a model lacks one of the ``tokens`` that the policy, the first of them, may sample."""
    policy, *others = limits
    sampled = words_of(policy, tokens)
    for other in others:
        if other.vocabulary is not None and other.vocabulary < sampled:
            raise UserError(
                f"{other.whose}: its embedding has {other.vocabulary} rows, and {policy.whose} may sample each of "
                f"{sampled} tokens; start both from the same base model"
            )


def require_words(limits: Seq[Limits], words: int) -> None:
    """Raises UserError where a model lacks one of the tokenizer's ``words``: distributions over them are compared."""
    for one in limits:
        if one.vocabulary is not None and one.vocabulary < words:
            raise UserError(
                f"{one.whose}: its embedding has {one.vocabulary} rows, and the tokenizer {words} tokens: the "
                "distributions of the models cannot be compared; start both from the same base model"
            )


def require_columns(rewards: Seq[FunctionReward], prompts: Seq[Prompt], dataset: str) -> None:
    """Raises UserError where a reward wants a column that no row of a dataset has, and says which some rows lack."""
    columns = {name for prompt in prompts for name in prompt.columns}
    for reward in rewards if prompts else ():
        reward.require_columns(columns, dataset)
        for name in filter(reward.names, sorted(columns)):
            if lacking := sum(prompt.columns.get(name) is None for prompt in prompts):
                say(f"{dataset}: {lacking} of {len(prompts)} rows have no {name!r}: reward {reward.name!r} gets None")


def when_due(section: EvaluationSection, measure: HeldOut, *, last: int) -> Evaluate:
    """Measures before the first step, every ``eval_every`` steps and after the last, where anything is held out."""

    def evaluate(step: int, progress: Progress) -> Evaluation:
        due = step in (0, last) or (section.eval_every > 0 and step % section.eval_every == 0)
        return measure(step, progress.phase) if section.sets and due else Evaluation()

    return evaluate


def describe_sets(sets: Mapping[str, Seq[Any]], what: str) -> str:
    """How much is held out: ``20 rows``, or of sets with names ``math 20, code 30 prompts``."""
    sizes = [f"{name} {len(items)}".lstrip() for name, items in sets.items()]
    return f"{', '.join(sizes)} {what}" if sizes else "none"
