"""A reward model reads what was sampled, with the policy's tokenizer or its own."""

import pytest
import torch
from conftest import make_module, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tandem.errors import UserError
from tandem.models.loading import load_scalar
from tandem.rewards.model import RewardModel, require_same_tokenizer, same_tokenizer
from tandem.roles import RewardBatch
from tandem.training.trainer import LocalScorer
from tandem.types import Rollout


def other_tokenizer():
    """The same characters under other ids."""
    characters = "9876543210zyxwvutsrqponmlkjihgfedcba "
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rollout(tokenizer, prompt, completion, stop):
    ids = tokenizer(prompt)["input_ids"]
    tail = tokenizer(completion)["input_ids"] + ([tokenizer.eos_token_id] if stop == "eos" else [])
    n, m = len(ids), len(tail)
    return Rollout(
        prompt_id=prompt,
        sample_index=0,
        token_ids=ids + tail,
        prompt_length=n,
        trainable=[False] * n + [True] * m,
        behaviour_logp=[0.0] * (n + m),
        untruncated_logp=[0.0] * (n + m),
        stop=stop,
        completion=completion,
    )


@pytest.mark.parametrize("own", [False, True])
def test_score_is_the_plain_classifiers(tmp_path, own):
    policy_tokenizer = make_tokenizer()
    tokenizer = other_tokenizer() if own else policy_tokenizer
    make_module("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_scalar(tmp_path / "base", new_head="random", device="cpu")
    assert same_tokenizer(policy_tokenizer, model.tokenizer) != own
    model.export(tmp_path / "rm")

    samples = [("ab", "cde", "eos"), ("xyz", "a", "length")]
    rollouts = [rollout(policy_tokenizer, *sample) for sample in samples]
    batch = RewardBatch(prompts=["ab", "xyz"], completions=["cde", "a"], rollouts=rollouts)
    reward = RewardModel(LocalScorer(model, token_budget=100), tokenizer=model.tokenizer if own else None)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ids = [tokenizer("abcde")["input_ids"] + [1], tokenizer("xyza")["input_ids"]]
    with torch.no_grad():
        want = [plain(input_ids=torch.tensor([i])).logits.item() for i in ids]
    assert reward.score(batch) == pytest.approx(want, abs=1e-5)


def test_a_critic_with_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="the critic and the model have different tokenizers"):
        require_same_tokenizer(make_tokenizer(), other_tokenizer(), policy="the model", other="the critic")
