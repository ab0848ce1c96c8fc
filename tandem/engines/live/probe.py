"""Whether a model runs on a cache of ours is tried out on it, not looked up by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.decoder import Decoder
from tandem.engines.live.forwards import OwnForward, Unlike
from tandem.engines.live.over_slots import Prefilled
from tandem.engines.live.pages import CacheShape, PagedDecode
from tandem.engines.live.prefill import Forward
from tandem.engines.live.slots import DecodeLayout, SlotCache
from tandem.models.attention import IMPLEMENTATION, Ask, PackedLayout, UnsupportedAttention, numbered
from tandem.models.probe import too_far

PROMPT_LENGTHS = (5, 3)
DECODED = 3


@torch.no_grad()
def why_not_slots(module: Any) -> str:
    """Why the slot cache does not reproduce the module's own forward; empty where it does. In eval mode only."""
    return why_not_layouts(module) or _compare(module, lambda sequences: _slot_logits(module, sequences))


@torch.no_grad()
def why_not_pages(module: Any, forward: Forward, shape: CacheShape) -> str:
    """Why ``forward`` over pages does not reproduce the module's own; empty where it does. In eval mode only."""
    return _compare(module, lambda sequences: _page_logits(forward, shape, sequences))


def why_not_layouts(module: Any) -> str:
    """What says without a trial that the module's attention cannot be computed by a layout."""
    if not module._supports_attention_backend:
        return "its attention cannot be replaced"
    implementation = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        return f"its attention implementation is {implementation!r} and not {IMPLEMENTATION!r}"
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of {', '.join(odd)}"
    return ""


@torch.no_grad()
def find_cache_shape(module: Any) -> tuple[CacheShape, list[Ask]]:
    """What a token needs in the cache, and what each layer asks of its attention, as the module itself does.

    Raises Unlike where its layers differ in what they keep.
    """
    forward = OwnForward(module)
    seen = _Seen(torch.tensor([0, 2]), forward.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=forward.device)
    try:
        forward(ids, torch.arange(2, device=forward.device)[None], seen)
    except UnsupportedAttention as error:
        raise Unlike(f"its attention needs what pages lack ({error})") from error
    if sorted(seen.layers) != list(range(len(seen.layers))):
        raise Unlike("its attention layers are not numbered from 0")
    kept = {(key.shape[1:], value.shape[1:], value.dtype) for key, value, *_ in seen.layers.values()}
    (key_shape, value_shape, dtype), *others = kept
    if others or key_shape != value_shape:
        raise Unlike("its layers keep keys and values of several shapes")
    shape = CacheShape(layers=len(seen.layers), kv_heads=key_shape[0], head_dim=key_shape[2], dtype=dtype)
    return shape, [seen.layers[layer][2] for layer in range(len(seen.layers))]


class _Seen(PackedLayout):
    """Writes down what each layer asks of attention."""

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        super().__init__(bounds, device)
        self.layers: dict[int, tuple[Tensor, Tensor, Ask]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        self.layers[numbered(ask)] = (key, value, ask)
        return super().attend(query, key, value, ask)


def _compare(module: Any, logits_of: Callable[[list[Tensor]], list[Tensor]]) -> str:
    """Why logits of what follows prompts, and the tokens after them, are not the module's own; empty where they are."""
    vocabulary = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocabulary, (n + DECODED,), generator=generator) for n in PROMPT_LENGTHS]
    try:
        found = logits_of(sequences)
    except UnsupportedAttention as error:
        return f"its attention needs what the cache lacks ({error})"
    for logits, sequence, length in zip(found, sequences, PROMPT_LENGTHS, strict=True):
        ids = sequence[None].to(logits.device)
        truth = module(input_ids=ids, use_cache=False).logits[0, length - 1 :]
        if far := too_far(logits, truth):
            return f"decoding from the cache does not reproduce its own forward ({far})"
    return ""


def _slot_logits(module: Any, sequences: list[Tensor]) -> list[Tensor]:
    """Logits [DECODED + 1, V] for what follows each prompt and each of the tokens after it."""
    model = OwnForward(module)
    prompts = [tuple(s[:-DECODED].tolist()) for s in sequences]
    prefilled = Prefilled(model, prompts)
    cache = SlotCache(len(sequences), max(map(len, sequences)))
    cache.reserve(max(map(len, prompts)))
    prefilled.load_into(cache, list(range(len(prompts))), list(range(len(prompts))))

    def decode(token_B: Tensor, length_B: Tensor) -> Tensor:
        layout = DecodeLayout(cache, length_B, int(length_B.max()))
        return model(token_B[:, None], length_B[:, None], layout)[:, -1]

    return _decoded(decode, prefilled.logits_PV, sequences)


def _page_logits(forward: Forward, shape: CacheShape, sequences: list[Tensor]) -> list[Tensor]:
    """The same through a decoder's pages, one of its own for each sequence."""
    decoder = Decoder(forward, shape, slots=len(sequences), pages=len(sequences) + 1, width=1)
    pages = [decoder.pool.take(1) for _ in sequences]
    logits_PV = decoder.prefill([s[:-DECODED].tolist() for s in sequences], pages)
    table_BP = torch.tensor(pages, dtype=torch.int32).to(forward.device)

    def decode(token_B: Tensor, length_B: Tensor) -> Tensor:
        layout = PagedDecode(decoder.pool, table_BP, length_B, torch.ones_like(length_B))
        return forward(token_B[:, None], length_B[:, None], layout)[:, -1]

    return _decoded(decode, logits_PV, sequences)


def _decoded(decode: Callable[[Tensor, Tensor], Tensor], logits_PV: Tensor, sequences: list[Tensor]) -> list[Tensor]:
    device = logits_PV.device
    length_B = torch.tensor([len(s) - DECODED for s in sequences]).to(device)
    steps = [logits_PV]
    for step in range(DECODED):
        token_B = torch.stack([s[len(s) - DECODED + step] for s in sequences]).to(device)
        steps.append(decode(token_B, length_B))
        length_B = length_B + 1
    return list(torch.stack(steps, dim=1))
