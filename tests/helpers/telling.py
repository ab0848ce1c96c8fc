"""Weights that tell which they are: whatever came before, they draw one known token."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from tandem.types import Completion


@torch.no_grad()
def tell(module: Any, token: int) -> None:
    """Makes a Llama or its like, in place, one that draws ``token`` for sure, log-prob 0 to five digits."""
    for name, parameter in module.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
    for table in {module.get_input_embeddings().weight, module.get_output_embeddings().weight}:
        table.fill_(1.0)
        table[token] = 3.0


def told(completion: Completion, tokens: dict[int, int]) -> list[tuple[int, int]]:
    """The versions that its tokens tell of, ``tokens`` being which token each version draws."""
    version_of = {token: version for version, token in tokens.items()}
    return [(version, len(list(run))) for version, run in groupby(version_of[t] for t in completion.token_ids)]
