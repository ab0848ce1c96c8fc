"""A small copy of a model that reaches every limit which the model's config names within a few dozen tokens.

Whether a model may be packed, or decoded on a cache of ours, is proved by comparing numbers. Where its window has 4,096
tokens, a short comparison on the model itself proves nothing of what happens behind them, and a long one is dear. The
copy is of the same class and has the same switches, with narrow layers and with limits of a few tokens.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tandem.models.attention import leave_sdpa
from tandem.models.proof.limits import limits_of, turning_point
from tandem.models.recurrent.states import put_right, states_of_layers

log = logging.getLogger("tandem")
LIMIT = 8
"""Tokens of a limit in the copy."""
TURNING = 24
"""Positions in the copy up to which a rotary embedding keeps its frequencies, where they depend on the length."""
POSITIONS = 256
VOCABULARY = 96
MOST_PARAMETERS = 60_000_000
"""A copy that has more is not worth its time: 0.3 s to make, and as much to run."""
SPREAD = 1.5
"""Of a matrix's numbers, over the root of its inputs: so that attention is sharp and every part of a layer counts."""

_LIMITS = re.compile(r"window|chunk_size|original_max_position|floor_scale|index_topk|block_size|compress_rate")
_NOT_LIMITS = re.compile(r"layers$|pattern$|^use_|_layers_|type$")
_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)$")
_KINDS_OF_LAYERS = ("layers_block_type", "layer_types", "mlp_layer_types")
_NARROW = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "lru_width", "embedding_dim"), 64),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size",), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(("num_attention_heads", "linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "index_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "kv_lora_rank", "index_n_heads", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "laurel_rank", "rotary_dim"), 8),
    **dict.fromkeys(("index_topk_blocks", "linear_num_key_heads", "n_groups", "mamba_n_groups", "mamba_ngroups"), 2),
    **{"q_lora_rank": 24, "mamba_d_ssm": 128},
}
"""Sizes of a narrow copy, for the keys of a config that are numbers and larger."""
_HEADS_OF_STATES = (
    ("num_heads", "expand", "head_dim"),
    ("mamba_n_heads", "mamba_expand", "mamba_d_head"),
    ("n_mamba_heads", "mamba_expand", "mamba_headdim"),
    ("mamba_num_heads", "expand", "mamba_head_dim"),
)
"""The keys of a number of heads, of how many times wider than the model they are together, and of a head's width."""


def shrunk(module: Any) -> Any | None:
    """The copy of a transformers model, in float32, in eval mode; None where none could be made small.

    It is on the CPU, or on the model's device where its layers with a state are computed by libraries for that alone.
    The same every time, and without touching torch's own random numbers.
    """
    device = torch.device("cpu")
    # Two layers of a kind where one will not do: Zamba's second is made of its first.
    for each, narrow in itertools.product((1, 2), (1, 2, 0)):
        try:
            config = shrunken_config(module.config, narrow=narrow, each=each)
            with torch.device("meta"):
                size = sum(p.numel() for p in _made(type(module), config).parameters())
            if size > MOST_PARAMETERS:
                continue
            with torch.random.fork_rng(devices=[]), device:
                torch.default_generator.manual_seed(0)  # and no GPU's
                small = _made(type(module), config).eval()
                trained_size(small)
                leave_sdpa(small)
                if _runs(small, module):
                    return small
        except Exception as error:
            # Configs that hang together in ways unknown here. The caller says that there is no copy.
            log.debug("no copy of %s (narrow: %s)", type(module).__name__, narrow, exc_info=error)
    return None


def furthest_limit(config: Any, max_length: int | None, *, by: int) -> int:
    """The largest limit that samples of up to ``max_length`` tokens may go beyond by ``by`` tokens; 0: there is none.

    Without the original positions of rotary embeddings that scale all positions alike.
    """
    positions = limits_of(config).sampling.positions
    longest = min((n for n in (positions, max_length) if n), default=None)
    found = [
        where[key]
        for part in _parts(config)
        for key, where in _limits(vars(part), _positions(part))
        if not key.startswith("original_max_position") or "llama_4_scaling_beta" in where
    ]
    return max((value for value in found if longest is None or value + by <= longest), default=0)


