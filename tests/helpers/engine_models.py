"""Small random models and a tokenizer for the engine tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tandem.models.attention import IMPLEMENTATION

VOCABULARY = 96
EOS = 1


def tokenizer() -> Any:
    """One printable character a token: id 0 pads, 1 ends, the others are the characters from the space on."""
    vocabulary = {"<pad>": 0, "<eos>": EOS} | {chr(32 + i): i + 2 for i in range(VOCABULARY - 2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def bytes_tokenizer() -> Any:
    """Every byte a token, as a byte-level BPE without merges: characters of several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<|im_end|>", "<|pad|>"])


def model(architecture: str, *, seed: int = 0, eos: int | None = None) -> Any:
    """A model with weights large enough that every part of it matters for the logits."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "eos_token_id": eos, "bos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if architecture == "qwen2":
        module: Any = Qwen2ForCausalLM(Qwen2Config(**size, num_key_value_heads=2))
    elif architecture == "qwen2-window":
        window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        module = Qwen2ForCausalLM(Qwen2Config(**size, num_key_value_heads=2, **window))
    elif architecture == "llama":
        module = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=1))
    elif architecture == "gpt_neox":
        module = GPTNeoXForCausalLM(GPTNeoXConfig(**size))
    elif architecture == "mistral":
        module = MistralForCausalLM(MistralConfig(**size, num_key_value_heads=2, sliding_window=5))
    else:
        assert architecture == "bloom"
        module = BloomForCausalLM(
            BloomConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                n_layer=2,
                n_head=4,
                eos_token_id=eos,
                bos_token_id=None,
                pad_token_id=0,
                initializer_range=0.3,
            )
        )
    if module._supports_attention_backend:
        module.set_attn_implementation(IMPLEMENTATION)
    return module.eval()
