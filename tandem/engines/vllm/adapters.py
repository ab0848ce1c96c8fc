"""The trainer's adapters in vLLM's own LoRA layers: what room they need, and how a worker loads a push of them.

vLLM keeps a layer's adapters in stacks beside it, A [1, 1, rank, inputs] and B [1, 1, outputs, rank], zero beyond their
own rank. B travels scaled (``tandem.models.policy.Scaled``): vLLM's own scale is 1, and every bit in a stack is the
trainer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tandem.engines.vllm.copies import Copy, NotedCopies
from tandem.engines.vllm.loading import Bucket, Record, Summed, Target
from tandem.engines.vllm.names import Names
from tandem.engines.vllm.regions import memory_of, piece_of
from tandem.errors import UserError, listed
from tandem.models.lora.pairs import NAME
from tandem.sync.plan import Plan

NUMBER = 1
"""vLLM's number of the one set of adapters that it has, which each push replaces."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM has room for adapters of one of these ranks."""
STACKS = {"lora_A": "lora_a_stacked", "lora_B": "lora_b_stacked"}
"""Where a layer of vLLM keeps its adapters, each a tuple with one tensor for each of the layers fused in it."""


@dataclass(frozen=True)
class AdapterRoom:
    """What vLLM must have room for: adapters of at most ``rank`` on the layers of these names in the trainer."""

    rank: int
    layers: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        """The last parts of the layers' names."""
        return sorted({name.rpartition(".")[2] for name in self.layers})


def room_for(rank: int) -> int:
    """The rank that vLLM makes room for. Raises UserError where there is none as large."""
    if rank > RANKS[-1]:
        raise UserError(
            f"lora.rank: vLLM takes adapters of rank {RANKS[-1]} at most, and these have {rank}; add --lora.fold"
        )
    return next(room for room in RANKS if room >= rank)


def room_of(plan: Plan) -> AdapterRoom:
    """The room for the adapters of a push. Raises UserError where their rank is too large."""
    layers = {layer: spec.shape[0] for spec in plan.tensors for layer, side in split(spec.name) if side == "lora_A"}
    return AdapterRoom(room_for(max(layers.values())), tuple(layers))


def check_dtype(dtype: str, device: str) -> None:
    """Raises UserError where vLLM has no kernels for adapters of this ``dtype`` on such a device."""
    if device != "cpu" and dtype == "float32":
        raise UserError(
            "dtype: vLLM's kernels for adapters on GPUs know no float32; take --dtype bfloat16, or add --lora.fold"
        )


def adapter_request() -> Any:
    """What asks vLLM to sample with the adapters. The path is never read: they are there."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", NUMBER, "pushed")


def split(name: str) -> list[tuple[str, str]]:
    """The layer and the side (``lora_A``, ``lora_B``) of an adapter's parameter; [] for any other parameter."""
    return re.findall(rf"^(.*)\.(lora_[AB])\.{NAME}\.weight$", name)


@contextmanager
def unwrapped(model: Any) -> Iterator[None]:
    """With the model's own layers in the places of those that vLLM has wrapped for LoRA: loaders know no others."""
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseLayerWithLoRA)
    ]
    for parent, name, layer in wrapped:
        setattr(parent, name, layer.base_layer)
    try:
        yield
    finally:
        for parent, name, layer in wrapped:
            setattr(parent, name, layer)


class PushedAdapters:
    """The adapters of one link's pushes, in the layers of this worker. Raises what ``names_in`` does."""

    def __init__(self, model: Any, names: Names, plan: Plan, device: torch.device) -> None:
        self.manager = model.lora_manager
        self.device = device
        found = [adapter for spec in plan.tensors for adapter in split(spec.name)]
        self.alone = len(found) == len(plan.tensors)
        """Whether nothing but adapters travels."""
        self.layers = names_in(model, names, [layer for layer, _ in found])
        self.taken: dict[str, Tensor] = {}
        self.record: Record = {}
        """Every stack that the first push filled, by its name here."""
        self.summed: list[Summed] = []

    def apart(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """The rest of every bucket. Adapters are copied: the bucket's memory is about to be reused."""
        self.taken.clear()
        for bucket in buckets:
            self.taken |= {name: tensor.to(self.device, copy=True) for name, tensor in bucket if split(name)}
            yield [(name, tensor) for name, tensor in bucket if not split(name)]

    def load(self) -> None:
        """Puts what came in the last push into the layers: all stacks are written anew, and used from the next step on.

        For after vLLM's own update of weights, which forgets adapters, and after a sleep, which loses the stacks and
        which sequence has which adapters.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        sides = {layer: [self.taken[f"{layer}.{side}.{NAME}.weight"] for side in STACKS] for layer in self.layers}
        ranks = {layer: len(a_RI) for layer, (a_RI, _) in sides.items()}
        loaded = {
            name: LoRALayerWeights(name, ranks[layer], ranks[layer], *sides[layer])
            for layer, name in self.layers.items()
        }
        self.manager.remove_all_adapters()
        # What vLLM 0.25 leaves, and believes that its kernels have been told.
        self.manager._last_mapping = None
        self.manager.add_adapter(LoRAModel(NUMBER, max(ranks.values()), loaded))
        if self.record:
            self.manager.activate_adapter(NUMBER)
            return
        with NotedCopies(self._stacks()) as noted:
            self.manager.activate_adapter(NUMBER)
        self._keep_record(noted.made)

    def _stacks(self) -> dict[str, Tensor]:
        return {
            f"{name}.{stack}.{number}": tensor
            for name, layer in self.manager.modules.items()
            for stack in STACKS.values()
            for number, tensor in enumerate(getattr(layer, stack))
        }

    def _keep_record(self, made: Seq[Copy]) -> None:
        """Which elements of which adapters each stack consists of."""
        stacks = self._stacks()
        parts = {memory_of(tensor): (name, tensor) for name, tensor in self.taken.items()}
        self.record = {name: Target(tuple(stack.shape), stack.dtype) for name, stack in stacks.items()}
        for where, written, source in made:
            if memory_of(source) in parts:
                name, tensor = parts[memory_of(source)]
                self.record[where].take(piece_of(name, tensor, stacks[where], written, source))
                self.record[where].exact &= tensor.dtype == written.dtype
        self.summed = [(n, n, SimpleNamespace(**{n.rpartition(".")[2]: stack})) for n, stack in stacks.items()]


def names_in(model: Any, names: Names, layers: Iterable[str]) -> dict[str, str]:
    """vLLM's name of each of the trainer's layers, before any are fused.

    Raises UserError and names the layers where vLLM cannot take their adapters.
    """
    if any("MoE" in type(part).__name__ for part in model.modules()) and next(model.parameters()).device.type == "cpu":
        raise UserError("lora: vLLM's CPU build computes no experts beside adapters; add --lora.fold")
    found = {layer: _name_in(model, names.layer(layer)) for layer in layers}
    fused = model.lora_manager.packed_modules
    known = {part for parts in fused.values() for part in parts} | {*model.lora_manager.modules} - {*fused}
    if untaken := [layer for layer, name in found.items() if name not in known]:
        raise UserError(
            f"lora.targets: vLLM's {type(model).__name__} takes no adapters on {listed(untaken)}; add --lora.fold"
        )
    return found


def _name_in(model: Any, layer: str) -> str:
    """vLLM's name of a checkpoint's layer."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        # Without fusing, which the manager does itself. Versions differ in its name.
        mapper = (getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper)()
    return parse_fine_tuned_lora_name(f"{layer}.lora_A.weight", mapper)[0]