def _made(kind: Any, config: Any) -> Any:
    module = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    put_right(module)
    return module


@torch.no_grad()
def _runs(small: Any, module: Any) -> bool:
    """Whether it computes something, and goes on from a cache of its own where it has a language-model head.

    One with states is given a cache of ours (``tandem.models.recurrent.states``).
    """
    with_states = bool(states_of_layers(small))
    ids = torch.arange(2, 5)[None]
    try:
        out = small.base_model(input_ids=ids, use_cache=False)[0]
    except Exception:
        device = module.get_input_embeddings().weight.device
        if not with_states or device.type == "cpu":
            raise
        out = small.to(device).base_model(input_ids=ids.to(device), use_cache=False)[0]
    if small.get_output_embeddings() is not None and not with_states:
        small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    return bool(out.isfinite().all()) and float(out.std()) > 1e-4


def named_limits(config: Any) -> list[str]:
    """The keys of a config that limit what a token sees, or change how it is seen, within the model's positions."""
    return sorted({key for part in _parts(config) for key, _ in _limits(vars(part), _positions(part))})


@torch.no_grad()
def trained_size(module: Any) -> None:
    """Changes initial weights in place so that each part of the model matters, as it does once it is trained."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(module.get_input_embeddings().weight)}
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in tables:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim < 2:
            parameter.add_(0.2 * noise)
        else:
            parameter.add_(_centred(parameter, noise))
    saved = module.state_dict().keys()
    for name, number in module.named_buffers():
        # What layers are multiplied by (Gemma 4).
        if name in saved and number.numel() == 1 and number.is_floating_point():
            number.add_(0.2 * torch.randn(number.shape, generator=generator))


def _centred(parameter: Tensor, noise: Tensor) -> Tensor:
    """What brings a matrix to its spread, around the mean that it has."""
    spread = SPREAD * max(parameter.shape[-1], 4) ** -0.5
    mean = parameter.mean()
    # States' decays are large and all of one sign: they keep what they are.
    return 0.1 * noise if mean.abs() > 0.5 else spread * noise - (parameter - mean)


def shrunken_config(config: Any, *, narrow: int = 1, each: int = 1, limit: int = LIMIT, turning: int = TURNING) -> Any:
    """A copy of a config with few layers, a small vocabulary and small limits.

    ``narrow``: times the sizes of ``_NARROW`` it has; 0 leaves them as they are.
    ``each``: how many layers it has of every kind at least.
    ``turning``: positions up to which a rotary embedding keeps its frequencies, where they depend on the length.
    """
    small = copy.deepcopy(config)
    small._attn_implementation_internal = None
    if hasattr(small, "allow_global_per_layer_attribute_access"):
        # Sizes that differ from layer to layer all become small.
        small.allow_global_per_layer_attribute_access = True
    for part in _parts(small):
        positions = _positions(part)
        turns = turning_point(part) is not None
        _few_layers(part, each)
        if narrow:
            _narrow(part, narrow)
        _set(part, "vocab_size", VOCABULARY)
        for key, where in list(_limits(vars(part), positions)):
            where[key] = limit
        for key in vars(part):
            if _POSITIONS.search(key) and isinstance(getattr(part, key), int):
                setattr(part, key, min(getattr(part, key), POSITIONS))
        if turns:
            for rope in _mappings(getattr(part, "rope_parameters", None)):
                if "original_max_position_embeddings" in rope:
                    rope["original_max_position_embeddings"] = turning
            _set(part, "original_max_position_embeddings", turning)
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(part, key, None)
            if isinstance(value, list) or (isinstance(value, int) and value >= VOCABULARY):
                setattr(part, key, [1] if isinstance(value, list) else 1)
    return small


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _few_layers(config: Any, each: int) -> None:
    """The first layers, as many as it takes to have so many of every kind."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    lists = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == layers}
    kinds = [
        *(one for one in lists.values() if len({str(kind) for kind in one}) <= layers // 2),
        *(getattr(config, key, None) or () for key in _KINDS_OF_LAYERS),
    ]
    fewest = max([2, *(_first_with_all(one, each) for one in kinds)])
    if sharing := getattr(config, "num_kv_shared_layers", 0):
        # Of every kind one that has keys and values, and one that is given those of another.
        config.num_kv_shared_layers = min(sharing, fewest)
        fewest += config.num_kv_shared_layers
    for key, most in (("first_k_dense_replace", 1), ("max_window_layers", 1), ("num_blocks", fewest)):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(getattr(config, key), most))
    for key, value in lists.items():
        setattr(config, key, value[:fewest])
    config.num_hidden_layers = min(layers, fewest)


