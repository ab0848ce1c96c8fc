"""Inside a vLLM worker: what loading a push copies, recorded once and played back, so that a push is a few kernels.

A recorded copy goes from a place in a receive buffer straight into a parameter. vLLM's own loading walks through
Python for every tensor, and layerwise reload besides allocates each layer anew: tens of milliseconds a push.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Copies:
    """The copies of a push, by bucket. ``add`` while they are recorded, ``play`` afterwards."""

    def __init__(self) -> None:
        self.buckets: list[tuple[list[Tensor], list[Tensor]]] = []
        self.elements: dict[str, int] = {}
        """How many elements of each parameter are written."""

    def play(self, number: int) -> None:
        """Copies bucket ``number``, which lies where it lay when it was recorded."""
        targets, sources = self.buckets[number]
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def covers(self, loaded: Mapping[str, int]) -> bool:
        """Whether every parameter gets as many elements as it was loaded with."""
        return self.elements == dict(loaded)


class RecordingCopies(TorchDispatchMode):
    """Notes every copy from a bucket's memory into a parameter that is made meanwhile."""

    def __init__(self, copies: Copies, parameters: Mapping[str, Tensor], bucket: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.copies = copies
        self.names = {parameter.untyped_storage().data_ptr(): name for name, parameter in parameters.items()}
        self.memory = {tensor.untyped_storage().data_ptr() for _, tensor in bucket}
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            name = self.names.get(target.untyped_storage().data_ptr())
            if name is not None and source.untyped_storage().data_ptr() in self.memory:
                self.targets.append(target)
                self.sources.append(source)
                self.copies.elements[name] = self.copies.elements.get(name, 0) + target.numel()
        return func(*args, **(kwargs or {}))

    def finish(self) -> None:
        """Ends the bucket."""
        self.copies.buckets.append((self.targets, self.sources))


def may_copy(model: Any, exact: bool) -> bool:
    """Whether the model's parameters are what was loaded, so that writing them is all of an update.

    Not so where layers are quantized, packed for a CPU, or keep something computed from weights (experts, MLA).
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    if not exact or any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return False
    for module in model.modules():
        kind = type(module).__name__
        if "MoE" in kind or "MLA" in kind or "Mamba" in kind:
            return False
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.endswith("KVCacheMethod") and type(method) not in plain:
            return False
    return True
