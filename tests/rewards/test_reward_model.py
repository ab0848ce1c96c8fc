"""A reward model reads what was sampled, with the policy's tokenizer or its own."""

import re

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tandem.batch import Outputs
from tandem.data.tokenize import preference_pair, require_same_tokenizer, same_tokenizer
from tandem.errors import UserError
from tandem.models.loading import load_scalar
from tandem.rewards.model import RewardModel
from tandem.roles import RewardBatch
from tandem.training.scorer import LocalScorer
from tandem.types import Rollout
from tandem.workers.homes import seat_of


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
def test_score_is_the_plain_classifiers(tmp_path, own, caplog):
    policy_tokenizer = make_tokenizer()
    tokenizer = other_tokenizer() if own else policy_tokenizer
    make_module("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_scalar(tmp_path / "base", new_head="random", device="cpu")
    assert same_tokenizer(policy_tokenizer, model.tokenizer) != own
    model.export(tmp_path / "rm")

    # The second stopped at "zz", which its tokens have and its text has not; the third at once.
    samples = [
        ("ab", "cde", "eos"),
        ("ab", "cdezz", "stop_string"),
        ("ab", "zz", "stop_string"),
        ("xyz", "a", "length"),
    ]
    rollouts = [rollout(policy_tokenizer, *sample) for sample in samples]
    for cut in rollouts[1:3]:
        cut.completion = cut.completion.removesuffix("zz")
    batch = RewardBatch(
        prompts=[prompt for prompt, _, _ in samples], completions=[r.completion for r in rollouts], rollouts=rollouts
    )
    scorer = seat_of(LocalScorer(model, token_budget=4))
    reward = RewardModel(scorer, model.tokenizer, reads_ids=not own, token_budget=4)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ended = [tokenizer(text)["input_ids"] + [1] for text in ("abcde", "abcde", "ab")]
    ids = [*ended, tokenizer("xyza")["input_ids"]]
    with torch.no_grad():
        want = [plain(input_ids=torch.tensor([i])).logits.item() for i in ids]
    for _ in range(2):
        assert reward.score(batch) == pytest.approx(want, abs=1e-5)
    assert len(re.findall(r"reward_model: token_budget: a sequence of \d tokens is more than 4", caplog.text)) == 1


def test_what_a_reward_model_reads_ends_as_its_training_rows_do():
    """Byte-level tokens that reach into the stop string, against the row that a model is trained on."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(["ab hello world"] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    prompt, answer = "ab", " hello wor"  # The stop string is "ld".
    joined = tokenizer.encode(" hello world")
    assert [tokenizer.decode([i]) for i in joined] == [" hello", " world"]
    ids = [*tokenizer.encode(prompt), *joined]
    stopped = Rollout(
        prompt_id="p", sample_index=0, token_ids=ids, prompt_length=len(ids) - len(joined), stop="stop_string",
        trainable=[True] * len(ids), behaviour_logp=[], untruncated_logp=[], completion=answer,
    )  # fmt: skip
    seen = []

    class Reads:
        def score(self, batch):
            seen.append(batch.token_ids_T.tolist())
            return Outputs(scalar_T=torch.zeros(batch.tokens))

    batch = RewardBatch(prompts=[prompt], completions=[answer], rollouts=[stopped])
    for reads_ids in (True, False):
        RewardModel(seat_of(Reads()), tokenizer, reads_ids=reads_ids).score(batch)
    trained = preference_pair({"prompt": prompt, "chosen": answer, "rejected": "?"}, tokenizer).chosen.token_ids
    assert trained[-1] == tokenizer.eos_token_id
    assert seen == [trained, trained]


def test_a_score_that_is_no_number_names_the_sample():
    class Broken:
        def score(self, batch):
            return Outputs(scalar_T=torch.zeros(batch.tokens).index_fill(0, batch.last_S[1], float("nan")))

    rollouts = [rollout(make_tokenizer(), "ab", text, "eos") for text in ("cde", "xyz")]
    batch = RewardBatch(prompts=["ab"] * 2, completions=["cde", "xyz"], rollouts=rollouts)
    with pytest.raises(UserError, match=r"reward 'reward_model' is nan for sample 1 \(prompt ab\): completion 'xyz'"):
        RewardModel(seat_of(Broken()), make_tokenizer(), reads_ids=True).score(batch)


def test_a_critic_with_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="the critic and the model have different tokenizers"):
        require_same_tokenizer(make_tokenizer(), other_tokenizer(), policy="the model", other="the critic")
