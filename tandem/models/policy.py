"""What of a trained model is trained, what of it travels to engines, and what it was before: a view, not a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.models.forward import LoadedModel
from tandem.models.lora.adapters import Adapters
from tandem.models.lora.pairs import merged, pairs_of, plain_name
from tandem.models.quantized.layers import Quantized, quantized_in
from tandem.parallel.gather import standing
from tandem.parallel.sharding import forget_gathered, local, placed_like, slice_like, unsharded
from tandem.seeds import derive_seed


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
        self.aside: dict[str, Tensor] = {}
        """What of adapters begins at 0, where ``stir`` has put others in their places: this rank's slices, by name."""

    def merged(self) -> Mapping[str, Tensor]:
        """The parameters of the same model without adapters, by its names, these added to its weights."""
        return self.parameters if self.adapters is None else Merged(self.model.module, self._dequantized())

    def scaled(self) -> Mapping[str, Tensor]:
        """The parameters with each adapter's B times its scale, for what adds ``B A x`` as it is."""
        return Scaled(self.model.module, self._dequantized())

    def _dequantized(self) -> Mapping[str, Tensor]:
        few = quantized_in(self.model.module)
        return Dequantized(few, self.parameters, self.model.torch_dtype) if few else self.parameters

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

    @torch.no_grad()
    def stir(self, size: float | None) -> None:
        """Other numbers for what of adapters begins at 0 (B), between -size and size, to try an engine with.

        None: their own again. Those of a layer are drawn by its name.
        """
        if size is None:
            self._put(self.aside)
            self.aside = {}
            return
        names = [pair.first_at_zero for pair in pairs_of(self.model.module).values()]
        self.aside = self.aside or {name: local(self.parameters[name]).clone() for name in names}
        for name, own in self.aside.items():
            generator = torch.Generator(own.device).manual_seed(derive_seed(0, "stir", name))
            drawn = torch.rand(own.shape, generator=generator, device=own.device) * 2 - 1
            self._put({name: drawn * size})

    def _put(self, values: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_([local(self.parameters[name]) for name in values], list(values.values()))
        if self.model.sharded is not None:
            forget_gathered(self.model.sharded)


class Derived(Mapping[str, Tensor]):
    """A model's parameters by their names, of which each is made when it is asked for."""

    standing: Mapping[str, Tensor]
    """For each a tensor of the same shape, whose numbers need not be there."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.standing)

    def __len__(self) -> int:
        return len(self.standing)


class Dequantized(Derived):
    """A model's parameters by their names, those in few bits as the weights [O, I] that they stand for.

    Each is made when it is asked for, in ``dtype``, in which the model multiplies by it: the very same numbers.
    """

    def __init__(self, layers: Mapping[str, Quantized], parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.layers = {f"{name}.weight": layer for name, layer in layers.items()}
        self.parameters, self.dtype = parameters, dtype
        shapes = {name: torch.empty(layer.shape, dtype=dtype, device="meta") for name, layer in self.layers.items()}
        self.standing = {**parameters, **shapes}

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers.get(name)
        return self.parameters[name] if layer is None else layer.dequantized(self.dtype)


class Scaled(Derived):
    """A model's parameters by their names, each adapter's B times its scale (arXiv:2106.09685, section 4.1).

    Products are made when they are asked for, in float32. Raises UserError for adapters on other parts than linear
    layers below the head: those are not added in this way.
    """

    def __init__(self, module: Any, parameters: Mapping[str, Tensor]) -> None:
        self.parameters, self.standing = parameters, standing(parameters)
        pairs = pairs_of(module)
        head = module.get_output_embeddings()
        for name, pair in pairs.items():
            if (
                pair.embedding
                or hasattr(pair.layer, "parameter_name")
                or head in (pair.layer, pair.layer.get_base_layer())
            ):
                raise UserError(
                    f"lora.targets: vLLM takes adapters on linear layers below the head, and not on {name}; leave them "
                    "out, or add --lora.fold"
                )
        self.scales = {pair.b: pair.scale for pair in pairs.values() if pair.scale != 1}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        whole = self.parameters[name]
        scale = self.scales.get(name)
        return whole if scale is None else placed_like(local(whole).float() * scale, whole)


class Merged(Derived):
    """The weights of a model with its adapters added, by the names of the model without.

    Each is computed when it is asked for, in float32: a collective over the ranks where parameters are sharded.
    """

    def __init__(self, module: Any, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.pairs = pairs_of(module)
        self.names = {plain_name(name): name for name in parameters if ".lora_" not in name}
        self.standing = {plain: standing(parameters)[name] for plain, name in self.names.items()}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        base, pair = self.parameters[self.names[name]], self.pairs.get(name)
        if pair is None:
            return base
        sides = (unsharded(self.parameters[side]).to(local(base).device) for side in (pair.a, pair.b))
        rows, others = pair.factors(*sides)
        return placed_like(
            merged(
                local(base),
                slice_like(rows, base),
                # Of stacked experts the first dimension of both is theirs.
                slice_like(others, base) if others.ndim == 3 else others,
                pair.scale,
                None if pair.length is None else local(self.parameters[pair.length]),
            ),
            base,
        )