def _first_with_all(kinds: Any, each: int) -> int:
    """How many of the first it takes to have met every kind so often, or as often as it is there."""
    seen = [str(kind) for kind in kinds]
    places = ([place for place, one in enumerate(seen) if one == kind] for kind in set(seen))
    return max((where[min(each, len(where)) - 1] + 1 for where in places), default=0)


def _narrow(config: Any, times: int) -> None:
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    rotated = getattr(config, "head_dim", None) == getattr(config, "qk_rope_head_dim", 0)
    width = _head_width(config)
    seen = getattr(config, "attention_hidden_size", None)
    seen = seen and max(1, seen // config.hidden_size)
    for key, one in _NARROW.items():
        value, size = getattr(config, key, None), one * times
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            setattr(config, key, size)
        elif isinstance(value, list) and value and all(isinstance(item, int) and item > size for item in value):
            setattr(config, key, [size] * len(value))
    if seen:
        # Zamba's attention is given a token's embedding beside it.
        config.attention_hidden_size = seen * config.hidden_size
    if isinstance(groups, int) and isinstance(heads, int):
        config.num_key_value_heads = 1 if groups == 1 else config.num_attention_heads if groups == heads else 2
    if getattr(config, "qk_head_dim", None) and getattr(config, "qk_nope_head_dim", None):
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    if rotated:
        config.head_dim = config.qk_rope_head_dim
    for number, wider, head in _HEADS_OF_STATES:
        if all(isinstance(getattr(config, key, None), int) for key in (number, wider, head)):
            setattr(config, number, config.hidden_size * getattr(config, wider) // getattr(config, head))
    for rope in _mappings(getattr(config, "rope_parameters", None)):
        narrow = _head_width(config)
        for key in ("short_factor", "long_factor"):
            if key in rope and width:
                wanted = len(rope[key]) * narrow // width
                step = len(rope[key]) / max(wanted, 1)
                rope[key] = [rope[key][int(i * step)] for i in range(wanted)]
        if (section := rope.get("mrope_section")) and width:
            others = [n * narrow // width for n in section[1:]]
            rope["mrope_section"] = [sum(section) * narrow // width - sum(others), *others]


def _head_width(config: Any) -> Any:
    """None where the config does not say."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    return width or (config.hidden_size // heads if isinstance(heads, int) and heads else None)


def _positions(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or 0


def _limits(values: dict[str, Any], positions: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys of limits that a sequence of so many positions (0: of any number) goes beyond, and where they stand."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _limits(value, positions)
        elif type(value) is int and value > LIMIT and not 0 < positions <= value and _is_limit(str(key)):
            yield key, values


def _is_limit(key: str) -> bool:
    return bool(_LIMITS.search(key)) and not _NOT_LIMITS.search(key)


def _set(config: Any, key: str, value: Any) -> None:
    if getattr(config, key, None) is not None:
        setattr(config, key, value)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
