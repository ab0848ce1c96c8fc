"""FSDP2 applied from outside to an unmodified module: every rank of a world keeps a slice of each parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tandem.parallel.world import World


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, as it names them itself in ``_no_split_modules``: the outer ones."""
    names = set(getattr(module, "_no_split_modules", None) or ())
    found = {name: inner for name, inner in module.named_modules() if type(inner).__name__ in names}
    # Mamba names its blocks and the mixers in them, which cannot be sharded apart.
    return [inner for name, inner in found.items() if not any(name.startswith(f"{outer}.") for outer in found)]


def checkpoint_activations(layers: list[nn.Module]) -> None:
    """Keeps only the layers' inputs for the backward pass and computes the rest again."""
    for layer in layers:
        checkpoint(layer)


def shard(
    root: nn.Module,
    layers: list[nn.Module],
    world: World,
    *,
    compute_dtype: torch.dtype,
    keep_gathered: bool = False,
    offload: bool = False,
    kept: Collection[Tensor] = (),
) -> None:
    """Splits the parameters of ``root`` over the world's ranks, gathered layer by layer in ``compute_dtype``.

    Those ``kept`` stay whole on every rank, as they are: nothing may train them.

    ``keep_gathered`` keeps a layer's parameters from its forward to its backward (ZeRO stages 1 and 2), otherwise
    they are gathered twice (stage 3). ``offload`` keeps parameters, gradients and optimizer state on the CPU.
    Gradients are summed over ranks in float32: weights were stamped from global counts, so the sum is the whole
    reduction. Forward and backward are collectives from here on.
    """
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": set(kept),
    }
    # Layers that have parameters in common (Zamba's attention) cannot gather them one by one: the root does.
    owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    for layer in layers:
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
            continue
        fully_shard(layer, reshard_after_forward=not keep_gathered, **options)
    fully_shard(root, **options)
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for part in root.modules():
        # So marked, torch.compile takes a module's numbers, as the size of a head, for variables, and all that follows
        # from them for formulas: it needs three times as long for a graph.
        vars(part)["_is_fsdp_managed_module"] = False


def forget_gathered(root: nn.Module) -> None:
    """Frees what a forward left gathered, so that the next one sees parameters as they are now."""
    for module in _sharded(root):
        module.reshard()


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, *, keep: bool = True) -> Any:
    """A nest of dicts and lists with every tensor whole and on the CPU. A collective where one is sharded.

    A rank that does not ``keep`` tensors takes part and gets None for each: the whole fits where it is needed only.
    """
    if isinstance(value, Mapping):
        return {key: whole(inner, keep=keep) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(inner, keep=keep) for inner in value)
    if isinstance(value, DTensor):
        found = unsharded(value)
        return found.cpu() if keep else None
    if isinstance(value, Tensor):
        return value.detach().cpu() if keep else None
    return value


@torch.no_grad()
def unsharded(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on its mesh's device: a collective. Any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if tensor.to_local().device.type != mesh.device_type:
        # Offloaded: NCCL moves what is on the GPU only.
        tensor = DTensor.from_local(
            tensor.to_local().to(mesh.device_type), mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.full_tensor()


def rows_of(tensor: DTensor) -> slice:
    """The rows of a sharded tensor's first dimension that this rank keeps, as ``torch.chunk`` divides them."""
    mesh = tensor.device_mesh
    per_rank = -(-tensor.shape[0] // mesh.size())
    start = min(per_rank * mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + tensor.to_local().shape[0])


def like(full: Tensor, target: Tensor) -> Tensor:
    """A copy of ``full`` placed as ``target`` is: the same slice, on the same device. No communication."""
    if not isinstance(target, DTensor):
        return full.to(target.device, copy=True)
    return placed_like(full[rows_of(target)].to(target.to_local().device, copy=True), target)


def placed_like(mine: Tensor, target: Tensor) -> Tensor:
    """This rank's slice as a tensor sharded as ``target`` is; itself, where that is not."""
    if not isinstance(target, DTensor):
        return mine
    return DTensor.from_local(mine, target.device_mesh, target.placements, shape=target.shape, stride=target.stride())


def slice_like(source: Tensor, target: Tensor) -> Tensor:
    """Of ``source``, whole or sharded as ``target`` is, what this rank keeps of ``target``."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        source = source[rows_of(target)]
    return local(source)


@torch.no_grad()
def assign(target: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a parameter, sharded or not."""
    local(target).copy_(slice_like(full, target))
