"""Transformer layers as compiled graphs, for training and scoring. Others that share the module do not notice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from tandem.errors import first_line

log = logging.getLogger("tandem")
KEPT = "autograd_cache_allow_custom_autograd_functions"
"""Without it torch keeps no graph with a function of ours (shared prompts, sinks) for the next process: every run, and
every resume, derives its backward again. A graph is found by all of its code, that of such a function included."""
GRAPHS = 64
"""Most graphs of one layer class in a process: models, kinds of layer, with and without gradient, one segment."""


class Blocks:
    """The layers of one model. Those of a class share a graph, whatever the lengths and number of the segments.

    A layer runs compiled where its ``layout=`` says so (``layout.compiled``), and else as it is: an engine that
    decodes with the same module never meets a compiled layer. Recomputing a checkpointed layer brings its layout
    along, so it takes the same way again. Compilation happens at the first call. A layer that cannot be one graph is
    reported once, and from then on all run as they are.
    """

    def __init__(self, layers: list[nn.Module], *, name: str, backend: str = "inductor") -> None:
        self.name = name
        self.backend = backend
        self.working = bool(layers)
        self.compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        for layer in layers:
            layer.forward = _Block(layer, self)

    def call(self, layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        """The layer's forward, compiled if possible."""
        plain = type(layer).forward
        if not self.working:
            return plain(layer, *arguments, **options)
        if plain not in self.compiled:
            # Of the class, not of each layer, whose graphs would all be told apart by the layer's identity.
            self.compiled[plain] = torch.compile(
                plain, dynamic=True, fullgraph=True, backend=self.backend, options=_options(self.backend)
            )
        try:
            # Numbers such as a norm's epsilon or an adapter's scale are constants of a graph. As inputs they are
            # tensors on the CPU, for which inductor compiles C++ beside the GPU's kernels: minutes, with adapters.
            with dynamo_config.patch(recompile_limit=GRAPHS, specialize_float=True), _kept():
                return self.compiled[plain](layer, *arguments, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.working = False
            log.warning("%s: its layers run uncompiled (slower): %s", self.name, first_line(error))
            return plain(layer, *arguments, **options)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """With layers as they are: what is asked once or twice is not worth the seconds of a graph."""
        working, self.working = self.working, False
        try:
            yield
        finally:
            self.working = working


def _kept() -> AbstractContextManager[Any]:
    return functorch_config.patch({KEPT: True}) if hasattr(functorch_config, KEPT) else nullcontext()


def _options(backend: str) -> dict[str, Any] | None:
    """Inductor otherwise fuses a norm's two sums for many tokens and not for few, and compiles for both."""
    name = "triton.mix_order_reduction_non_strict_mode"
    known = backend == "inductor" and hasattr(inductor_config.triton, name.split(".")[1])
    return {name: True} if known else None


class _Block:
    """Stands in a layer's place as its ``forward``."""

    def __init__(self, layer: nn.Module, blocks: Blocks) -> None:
        self.layer = layer
        self.blocks = blocks

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if getattr(options.get("layout"), "compiled", False):
            return self.blocks.call(self.layer, *arguments, **options)
        return type(self.layer).forward(self.layer, *arguments, **options)
