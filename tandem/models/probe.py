"""Which way a model can be run is found out on a probe, not assumed from its name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tandem.batch import Batch
from tandem.data.packing import pack
from tandem.models.attention import IMPLEMENTATION, UnsupportedAttention
from tandem.models.forward import LoadedModel, hidden_states, native_logits
from tandem.types import Sequence

TOLERANCE = 2e-3
"""Largest relative difference in float32, far above rounding and far below a wrong mask or a missing scale."""
LOW_PRECISION_TOLERANCE = 0.1
"""In bfloat16, of which some dozen layers make a few hundredths."""


@torch.no_grad()
def probe_forward(model: LoadedModel) -> str:
    """Sets ``model.packed`` and ``model.split_head`` to what reproduces its own padded forward on short sequences.

    Returns why sequences must be padded, or nothing where packing works.
    """
    own_attention = model.module.config._attn_implementation
    batch = _probe_batch(model)
    plain = replace(model, dtype="float32", packed=False, split_head=False)
    truth = _read(plain, batch)
    reason = ""
    if not model.module._supports_attention_backend:
        reason = "its attention cannot be replaced, so its sequences are padded (slower)"
    else:
        model.module.set_attn_implementation(IMPLEMENTATION)
        try:
            if not _close(_read(replace(plain, packed=True), batch), truth):
                reason = "packed sequences do not reproduce its own forward, so its sequences are padded (slower)"
        except (UnsupportedAttention, TypeError) as error:
            reason = f"its attention needs what packing lacks ({error}), so its sequences are padded (slower)"
    if reason:
        model.module.set_attn_implementation(own_attention)
    model.packed = not reason
    model.split_head = not model.scalar and _head_can_be_split(replace(plain, packed=model.packed), batch, truth)
    return reason


def _head_can_be_split(model: LoadedModel, batch: Batch, truth: Tensor) -> bool:
    head = model.module.get_output_embeddings()
    if head is None or model.module.base_model is model.module:
        return False
    if getattr(model.module.config, "final_logit_softcapping", None):
        return False  # It bends large logits only, which a probe may not have.
    return _close(head(hidden_states(model, batch)), truth)


def _probe_batch(model: LoadedModel) -> Batch:
    """Three sequences, the last of which begins as the first does."""
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    limit = getattr(model.module.config, "max_position_embeddings", None) or 24
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (min(limit, n),), generator=generator).tolist() for n in (24, 7, 20)]
    shared = len(ids[2]) // 2
    ids[2][:shared] = ids[0][:shared]
    sequences = [Sequence(token_ids=i, trainable=[True] * len(i)) for i in ids]
    return pack(sequences, prompt_lengths=[shared, 0, shared]).to(model.device)


def _read(model: LoadedModel, batch: Batch) -> Tensor:
    # A scalar model is read before its head, which may be all zeros.
    return hidden_states(model, batch) if model.scalar else native_logits(model, batch)


def _close(value: Tensor, truth: Tensor) -> bool:
    return value.shape == truth.shape and not too_far(value, truth)


def too_far(value: Tensor, truth: Tensor) -> str:
    """How far ``value`` is from the truth, [T, D] both, where that is more than rounding; else nothing.

    The difference over the truth, in norms, of each row by itself: one that is wrong would hide among those that are
    right.
    """
    tolerance = TOLERANCE if truth.dtype.itemsize >= 4 else LOW_PRECISION_TOLERANCE
    truth, value = truth.float(), value.float()
    gap = ((value - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-6)).max()
    # Not the other way round: NaN is too far.
    return "" if gap <= tolerance else f"off by {gap:.1%}"
