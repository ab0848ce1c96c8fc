"""Whether a model runs on the slot cache is tried out on it, not looked up by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem.engines.batching import LayoutForward, Prefilled
from tandem.engines.slots import DecodeLayout, SlotCache
from tandem.models.attention import IMPLEMENTATION, UnsupportedAttention

TOLERANCE = 2e-3
"""Largest relative difference in float32, far above rounding and far below a wrong mask or a missing scale."""
LOW_PRECISION_TOLERANCE = 5e-2
PROMPT_LENGTHS = (5, 3)
DECODED = 3


@torch.no_grad()
def why_not_slots(module: Any) -> str:
    """Why the slot cache does not reproduce the module's own forward; empty where it does. In eval mode only."""
    if not module._supports_attention_backend:
        return "its attention cannot be replaced"
    implementation = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        return f"its attention implementation is {implementation!r} and not {IMPLEMENTATION!r}"
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of {', '.join(odd)}"
    vocabulary = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocabulary, (n + DECODED,), generator=generator) for n in PROMPT_LENGTHS]
    try:
        found = _slot_logits(module, sequences)
    except UnsupportedAttention as error:
        return f"its attention needs what the slot cache lacks ({error})"
    for logits, sequence, length in zip(found, sequences, PROMPT_LENGTHS, strict=True):
        ids = sequence[None].to(logits.device)
        truth = module(input_ids=ids, use_cache=False).logits[0, length - 1 :]
        tolerance = TOLERANCE if truth.dtype == torch.float32 else LOW_PRECISION_TOLERANCE
        if not (logits - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1.0):
            return "the slot cache does not reproduce its own forward"
    return ""


def _slot_logits(module: Any, sequences: list[Tensor]) -> list[Tensor]:
    """Logits [DECODED + 1, V] for what follows each prompt and each of the tokens after it."""
    model = LayoutForward(module)
    prompts = [tuple(s[:-DECODED].tolist()) for s in sequences]
    prefilled = Prefilled(model, prompts)
    cache = SlotCache(len(sequences), max(map(len, sequences)))
    cache.reserve(max(map(len, prompts)))
    prefilled.load_into(cache, list(range(len(prompts))), list(range(len(prompts))))
    length_B = torch.tensor([len(p) for p in prompts]).to(model.device)
    steps = [prefilled.logits_PV]
    for step in range(DECODED):
        token_B = torch.stack([s[len(p) + step] for s, p in zip(sequences, prompts, strict=True)]).to(model.device)
        layout = DecodeLayout(cache, length_B, int(length_B.max()))
        steps.append(model(token_B[:, None], length_B[:, None], layout)[:, -1])
        length_B = length_B + 1
    return list(torch.stack(steps, dim=1))
