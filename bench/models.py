"""Random models of real sizes, for benchmarks: Qwen2.5's shapes, two of Qwen3-MoE's kind, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.75m": {"hidden_size": 128, "intermediate_size": 464, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
               "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
               "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    # Experts: of 1.00 billion parameters a token meets 0.30 billion.
    "tiny-moe": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "tie_word_embeddings": True,
                 "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "1b-moe": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 16,
               "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 151936, "tie_word_embeddings": True,
               "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "norm_topk_prob": True},
}  # fmt: skip
SIZES = tuple(_SHAPES)


def config_of(size: str, *, eos: int | None = 0, layers: int | None = None) -> Qwen2Config | Qwen3MoeConfig:
    """The configuration of that size, with this module's special tokens; or without an end, or fewer layers."""
    shape = _SHAPES[size] | ({} if layers is None else {"num_hidden_layers": layers})
    return (Qwen3MoeConfig if "num_experts" in shape else Qwen2Config)(
        **shape, max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip


def byte_tokenizer(vocabulary: int = 0, *, eos: bool = True) -> PreTrainedTokenizerFast:
    """<eos> and one token a byte, and filled up to ``vocabulary``, so that every id that a model draws has a text.

    Without ``eos`` token 0 is like any other. Text then costs what it costs with a real vocabulary.
    """
    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_folder(
    size: str,
    folder: Path,
    *,
    weights: bool = True,
    device: str = "cpu",
    full_tokenizer: bool = False,
    eos: int | None = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """A Hugging Face folder. Without ``weights`` it has only config and tokenizer (of bytes, or of the whole size)."""
    config = config_of(size, eos=eos)
    byte_tokenizer(config.vocab_size if full_tokenizer else 0, eos=eos is not None).save_pretrained(folder)
    if weights:
        random_model(size, device, eos=eos, dtype=dtype).save_pretrained(folder)
    else:
        # Without a name of its class vLLM takes it for a model that embeds.
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        config.save_pretrained(folder)
    return str(folder)


def write_4bit_folder(size: str, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """The like of ``write_folder``, with the full tokenizer, in bitsandbytes' 4 bits as transformers writes it.

    NF4 with double quantisation; embeddings and head in ``dtype``.

    It is made and written a layer at a time: 32 billion numbers take 20 GB on the disk, and a layer's room in memory.
    """
    import bitsandbytes

    config = config_of(size)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = (model.get_output_embeddings(), model.get_input_embeddings())
    linear = {f"{n}.weight" for n, p in model.named_modules() if isinstance(p, torch.nn.Linear) and p not in heads}
    tied = set(model.all_tied_weights_keys)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        if name not in tied:
            shards.setdefault(name.split(".")[2] if ".layers." in name else name, {})[name] = parameter.shape
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards.values(), start=1):
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            if len(shape) < 2:
                tensors[name] = torch.full(shape, float(name.endswith("weight")), dtype=dtype)
                continue
            weight = torch.randn(shape, generator=generator, device=device) * config.initializer_range
            if name not in linear:
                tensors[name] = weight.to("cpu", dtype)
                continue
            codes, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            tensors[name] = codes.cpu()
            tensors |= {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)


def random_model(
    size: str,
    device: str = "cpu",
    *,
    eos: int | None = 0,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Random weights, drawn in float32 and cast to ``dtype``, the same on every process with such a device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(size, eos=eos, layers=layers), dtype=torch.float32)
    for parameter in model.parameters():
        # Not model.to(): rotary frequencies do not survive bfloat16.
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def head_size(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def multiplied_parameters(size: str, *, all_experts: bool = False) -> int:
    """Parameters that every token is multiplied with: all, a tied head once, less an untied input embedding.

    Of experts, those of the few that a token goes to; or all, which a step of many rows reads.
    """
    config, model = config_of(size), random_model(size, "meta")
    total = sum(p.numel() for p in model.parameters())
    if isinstance(config, Qwen3MoeConfig) and not all_experts:
        stacked = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        total -= stacked * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return total - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
