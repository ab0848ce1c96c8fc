"""Random models of real sizes, for benchmarks: Qwen2.5's shapes with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
               "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
SIZES = tuple(_SHAPES)


def config_of(size: str) -> Qwen2Config:
    """Qwen2.5's configuration of that size, with this module's special tokens."""
    return Qwen2Config(
        **_SHAPES[size], max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """<eos> and one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def write_folder(size: str, folder: Path, *, weights: bool = True, device: str = "cpu") -> str:
    """A Hugging Face folder. Without ``weights`` it has only config and tokenizer."""
    byte_tokenizer().save_pretrained(folder)
    if weights:
        random_model(size, device).to(torch.bfloat16).save_pretrained(folder)
    else:
        config_of(size).save_pretrained(folder)
    return str(folder)


def random_model(size: str, device: str = "cpu") -> Any:
    """Random weights in float32, the same on every process."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.float32)
    return model.eval()
