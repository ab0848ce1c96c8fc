"""Which parameters of a model have adapters, and which two matrices make up what is added to each.

peft keeps them in three shapes: of a linear layer, of an embedding and of stacked experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.models.quantized.layers import Quantized

NAME = "default"
"""What peft knows the adapters by: there is one set on a model."""
EFFECT = 0.5
"""What ``showing`` lets adapters add, as a share of the parameter's own spread."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is added to one parameter: ``scale`` times the product of two others, by their names in the model."""

    parameter: str
    a: str
    b: str
    scale: float
    length: str | None
    """The trained length of each row, of DoRA (arXiv:2402.09353, equation 5)."""
    layer: Any
    """peft's."""

    @property
    def embedding(self) -> bool:
        """Whether the parameter is an embedding's, [words, width]. A is [R, words] then, and 0 at first."""
        return NAME in self.layer.lora_embedding_A

    @property
    def stacked(self) -> bool:
        """Whether the parameter is of stacked experts, which have pairs of their own."""
        return hasattr(self.layer, "parameter_name")

    @property
    def first_at_zero(self) -> str:
        """The name of the one that begins at 0."""
        return self.a if self.embedding else self.b

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product has the parameter's shape: [O, R] and [R, I], of stacked experts [X, ...] each.

        Of an embedding, and of GPT-2's layers, which are stored as [in, out], it is the product of B and A transposed.
        """
        if self.embedding or isinstance(self.layer.get_base_layer(), Conv1D):
            return a.T, b.T
        if not self.stacked:
            return b, a
        a_XRI, b_XOR = by_expert(self.layer, a, b)
        # Some experts are stored as [in, out].
        return (b_XOR, a_XRI) if self.layer._did_swap_in_out_features else (a_XRI.mT, b_XOR.mT)


def by_expert(layer: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [X, R, I] and B [X, O, R] of each of X experts, of peft's [X R, I] and [O, R X]."""
    count = layer.num_experts
    return a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count).permute(2, 0, 1)


def adapted(module: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def pairs_of(module: nn.Module) -> dict[str, Pair]:
    """All that have adapters, by the parameter's name in the model without (``plain_name``)."""
    found = {}
    for name, layer in adapted(module).items():
        if NAME not in getattr(layer, "scaling", ()):
            # Of somebody's own module, under a name of their own.
            continue
        stacked = getattr(layer, "parameter_name", None)
        base = layer
        parameter = name
        while hasattr(base, "base_layer"):
            base, parameter = base.base_layer, f"{parameter}.base_layer"
        kind, end = ("lora_embedding_", "") if NAME in layer.lora_embedding_A else ("lora_", ".weight")
        pair = Pair(
            parameter=f"{parameter}.{stacked or 'weight'}",
            a=f"{name}.{kind}A.{NAME}{end}",
            b=f"{name}.{kind}B.{NAME}{end}",
            scale=layer.scaling[NAME],
            length=f"{name}.lora_magnitude_vector.{NAME}.weight" if NAME in layer.lora_magnitude_vector else None,
            layer=layer,
        )
        found[plain_name(pair.parameter)] = pair
    return found


def last_name(name: str) -> str:
    """What a layer of this name is called as well elsewhere in its model: the last part, with the numbers behind it."""
    return re.findall(r"[^.]*(?:\.\d+)*$", name)[0]


def plain_name(name: str) -> str:
    """What a parameter of a model with adapters is called in the model without."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def merged(weight: Tensor, up: Tensor, down: Tensor, scale: float, length_O: Tensor | None = None) -> Tensor:
    """``W + s U D`` in float32, of one matrix or of stacked ones; with DoRA's lengths, each row scaled to its own.

    arXiv:2106.09685, equation 3; arXiv:2402.09353, equation 5.
    """
    added = torch.addmm if weight.ndim == 2 else torch.baddbmm
    whole = added(weight.float(), up.float(), down.float(), alpha=scale)
    return whole if length_O is None else whole * (length_O.float() / whole.norm(dim=1))[:, None]


@contextmanager
@torch.no_grad()
def showing(module: nn.Module) -> Iterator[None]:
    """With adapters that matter, as they do once they are trained: a proof of how they are computed needs such.

    The matrices that begin at 0 are replaced by random ones, always the same, and put back as they are: nothing is
    written into them.
    """
    parameters = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for pair in pairs_of(module).values():
            zero = parameters[pair.first_at_zero]
            drawn = torch.randn(zero.shape, generator=generator) * _spread(pair, parameters)
            kept.append((zero, zero.data))
            zero.data = drawn.to(zero.device, zero.dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _spread(pair: Pair, parameters: Mapping[str, Tensor]) -> float:
    """Of the numbers that begin at 0, so that what is added is ``EFFECT`` of what it is added to."""
    weight, other = parameters[pair.parameter], parameters[pair.b if pair.embedding else pair.a]
    base = pair.layer.get_base_layer()
    whole = base.dequantized() if isinstance(base, Quantized) else weight
    own = whole.float().square().mean().sqrt().item()
    rank = pair.layer.r[NAME]
    size = other.float().square().mean().sqrt().item() * pair.scale * rank**0.5
    return EFFECT * own / size if size > 0 else 1.0
