"""Weights that tell which they are: whatever came before, they draw one known token."""

from __future__ import annotations

import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from helpers.pushes import model_of
from tandem.engines.live.replica import ReplicaEngine
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


class Telling(ReplicaEngine):
    """A replica whose weights tell their version, and whose steps take their time, or wait for a file to go."""

    def __init__(self, folder: Path | None = None, pace_s: float = 0.0, **options: Any) -> None:
        super().__init__(model_of(0), **options)
        core: Any = self.stepper.core
        step = core.step

        def paced() -> Any:
            time.sleep(pace_s)
            while folder is not None and (folder / "hold").exists():
                time.sleep(0.005)
            return step()

        core.step = paced
        self.become(0)

    def become(self, version: int) -> None:
        with self.stepper.exclusive():
            tell(self.model.module, TOKENS[version])
            self.version = version


TOKENS = {version: 10 + version for version in range(50)}
