"""The tiny model and its tokenizer are ordinary Hugging Face ones."""

import string

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.tasks import letters, tiny


@pytest.mark.parametrize("text", ["hcafi>", "", "acfhi", ">", "hcafi>acfhi"])
def test_text_survives_the_round_trip(text):
    tokenizer = tiny.build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_for_any_characters():
    tokenizer = tiny.build_tokenizer(string.printable)
    text = "Two  spaces , a\ttab\nand a line."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens():
    tokenizer = tiny.build_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("abc<eos>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode([2, 3, 1], skip_special_tokens=True) == "ab"


def test_an_unknown_character_fails():
    with pytest.raises(Exception, match="UNK"):
        tiny.build_tokenizer()("xyz")


def test_the_model_is_small_and_depends_on_its_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = tiny.build_model(0), tiny.build_model(0), tiny.build_model(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 0.5e6 < one.num_parameters() < 1e6
    equal = [torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True)]
    assert all(equal)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_a_saved_folder_loads_with_the_auto_classes(tmp_path):
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model(0)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = letters.prompts(4, seed=0)
    batch = loaded_tokenizer(prompts, padding=True, return_tensors="pt")
    assert loaded_tokenizer(prompts)["input_ids"] == tokenizer(prompts)["input_ids"]
    assert loaded_tokenizer.decode(loaded_tokenizer(prompts[0])["input_ids"]) == prompts[0]
    assert (loaded_tokenizer.pad_token_id, loaded_tokenizer.eos_token_id) == (0, 1)
    for config in (loaded.config, loaded.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
