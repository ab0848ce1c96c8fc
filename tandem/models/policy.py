"""What of a trained model is trained, what of it travels to engines, and what it was before: a view, not a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.models.adapters import NAME, Adapters, adapted, merged, plain_name
from tandem.models.forward import LoadedModel
from tandem.models.quantized import quantized_in
from tandem.parallel.sharding import forget_gathered, local, placed_like, unsharded


class Policy:
    """A model that is trained: whole, or its adapters alone.

    ``parameters`` are what it computes with, by name: this rank's slices where they are sharded.
    """

    def __init__(self, model: LoadedModel, parameters: Mapping[str, Tensor]) -> None:
        self.model = model
        self.parameters = parameters
        self.adapters: Adapters | None = model.adapters
        self.trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
        """Names of what changes: all that is saved, and all that travels once the rest has."""

    def merged(self) -> Mapping[str, Tensor]:
        """The parameters of the same model without adapters, by its names, these added to its weights.

        Raises UserError where some of these are in few bits.
        """
        if quantized_in(self.model.module):
            raise UserError(
                "lora.fold: the base is in few bits, and adapters are folded into whole weights; leave it out"
            )
        return self.parameters if self.adapters is None else Merged(self.model.module, self.parameters)

    @contextmanager
    @torch.no_grad()
    def with_values(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """With other values of what is trained, by name: this rank's slices."""
        kept = {name: local(self.parameters[name]).clone() for name in held}
        self._put(held)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_([local(self.parameters[name]) for name in values], list(values.values()))
        if self.model.sharded is not None:
            forget_gathered(self.model.sharded)


class Merged(Mapping[str, Tensor]):
    """The weights of a model with its adapters added, by the names of the model without.

    Each is computed when it is asked for, in float32: a collective over the ranks where parameters are sharded.
    """

    def __init__(self, module: Any, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.layers = adapted(module)
        self.standing = {plain_name(name): p for name, p in parameters.items() if ".lora_" not in name}
        """For each, the base's tensor: of the same shape, and in the same place as long as that stays."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.standing)

    def __len__(self) -> int:
        return len(self.standing)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        base = self.standing[name]
        layer, _, part = name.rpartition(".")
        if part != "weight" or layer not in self.layers:
            return base
        length = self.parameters.get(f"{layer}.lora_magnitude_vector.{NAME}.weight")
        a_RI, b_OR = (self.parameters[f"{layer}.{side}.{NAME}.weight"] for side in ("lora_A", "lora_B"))
        whole = merged(
            local(base),
            unsharded(a_RI).to(local(base).device),
            local(b_OR),
            self.layers[layer].scaling[NAME],
            None if length is None else local(length),
        )
        return placed_like(whole, base)
