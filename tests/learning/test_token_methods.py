"""Each method with a loss of sampled tokens raises its reward over 3 seeds, on prompts that never come twice."""

import copy
import statistics

import pytest

from tandem.config import with_keys
from tandem.engines.live.engine import LiveEngine
from tandem.methods.table import method_class
from tandem.models.loading import prepare_module
from tandem.rollout.prepare import Preparation
from tandem.rollout.sampling import Judge, sample_groups
from tandem.tasks import letters, tiny
from tandem.training.optim import OptimParams
from tandem.training.scorer import LocalScorer
from tandem.training.trainer import LocalTrainer
from tandem.types import Prompt, SamplingParams
from tandem.workers.homes import seat_of

STEPS, PROMPTS, SAMPLES = 5, 16, 4
METHODS = {
    "reinforce": {"kl_coef": 0.01},
    "reinforce-pp": {},
    "reinforce-pp-baseline": {"kl_coef": 0.001},
    "rloo": {"kl_coef": 0.01, "correction": "token_tis"},
    "grpo": {"entropy_coef": 0.001, "correction": "icepop"},
    "dr-grpo": {},
    "dapo": {},
    # The paper's bounds are for models whose sequences hardly move in a step.
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
    "cispo": {},
}


class EarlyLetters:
    """The share of ten places that hold one of the first five letters."""

    name = "early"

    def score(self, batch):
        return [sum(letter in "abcde" for letter in text) / 10 for text in batch.completions]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_the_reward_rises(name, seed):
    method = with_keys(method_class(name)(), **METHODS[name])
    model = prepare_module(tiny.build_model(seed, hidden_size=64, layers=1), tiny.build_tokenizer())
    frozen = prepare_module(copy.deepcopy(model.module), model.tokenizer)
    engine = LiveEngine(model.module, model.tokenizer)
    optim = OptimParams(learning_rate=1e-2, total_steps=STEPS)
    trainer = LocalTrainer(model, method.loss, optim, token_budget=4096, asks=method.asks)
    prepare = Preparation(
        method=method,
        models={"reference": seat_of(LocalScorer(frozen, token_budget=4096)), "actor": seat_of(trainer)},
        old_logp="trainer" if method.importance.correction != "none" else "sampler",
        minibatches=2,
        max_new_tokens=10,
        seed=seed,
    )
    texts = letters.prompts(STEPS * PROMPTS, seed)
    state, rewards = method.initial_state(), []
    for step in range(STEPS):
        prompts = [
            Prompt(prompt_id=f"{step}-{i}", prompt=text, token_ids=tuple(model.tokenizer(text)["input_ids"]))
            for i, text in enumerate(texts[step * PROMPTS : (step + 1) * PROMPTS])
        ]
        groups = sample_groups(
            engine, prompts, SamplingParams(max_new_tokens=10), samples_per_prompt=SAMPLES, seed=seed, step=step
        )
        Judge(rewards=(EarlyLetters(),), weights=(1.0,))(groups)
        rewards.append(statistics.fmean(reward for group in groups for reward in group.rewards))
        prepared = prepare([group for group in groups if method.keep(group)], state, step)
        state = prepared.state
        for minibatch in prepared:
            metrics = prepared.metrics | trainer.forward_backward(minibatch)
            trainer.optim_step()
            assert 0 < metrics["effective_sample_size"] <= 1 + 1e-6
    # A token drawn at random is one of the five 5 times in 13, and the first end-of-sequence ends an answer.
    assert rewards[0] < 0.35
    assert rewards[-1] > 0.6, rewards
