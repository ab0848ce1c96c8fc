"""Sampling and training in turns: what ``tandem ppo`` and ``tandem grpo`` share."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tandem.assembly.configs import CriticSection, OnlineConfig
from tandem.assembly.inputs import digest_inputs
from tandem.assembly.models import (
    policy_trainer,
    reference_scorer,
    require_engine,
    reward_scorer,
    scalar_trainer,
)
from tandem.assembly.placing import Homes, Sampler
from tandem.assembly.wiring import (
    check_out,
    describe_counts,
    evaluation_due,
    load_data,
    optim_params,
    print_plan,
    session,
    tokenizing,
)
from tandem.data.order import Order
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts, build_prompts
from tandem.errors import UserError
from tandem.models.description import describe_source
from tandem.models.limits import read_limits
from tandem.models.loading import load_tokenizer, pick_device
from tandem.rewards.function import FunctionReward
from tandem.rewards.model import RewardModel, require_same_tokenizer, same_tokenizer
from tandem.rewards.process import RewardProcess
from tandem.roles import Algorithm, Reward, Seat
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import Judge, sample_groups
from tandem.runs.progress import say
from tandem.schedules.sync import OnlineRoles, Sync
from tandem.seeds import derive_seed
from tandem.types import Group, Limits, Prompt, SamplingParams
from tandem.workers.process import Build


def run_online(config: OnlineConfig, algorithm: Algorithm, critic: CriticSection | None, title: str) -> Path | None:
    """Trains and exports to ``<out>/model``, which is returned. None after a dry run."""
    if (model := check_out(config, title)) is not None:
        return model
    return Online(config, algorithm, critic, title).run()


class Online:
    """Everything an online run needs, loaded and checked in the order in which a mistake is cheapest to find."""

    def __init__(self, config: OnlineConfig, algorithm: Algorithm, critic: CriticSection | None, title: str) -> None:
        self.config, self.algorithm, self.critic, self.title = config, algorithm, critic, title
        self._check_sampling()
        require_engine(config.engine)
        self.homes = Homes(config.model, config.placement, config.cluster, config.engine, [*self._sources(), "engine"])
        self.homes.check()
        # Begun first, so that it imports the functions while the data is read.
        names = [*config.reward.reward, *config.online.eval_reward]
        self.judging = RewardProcess(names, deadline_s=config.reward.reward_deadline) if names else None
        rows, eval_rows = load_data(config.data)
        self.tokenizer = self._load_tokenizer(config.model.model)
        self._check_tokenizers()
        self.prompts, self.counts = self._tokenize(rows)
        self.eval_prompts = self._tokenize(eval_rows)[0] if eval_rows is not None else []
        functions = self.judging.rewards() if self.judging else []
        self.inputs = digest_inputs({"data": rows, "eval_data": eval_rows}, functions, self._sources())
        check_out(config, title, self.inputs)
        trained_on = len(config.reward.reward)
        self.functions, self.eval_rewards = functions[:trained_on], functions[trained_on:]
        require_columns(self.functions, self.prompts, config.data.data)
        require_columns(self.eval_rewards or self.functions, self.eval_prompts, config.data.eval_data)
        self.sampling_params = SamplingParams(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            min_p=config.sampling.min_p,
            stop=config.sampling.stop,
        )

    def run(self) -> Path | None:
        """Trains and exports. None after a dry run."""
        config = self.config
        with ExitStack() as stack:
            if self.judging is not None:
                stack.callback(self.judging.close)
            if config.run.dry_run:
                print_plan(config, self._uses())
                return None
            homes = stack.enter_context(self.homes)
            models = self._build(homes)
            trainers = {role: seat for role, seat in models.items() if role in ("actor", "critic")}
            sampler = homes.sampler(
                config.sampling, seed=config.run.seed, vocabulary=len(self.tokenizer), others=models
            )
            started = stack.enter_context(
                session(
                    config,
                    trainers,
                    title=self.title,
                    leads=self.algorithm.leads,
                    counts=self.counts,
                    inputs=self.inputs,
                )
            )
            schedule = Sync(steps=config.run.steps, prompts_per_step=config.sampling.prompts_per_step)
            schedule.run(self._roles(models, sampler), started)
            return started.finish(models["actor"])

    def _sources(self) -> dict[str, str]:
        """The models of the run by role, and where each is loaded from."""
        config = self.config
        sources = {"actor": config.model.model}
        if config.reward.reward_model is not None:
            sources["reward"] = config.reward.reward_model
        if self.algorithm.needs_reference:
            sources["reference"] = config.online.reference or config.model.model
        if self.critic is not None:
            sources["critic"] = self.critic.critic or config.reward.reward_model or config.model.model
        return sources

    def _build(self, homes: Homes) -> dict[str, Seat]:
        """Every trainer and scorer by role, each in its own place."""
        config, sources = self.config, self._sources()
        steps = config.run.steps
        options = {
            "temperature": config.sampling.temperature,
            "entropy": True,
            "entropy_gradient": self.algorithm.entropy_gradient,
        }
        section = config.model
        optim = optim_params(config.optim, total_steps=steps)
        builds: dict[str, Build] = {
            "actor": partial(policy_trainer, section=section, loss=self.algorithm.loss, optim=optim, options=options),
            "reward": partial(reward_scorer, section=section, source=sources.get("reward", "")),
            "reference": partial(
                reference_scorer,
                section=section,
                source=sources.get("reference", ""),
                temperature=config.sampling.temperature,
            ),
        }
        if self.critic is not None:
            builds["critic"] = partial(
                scalar_trainer,
                section=section,
                source=sources["critic"],
                new_head="zero",
                seed=config.run.seed,
                loss=self.algorithm.value_loss,
                optim=optim_params(config.optim, total_steps=steps, learning_rate=self.critic.critic_learning_rate),
            )
        models: dict[str, Seat] = {}
        for role, source in sources.items():
            say(f"loading the {role} from {source}")
            models[role] = homes.place(role, builds[role])
            say(f"  {models[role].call('describe')}")
        return models

    def _roles(self, models: dict[str, Seat], sampler: Sampler) -> OnlineRoles:
        config = self.config
        order = Order(len(self.prompts), config.run.seed)
        rewards = self._rewards(models)
        judge = self._judge(rewards)
        held_out_judge = unweighted(self.eval_rewards) if self.eval_rewards else None

        def sample(prompts: Seq[Prompt], step: int, samples: int = config.sampling.samples_per_prompt) -> list[Group]:
            return sample_groups(
                sampler.engine,
                prompts,
                self.sampling_params,
                samples_per_prompt=samples,
                seed=config.run.seed,
                step=step,
            )

        def evaluate(step: int) -> list[Group]:
            if not self.eval_prompts or not evaluation_due(config.run, config.data, step):
                return []
            groups = sample(self.eval_prompts, 0, 1)
            (held_out_judge or judge)(groups, derive_seed(config.run.seed, "judge", 0))
            return groups

        return OnlineRoles(
            prompts=lambda positions: [self.prompts[i] for i in order.take(positions)],
            sample=sample,
            judge=lambda groups, step: judge(groups, derive_seed(config.run.seed, "judge", step)),
            prepare=Preparation(
                algorithm=self.algorithm,
                reference=models.get("reference"),
                critic=models.get("critic"),
                actor=models["actor"],
                old_logp=config.online.old_logp,
                epochs=config.online.epochs,
                minibatches=config.online.minibatches,
                max_new_tokens=config.sampling.max_new_tokens,
                seed=config.run.seed,
            ),
            actor=models["actor"],
            critic=models.get("critic"),
            push_weights=lambda step: sampler.push(models["actor"].call("version")),
            evaluate=evaluate,
            samples=config.sampling.prompts_per_step * config.sampling.samples_per_prompt,
            held_out=len(self.eval_prompts),
            ended=lambda: sampler.engine.ended,
            memory=lambda: models["actor"].call("memory_peak"),
        )

    def _rewards(self, models: dict[str, Seat]) -> list[Reward]:
        source = self.config.reward.reward_model
        if source is None:
            return list(self.functions)
        tokenizer = self._load_tokenizer(source)
        reads_ids = same_tokenizer(self.tokenizer, tokenizer)
        return [*self.functions, RewardModel(models["reward"], tokenizer, reads_ids=reads_ids)]

    def _judge(self, rewards: list[Reward]) -> Judge:
        section = self.config.reward
        return replace(
            unweighted(rewards),
            weights=section.reward_weights or (1.0,) * len(rewards),
            missing_eos=section.missing_eos,
            missing_eos_penalty=section.missing_eos_penalty,
        )

    def _check_sampling(self) -> None:
        sampling = self.config.sampling
        if sampling.samples_per_prompt < self.algorithm.min_samples:
            raise UserError(
                f"samples_per_prompt: {self.title} compares the samples of a prompt with one another and needs "
                f"{self.algorithm.min_samples} or more, got {sampling.samples_per_prompt}"
            )
        if sampling.temperature == 0:
            raise UserError("temperature: 0 is greedy, all samples of a prompt would be equal; give more than 0")
        truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if truncated and self.config.engine.kind == "vllm" and self.config.online.old_logp == "sampler":
            raise UserError(
                "old_logp: vLLM reports truncated log-probs only, which would bias the ratios; with top_k, top_p or "
                "min_p add --old-logp trainer"
            )

    def _load_tokenizer(self, source: str) -> Any:
        return load_tokenizer(source, trust_remote_code=self.config.model.trust_remote_code)

    def _check_tokenizers(self) -> None:
        """The reference and the critic read the policy's token ids."""
        for role, source in self._sources().items():
            if role in ("reference", "critic") and source != self.config.model.model:
                require_same_tokenizer(
                    self.tokenizer, self._load_tokenizer(source), policy="the model", other=f"the {role}"
                )

    def _tokenize(self, rows: Rows) -> tuple[list[Prompt], Counts]:
        data = self.config.data
        with tokenizing(rows) as on_progress:
            return build_prompts(
                rows,
                self.tokenizer,
                data.max_length,
                data.long_rows,
                limits=self._limits(),
                max_new_tokens=self.config.sampling.max_new_tokens,
                on_progress=on_progress,
            )

    def _limits(self) -> list[Limits]:
        """Of the engine, and of every model that reads the policy's token ids."""
        code = self.config.model.trust_remote_code
        limits = [
            read_limits(source, head="lm" if role in ("actor", "reference") else "scalar", trust_remote_code=code)
            for role, source in self._sources().items()
            if role != "reward" or same_tokenizer(self.tokenizer, self._load_tokenizer(source))
        ]
        return [*limits, Limits(positions=self.config.engine.max_length, whose="the engine (engine.max_length)")]

    def _uses(self) -> dict[str, str]:
        section, homes = self.config.model, self.homes
        sampling, engine = self.config.sampling, self.config.engine
        samples = sampling.prompts_per_step * sampling.samples_per_prompt
        epochs = self.config.run.steps * sampling.prompts_per_step / len(self.prompts)
        uses = {
            "model" if role == "actor" else role: describe_source(
                source, scalar=role in ("reward", "critic"), trust_remote_code=section.trust_remote_code
            )
            + f", {pick_device(section.device)}, {section.dtype}{homes.where(role)}"
            for role, source in self._sources().items()
        }
        place = homes.where("engine")
        return uses | {
            "rewards": ", ".join([*self.config.reward.reward, *(["reward_model"] if "reward" in uses else [])]),
            "engine": f"{engine.kind}{place or ', on the actor' + chr(39) + 's devices'}, {sampling.max_slots} slots",
            "prompts": f"{describe_counts(self.counts)}, gone through {epochs:.2f} times",
            "a step": f"{samples} samples of at most {sampling.max_new_tokens} tokens, "
            f"{self.config.online.epochs * self.config.online.minibatches} optimizer steps",
            "held out": f"{len(self.eval_prompts)} prompts" if self.eval_prompts else "none",
        }


def require_columns(rewards: Seq[FunctionReward], prompts: Seq[Prompt], dataset: str | None) -> None:
    """Raises UserError where a reward wants a column that no row of a dataset has."""
    columns = {name for prompt in prompts for name in prompt.columns}
    for reward in rewards if prompts else ():
        reward.require_columns(columns, dataset or "the dataset")


def unweighted(rewards: Seq[Reward]) -> Judge:
    """The plain sum of rewards."""
    return Judge(rewards=tuple(rewards), weights=(1.0,) * len(rewards))
