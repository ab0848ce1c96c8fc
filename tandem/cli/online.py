"""Sampling and training in turns: what ``tandem ppo`` and ``tandem grpo`` share."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tandem.cli.sections import (
    DataSection,
    ModelSection,
    OptimSection,
    RewardSection,
    RunSection,
    SamplingSection,
)
from tandem.cli.wiring import (
    check_out,
    describe_counts,
    describe_model,
    due_evaluation,
    load_data,
    model_options,
    optim_params,
    print_plan,
    session,
    tokenizing,
)
from tandem.data.order import Order
from tandem.data.rows import Rows
from tandem.data.tokenize import Counts, build_prompts
from tandem.engines.live import LiveEngine
from tandem.errors import UserError, expect
from tandem.models.forward import LoadedModel
from tandem.models.loading import load_causal, load_scalar
from tandem.rewards.function import load_reward
from tandem.rewards.model import RewardModel, require_same_tokenizer, same_tokenizer
from tandem.roles import Algorithm, Metrics, Reward
from tandem.rollout.prepare import Preparation, rollout_metrics
from tandem.rollout.sampling import Judge, sample_groups
from tandem.schedules.sync import OnlineRoles, Sync
from tandem.training.trainer import LocalScorer, LocalTrainer
from tandem.types import Group, Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class OnlineSection:
    """How a step's samples are trained on, and judged when held out."""

    reference: str | None = None
    """Folder of the frozen reference that the KL is taken to. None: the model as it was at the start."""
    epochs: int = 1
    """Times that a step's samples are gone through."""
    minibatches: int = 1
    """Optimizer steps in one epoch."""
    old_logp: Literal["sampler", "trainer"] = "sampler"
    """What ratios are taken against: the sampler's log-probs, or the trainer's own from a forward more."""
    eval_reward: tuple[str, ...] = ()
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


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """The critic of an algorithm that has one."""

    critic: str | None = None
    """Folder it starts from. None: the reward model, or without one the model with a head that says 0."""
    critic_learning_rate: float | None = None
    """Its learning rate. None: --learning-rate."""

    def __post_init__(self) -> None:
        expect(self, "more than 0", lambda value: value > 0, "critic_learning_rate")


