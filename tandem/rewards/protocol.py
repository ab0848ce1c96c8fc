"""What a reward server and a run say to each other, as JSON over HTTP (docs/rewards.md has it in words)."""

from __future__ import annotations

PROTOCOL = 1
"""The version of this protocol: both sides must have the same."""
TOKEN = "TANDEM_REWARD_TOKEN"
"""The environment variable with the secret that a server asks for, and that a run then sends."""
HEALTH, SCORE = "/health", "/score"
"""``GET /health`` says who answers; ``POST /score`` judges samples."""
