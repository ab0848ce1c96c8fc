"""How far an engine's log-probs may be from the trainer's forward of the same weights."""

from __future__ import annotations

from typing import Literal

ROUNDING = {"float32": 3e-4, "bfloat16": 0.04}
"""Nats for a model of one layer. Measured with vLLM's CPU kernels on models of trained size, of two layers and of 26:
in float32 1e-6 and 2e-6 for Llama and 6e-4 for Gemma 2 (soft caps), in bfloat16 0.02, and 0.03 to 0.08."""


def logp_bound(dtype: Literal["float32", "bfloat16"], layers: int) -> float:
    """Largest mean absolute difference in nats. A wrong tensor is whole nats off.

    Each layer adds its rounding to what goes on to the next, none like another's: they add up as random steps do, by
    the root of their number.
    """
    return float(f"{ROUNDING[dtype] * max(layers, 1) ** 0.5:.2g}")
