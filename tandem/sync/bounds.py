"""How far an engine's log-probs may be from the trainer's forward of the same weights."""

from __future__ import annotations

LOGP_BOUNDS = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest mean absolute difference in nats, by dtype. Rounding stays well below; a wrong tensor is whole nats off."""
