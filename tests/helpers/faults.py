"""What can go wrong with weights on their way: each fault says what a tensor arrives as, at whichever end.

Faults are made of the trainer's float32 weights and then rounded to the wire's dtype: a bfloat16 number times 1.001 is
the same bfloat16 number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from tandem.engines.live.replica import ReplicaEngine
from tandem.models.lora.pairs import plain_name
from tandem.parallel.gather import Gatherer
from tandem.sync.check import WeightMismatch

History = list[dict[str, Tensor]]
"""The trainer's float32 weights at each push, the last one's at the end."""
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.0."
QUERY, SQUARE, DOWN = (
    LAYER + "self_attn.q_proj.weight",
    LAYER + "self_attn.o_proj.weight",
    LAYER + "mlp.down_proj.weight",
)
HEADS = 2


def rows_swapped(tensor: Tensor) -> Tensor:
    order = torch.arange(len(tensor))
    order[5], order[9] = 9, 5
    return tensor[order]


def heads_swapped(tensor: Tensor) -> Tensor:
    first, second, *rest = tensor.chunk(HEADS)
    return torch.cat([second, first, *rest])


def sign_flipped(tensor: Tensor) -> Tensor:
    other = tensor.clone()
    other.view(-1)[17] *= -1
    return other


def of(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[History, str], Tensor | None]:
    return lambda history, wanted: change(history[-1][wanted]) if plain_name(wanted) == name else None


NEVER = "an engine that is never filled"
FAULTS: dict[str, Callable[[History, str], Tensor | None]] = {
    "stale tensor": lambda history, name: history[-2][name] if plain_name(name) == DOWN else None,
    "stale everything": lambda history, name: history[0][name],
    "one push behind": lambda history, name: history[-2][name],
    "times 1.001": lambda history, name: history[-1][name] * 1.001,
    "swapped embedding rows": of(EMBEDDING, rows_swapped),
    "swapped query heads": of(QUERY, heads_swapped),
    "transposed square matrix": of(SQUARE, lambda tensor: tensor.t()),
    "one sign": of(DOWN, sign_flipped),
}


class Faulty:
    """An end of a push that spoils what it handles: ``fault`` says how, None not at all."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.history: History = []

    def record(self, weights: Mapping[str, Tensor]) -> None:
        """The trainer's whole float32 weights as the next push will find them."""
        self.history.append({name: tensor.detach().float().clone() for name, tensor in weights.items()})

    @torch.no_grad()
    def spoil(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Writes into each what arrives in its place."""
        change = FAULTS.get(self.fault or "", lambda history, name: None)
        for name, tensor in tensors:
            found = change(self.history, name)
            if found is not None:
                tensor.copy_(found)

    def sender(self, gatherer: Gatherer) -> None:
        """Spoils what a trainer's rank gathers."""
        fill = gatherer.fill

        def filled(wanted: list[tuple[str, Tensor]]) -> None:
            if self.fault != NEVER:
                fill(wanted)
                self.spoil(wanted)

        gatherer.fill = filled  # type: ignore[method-assign]

    def engine(self, engine: ReplicaEngine) -> None:
        """Spoils what an engine has loaded."""
        load = engine.load

        def loaded(bucket: list[tuple[str, Tensor]]) -> None:
            if self.fault != NEVER:
                load(bucket)
                self.spoil((name, engine.parameters[name]) for name, _ in bucket)

        engine.load = loaded  # type: ignore[method-assign]


def pushes_until_seen(step: Callable[[], object], faulty: Faulty) -> dict[str, tuple[int, str]]:
    """For each fault, at which push since it began it is seen (1: the first; 0: not in three), and what is said then.

    ``step`` changes the trainer's weights and pushes them. All but the engine that is never filled come after three
    good pushes, so that checksums alone speak: the first two are probed as well.
    """
    seen = {NEVER: _first_seen(step, faulty, NEVER)}
    for _ in range(3):
        step()
    seen |= {fault: _first_seen(step, faulty, fault) for fault in FAULTS}
    step()
    return seen


def all_at_once(seen: dict[str, tuple[int, str]]) -> bool:
    """Whether each was seen at the first push that had it, and named."""
    assert {fault: number for fault, (number, _) in seen.items()} == dict.fromkeys([NEVER, *FAULTS], 1)
    return all("does not hold the trainer's model." in said for _, said in seen.values())


def _first_seen(step: Callable[[], object], faulty: Faulty, fault: str, most: int = 3) -> tuple[int, str]:
    faulty.fault = fault
    try:
        for number in range(1, most + 1):
            try:
                step()
            except WeightMismatch as error:
                return number, str(error)
        return 0, ""
    finally:
        faulty.fault = None
