"""Libraries imported only where they are wanted: torch when one of its names is first used, those of extras when asked.

A method's knobs stand beside its maths, and ``tandem grpo --help`` reads the knobs. What such a file needs of torch
when it is imported is nothing, so it says ``from tandem.lazy import torch``.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from tandem.errors import UserError

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Looks every name up in torch itself, each time: what a test puts there is what its caller gets."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()


def extra(library: str, wanted: str, name: str) -> Any:
    """A library of the extra ``name``. Raises UserError, which begins with what is ``wanted``, where it is missing."""
    # bitsandbytes, which peft imports too, says things about 4-bit products that nobody has asked for.
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"{wanted} of {library}, which is missing ({error}); pip install 'tandem-rlhf[{name}]'"
        ) from None
    finally:
        log.setLevel(level)
