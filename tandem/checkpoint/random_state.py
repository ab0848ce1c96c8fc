"""The global random generators as plain values and tensors, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def seed_generators(seed: int) -> None:
    """Starts every global generator from ``seed``. Tandem's own draws do not use them; a user's reward may."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def capture_random_state() -> dict[str, Any]:
    """States of Python's, numpy's (where imported), torch's CPU and (where in use) GPU generators.

    ``torch.load(weights_only=True)`` reads it back.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts every captured generator back.

    GPUs that are not in this machine are passed over: with other devices a run does not go on bit for bit anyway.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        # Imported, not looked up: the generator must stand ready for whoever imports numpy later.
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    for index, cuda_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)
