"""Inside a vLLM worker: what loading a push copies, recorded once and played back, so that a push is a few kernels.

A recorded copy goes from a place in a receive buffer straight into a parameter. vLLM's own loading walks through
Python for every tensor, and layerwise reload besides allocates each layer anew: tens of milliseconds a push.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.engines.vllm.regions import memory_of

Copy = tuple[str, Tensor, Tensor]
"""The name of a parameter, the part of it that was written, and what was copied there."""


class NotedCopies(TorchDispatchMode):
    """Notes every copy into one of ``parameters`` that is made meanwhile."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {memory_of(parameter): name for name, parameter in parameters.items()}
        self.made: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and (name := self.names.get(memory_of(args[0]))) is not None:
            self.made.append((name, args[0], args[1]))
        return func(*args, **(kwargs or {}))


class Copies:
    """The copies of a push, by bucket. ``add`` once they have been made, ``play`` afterwards."""

    def __init__(self) -> None:
        self.buckets: list[tuple[list[Tensor], list[Tensor]]] = []
        self.elements: Counter[str] = Counter()
        """How many elements of each parameter are written."""

    def add(self, bucket: Seq[tuple[str, Tensor]], made: Seq[Copy]) -> None:
        """Those from the next bucket's memory, of all that were made while it was loaded."""
        memory = {memory_of(tensor) for _, tensor in bucket}
        own = [copy for copy in made if memory_of(copy[2]) in memory]
        self.buckets.append(([target for _, target, _ in own], [source for *_, source in own]))
        for name, target, _ in own:
            self.elements[name] += target.numel()

    def play(self, number: int) -> None:
        """Copies bucket ``number``, which lies where it lay when it was recorded."""
        targets, sources = self.buckets[number]
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def covers(self, loaded: Mapping[str, int]) -> bool:
        """Whether every parameter gets as many elements as it was loaded with."""
        return dict(self.elements) == dict(loaded)


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
