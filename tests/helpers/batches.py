"""Batches that models have seen, from what a test says the models said."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tandem.batch import Batch, Outputs


def scalar_outputs(value_T: Tensor) -> Outputs:
    """What a scalar head says at each token, of which ``Batch.values`` makes these values of trainable tokens."""
    return Outputs(scalar_T=torch.cat([value_T[1:], value_T.new_zeros(1)]))


def seen_batch(
    batch: Batch,
    *,
    old_logp_T: Tensor | None = None,
    reference_logp_T: Tensor | None = None,
    old_value_T: Tensor | None = None,
) -> Batch:
    """The batch with the trainer's old log-probs, a reference's, and a critic's old values; None: as it was."""
    seen = {
        "actor": None if old_logp_T is None else Outputs(logp_T=old_logp_T),
        "reference": None if reference_logp_T is None else Outputs(logp_T=reference_logp_T),
        "critic": None if old_value_T is None else scalar_outputs(old_value_T),
    }
    return replace(batch, seen=batch.seen | {role: out for role, out in seen.items() if out is not None})


def unseen_by(batch: Batch, role: str) -> Batch:
    """The batch, which the model of this role has not seen."""
    return replace(batch, seen={name: out for name, out in batch.seen.items() if name != role})
