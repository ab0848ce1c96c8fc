"""Small real models, made once: every architecture here is transformers' own code with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tandem.batch import Batch
from tandem.parallel.shares import shares
from tandem.parallel.world import World

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "mistral_sliding": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=5),
    "granite_scaled_logits": lambda: transformers.GraniteConfig(**_GROUPED, logits_scaling=3.0),
    "gemma2_softcap": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, attn_logit_softcapping=0.1),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1, pad_token_id=0
    ),
}


def make_module(name: str = "qwen2", seed: int = 0) -> Any:
    """A random-initialised causal LM of the architecture, in eval mode, with its own attention."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                # Larger than the usual 0.02, so that distributions are far from uniform.
                parameter.mul_(6.0)
    return module.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer: <pad>, <eos>, then printable characters."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?+-*/=()[]{}<>'\"\n"
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def micro_batches(batch: Batch, token_budget: int) -> list[Batch]:
    """The batch as a trainer in one process cuts it."""
    return [share.batch for share in shares(batch, token_budget, World())]


def bitsandbytes_folder(base: Path, folder: Path, **changes: Any) -> Path:
    """The model of a folder in 4 bits, as transformers writes it."""
    kinds = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**kinds | changes)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