class Online:
    """Everything an online run needs, loaded and checked in the order in which a mistake is cheapest to find."""

    def __init__(self, config: OnlineConfig, algorithm: Algorithm, critic: CriticSection | None, title: str) -> None:
        check_out(config.run)
        self.config, self.algorithm, self.title = config, algorithm, title
        if config.sampling.temperature == 0:
            raise UserError("temperature: 0 is greedy, all samples of a prompt would be equal; give more than 0")
        functions: list[Reward] = [load_reward(name) for name in config.reward.reward]
        self.eval_rewards: list[Reward] = [load_reward(name) for name in config.online.eval_reward]
        rows, eval_rows = load_data(config.data)
        self.policy = load_causal(config.model.model, **model_options(config.model))
        self.prompts, self.counts = self._tokenize(rows)
        self.eval_prompts = self._tokenize(eval_rows)[0] if eval_rows is not None else []
        self.rewards = functions + self._load_reward_model()
        self.reference = self._load_reference()
        self.critic = self._load_critic(critic) if critic is not None else None
        self.critic_learning_rate = critic.critic_learning_rate if critic is not None else None
        self.sampling_params = SamplingParams(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            min_p=config.sampling.min_p,
            stop=config.sampling.stop,
        )

    def run(self) -> Path | None:
        """Trains and exports to ``<out>/model``, which is returned. None after a dry run."""
        config = self.config
        if config.run.dry_run:
            print_plan(config, self._uses())
            return None
        steps = config.run.steps * config.online.epochs * config.online.minibatches
        actor = LocalTrainer(
            self.policy,
            self.algorithm.loss,
            optim_params(config.optim, total_steps=steps),
            token_budget=config.model.token_budget,
            temperature=config.sampling.temperature,
            entropy=True,
            entropy_gradient=self.algorithm.entropy_gradient,
        )
        critic = None
        if self.critic is not None:
            critic = LocalTrainer(
                self.critic,
                self.algorithm.value_loss,
                optim_params(config.optim, total_steps=steps, learning_rate=self.critic_learning_rate),
                token_budget=config.model.token_budget,
            )
        trainers = {"actor": actor} | ({"critic": critic} if critic is not None else {})
        with session(config, config.run, trainers, title=self.title, counts=self.counts) as started:
            Sync(steps=config.run.steps).run(self._roles(actor, critic), started)
            return started.finish(actor)

    def _roles(self, actor: LocalTrainer, critic: LocalTrainer | None) -> OnlineRoles:
        config = self.config
        engine = LiveEngine(
            self.policy.module,
            self.policy.tokenizer,
            max_slots=config.sampling.max_slots,
            version=lambda: actor.version,
        )
        order = Order(len(self.prompts), config.run.seed)
        judge = self._judge()
        held_out_judge = unweighted(self.eval_rewards) if self.eval_rewards else None

        def sample(prompts: Seq[Prompt], step: int, samples: int = config.sampling.samples_per_prompt) -> list[Group]:
            return sample_groups(
                engine,
                prompts,
                self.sampling_params,
                samples_per_prompt=samples,
                seed=config.run.seed,
                step=step,
            )

        def evaluate() -> Metrics:
            groups = sample(self.eval_prompts, 0, 1)
            (held_out_judge or judge)(groups)
            return {name: v for name, v in rollout_metrics(groups).items() if name.startswith(EVAL_METRICS)}

        return OnlineRoles(
            prompts=lambda step: [self.prompts[i] for i in order.batch(step, config.sampling.prompts_per_step)],
            sample=sample,
            judge=judge,
            prepare=Preparation(
                algorithm=self.algorithm,
                reference=self._scorer(self.reference, config.sampling.temperature) if self.reference else None,
                critic=critic,
                actor=actor,
                old_logp=config.online.old_logp,
                epochs=config.online.epochs,
                minibatches=config.online.minibatches,
                max_new_tokens=config.sampling.max_new_tokens,
                seed=config.run.seed,
            ),
            actor=actor,
            critic=critic,
            # The live engine samples on the actor's own weights: there is nothing to push.
            push_weights=lambda step: None,
            evaluate=due_evaluation(config.run, config.data, evaluate if self.eval_prompts else None),
        )

    def _judge(self) -> Judge:
        section = self.config.reward
        return replace(
            unweighted(self.rewards),
            weights=section.reward_weights or (1.0,) * len(self.rewards),
            missing_eos=section.missing_eos,
            missing_eos_penalty=section.missing_eos_penalty,
        )

    def _scorer(self, model: LoadedModel, temperature: float = 1.0) -> LocalScorer:
        return LocalScorer(model, token_budget=self.config.model.token_budget, temperature=temperature)

    def _tokenize(self, rows: Rows) -> tuple[list[Prompt], Counts]:
        data = self.config.data
        with tokenizing(rows) as on_progress:
            return build_prompts(rows, self.policy.tokenizer, data.max_length, data.long_rows, on_progress=on_progress)

    def _load_reward_model(self) -> list[Reward]:
        source = self.config.reward.reward_model
        if source is None:
            return []
        model = load_scalar(source, new_head="refuse", **model_options(self.config.model))
        shared = same_tokenizer(self.policy.tokenizer, model.tokenizer)
        return [RewardModel(self._scorer(model), tokenizer=None if shared else model.tokenizer)]

    def _load_reference(self) -> LoadedModel | None:
        if not self.algorithm.needs_reference:
            return None
        source = self.config.online.reference or self.config.model.model
        model = load_causal(source, **model_options(self.config.model))
        require_same_tokenizer(self.policy.tokenizer, model.tokenizer, policy="the model", other="the reference")
        return model

    def _load_critic(self, section: CriticSection) -> LoadedModel:
        source = section.critic or self.config.reward.reward_model or self.config.model.model
        # It reads the policy's token ids, so it must share the tokenizer.
        model = load_scalar(source, new_head="zero", **model_options(self.config.model))
        require_same_tokenizer(self.policy.tokenizer, model.tokenizer, policy="the model", other="the critic")
        return model

    def _uses(self) -> dict[str, str]:
        sampling = self.config.sampling
        samples = sampling.prompts_per_step * sampling.samples_per_prompt
        epochs = self.config.run.steps * sampling.prompts_per_step / len(self.prompts)
        uses = {"model": describe_model(self.policy)}
        others: dict[str, Any] = {"reference": self.reference, "critic": self.critic}
        uses |= {role: describe_model(model) for role, model in others.items() if model is not None}
        return uses | {
            "rewards": ", ".join(reward.name for reward in self.rewards),
            "engine": f"live, on the model's own weights, {sampling.max_slots} slots",
            "prompts": f"{describe_counts(self.counts)}, gone through {epochs:.2f} times",
            "a step": f"{samples} samples of at most {sampling.max_new_tokens} tokens, "
            f"{self.config.online.epochs * self.config.online.minibatches} optimizer steps",
            "held out": f"{len(self.eval_prompts)} prompts" if self.eval_prompts else "none",
        }


def unweighted(rewards: Seq[Reward]) -> Judge:
    """The plain sum of rewards."""
    return Judge(rewards=tuple(rewards), weights=(1.0,) * len(rewards))


EVAL_METRICS = ("reward", "response_length", "eos_share")
"""What is reported of held-out samples: names, or how names start."""
