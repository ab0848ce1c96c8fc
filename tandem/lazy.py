"""torch, imported when one of its names is first used.

A method's knobs stand beside its maths, and ``tandem grpo --help`` reads the knobs. What such a file needs of torch
when it is imported is nothing, so it says ``from tandem.lazy import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Looks every name up in torch itself, each time: what a test puts there is what its caller gets."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()
