"""Inside a vLLM worker: a push of Hugging Face tensors into the model, and reading back what became of them.

vLLM fuses tensors, shards them and, on CPUs, repacks them for its kernels. Its layerwise reload does all that again
for weights that come while it runs, into the memory that captured graphs know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tandem.engines.vllm.checksums import Shard
from tandem.engines.vllm.copies import Copies, NotedCopies
from tandem.engines.vllm.names import Names
from tandem.engines.vllm.regions import Piece, piece_of
from tandem.errors import UserError, first_line, listed
from tandem.kernels import bits
from tandem.sync.checksum import RunningSums
from tandem.sync.plan import Plan

Bucket = list[tuple[str, Tensor]]
ROWS = 1024
"""Rows of the identity that go through a packed layer at once."""


@dataclass
class Target:
    """One parameter of the model: what was loaded into it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)
    """What this rank took of which HF tensors, and where it lies."""
    loaded: int = 0
    """How many elements that is."""
    exact: bool = True
    """Whether the values are stored as they came, and it is known where."""

    def take(self, piece: Piece | None) -> None:
        """What a copy into it was of a pushed tensor; None where it was of something else."""
        self.pieces += [] if piece is None else [piece]
        self.exact &= piece is not None


Record = dict[str, Target]
"""Every parameter that a push filled, by its name in vLLM's model."""


def load_push(model: Any, model_config: Any, names: Names, buckets: Iterable[Bucket], record: Record | None) -> None:
    """Loads one push into the model, under the ``names`` of its checkpoint.

    An empty ``record`` is filled on the way, which takes a little longer. Raises UserError and names the tensors that
    vLLM cannot load, does not take, or that the push lacks. Whatever is raised, some weights are new and some are old
    then, and the model must not be used before another push.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    before = [name for name, _ in model.named_parameters()]
    initialize_layerwise_reload(model)
    # What was computed from loaded weights (latent attention) is gone for now, and is computed anew.
    there = dict(model.named_parameters())
    expected = [name for name in before if name in there]
    try:
        if record is None:
            for bucket in buckets:
                _load(model, names.of(bucket))
                _keep(model, bucket)
        else:
            _load_and_record(model, names, buckets, record, expected)
    finally:
        finalize_layerwise_reload(model, model_config)
        _repack(model)


def load_and_record_copies(model: Any, names: Names, buckets: Iterable[Bucket], record: Record) -> Copies | None:
    """Loads one push straight into the parameters. Returns its copies, or None where they are not all of it."""
    copies = Copies()
    parameters = dict(model.named_parameters())
    for bucket in buckets:
        with NotedCopies(parameters) as noted:
            _load(model, names.of(bucket))
        copies.add(bucket, noted.made)
    return copies if copies.covers({name: target.loaded for name, target in record.items()}) else None


def play_copies(copies: Copies, buckets: Iterable[Bucket], sums: Sums | None) -> None:
    """Loads one push by the copies of an earlier one, and begins to sum what it filled."""
    for number, _ in enumerate(buckets):
        copies.play(number)
        if sums is not None:
            sums.tally.add(number)
    if sums is not None:
        sums.tally.launch()


def _load(model: Any, bucket: Bucket) -> None:
    try:
        model.load_weights(bucket)
    except Exception as error:
        names = bucket[0][0] if len(bucket) == 1 else f"{bucket[0][0]} to {bucket[-1][0]}"
        raise UserError(
            f"weight sync: vLLM's {type(model).__name__} cannot load {names}: {first_line(error)}; "
            "is it the trainer's model?"
        ) from error


def _load_and_record(model: Any, names: Names, buckets: Iterable[Bucket], record: Record, expected: list[str]) -> None:
    """One tensor at a time, so that what its loading touches is known."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    loading: dict[str, Any] = {}
    # Layerwise reload lets routers' biases be loaded where they lie, by whatever loads what has no loader.
    loaders = [(p, getattr(p, "weight_loader", default_weight_loader), name) for name, p in model.named_parameters()]
    for parameter, loader, name in loaders:
        parameter.weight_loader = _watched(loader, name, loading, record)
    untaken = []
    try:
        for bucket in buckets:
            for name, tensor in bucket:
                loading |= {"name": name, "tensor": tensor, "taken": False}
                _load(model, names.of([(name, tensor)]))
                if not loading["taken"]:
                    untaken.append(name)
            _keep(model, bucket)
    finally:
        # Layerwise reload takes these very parameters the next time.
        for parameter, loader, _ in loaders:
            parameter.weight_loader = loader
    if untaken:
        raise UserError(
            f"weight sync: vLLM's {type(model).__name__} takes no tensors of these names: {listed(untaken)}; "
            "send what the model's named_parameters() gives"
        )
    if missing := [name for name in expected if name not in record]:
        raise UserError(
            f"weight sync: the push left these parameters of vLLM's {type(model).__name__} as they were: "
            f"{listed(missing)}; is it the trainer's model?"
        )


def _watched(loader: Callable[..., Any], name: str, loading: dict[str, Any], record: Record) -> Callable[..., Any]:
    """``loader``, which layerwise reload has put on parameter ``name``, noting what goes through it."""
    from vllm.model_executor.model_loader.reload.meta import get_numel_loaded

    @wraps(loader)
    def watched(*args: Any, **kwargs: Any) -> Any:
        original = loader
        while original.__name__ == "online_process_loader":
            original = original.__wrapped__  # type: ignore[attr-defined]
        bound = signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        # The first, which loaders of experts are given by its name.
        parameter, tensor = next(iter(bound.arguments.values())), loading["tensor"]
        target = record.setdefault(name, Target(tuple(parameter.shape), parameter.dtype))
        with NotedCopies({name: parameter}) as noted:
            target.loaded += get_numel_loaded(original, bound)[0]
        for _, written, source in noted.made:
            # Some loaders store a function of what they are given (Mamba's A), others cast.
            target.take(piece_of(loading["name"], tensor, parameter, written, source))
        target.exact &= tensor.dtype == parameter.dtype
        loading["taken"] = True
        return loader(*args, **kwargs)

    # Named as what it wraps. Layerwise reload knows its own wrappers by their name: it neither wraps them twice nor
    # leaves them on, and lets others be.
    return watched


def _keep(model: Any, bucket: Bucket) -> None:
    """Copies the bucket's tensors that layerwise reload still refers to, as their memory is about to be reused.

    It keeps those of layers that are not complete yet, or that never will be because of padding.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    memory = {tensor.untyped_storage().data_ptr() for _, tensor in bucket}
    for module in model.modules():
        for _, bound in get_layerwise_info(module).loaded_weights:
            for key, value in bound.arguments.items():
                if isinstance(value, Tensor) and not value.is_meta and value.untyped_storage().data_ptr() in memory:
                    bound.arguments[key] = value.clone()


def _repack(model: Any) -> None:
    """What reloading leaves on a CPU: a tied head's packed copy as it was, since it has no weights of its own to load,
    and experts as they came, which its kernels want packed."""
    for _, module in _packed_heads(model):
        module.quant_method.process_weights_after_loading(module)
    for module in model.modules():
        if (experts := _packed_experts(module)) is not None:
            experts.process_weights_after_loading(module)


def _packed_experts(module: Any) -> Any | None:
    """What multiplies a layer's experts on a CPU, where it packs their weights."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    packs = any(kind.__name__ == "CPUUnquantizedExperts" for kind in type(experts).__mro__)
    return experts if packs and hasattr(module, "w13_weight") else None


def _packed_heads(model: Any) -> Iterator[tuple[str, Any]]:
    """Heads that share the embedding's parameter and hold a packed copy of it (CPUs only)."""
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and first.setdefault(id(weight), name) != name and hasattr(module, "cpu_linear"):
            yield name, module


Summed = tuple[str, str, Any]
"""A name, the parameter (by its name in the record) that it stands for, and the module that holds it."""


def find_summed(model: Any) -> list[Summed]:
    """Everything of a model that has a checksum: its parameters, and packed copies of tied ones."""
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    summed: list[Summed] = [(name, name, model.get_submodule(name.rpartition(".")[0])) for name in owner.values()]
    return summed + [
        (f"{name}.weight", owner[id(module.weight)], module)
        for name, module in _packed_heads(model)
        if id(module.weight) in owner
    ]


class Sums:
    """This rank's checksums of what the model computes with. ``tally`` is told of the buckets of a push.

    ``overlap`` is ``Link.overlaps`` of the link that brings them.

    On a CPU a linear layer's weights are packed; they are read back by sending the identity through it. Parameters
    whose values are not stored as they came (quantized, cast, computed from them) are left out.
    """

    def __init__(
        self, summed: Iterable[Summed], record: Record, plan: Plan, device: torch.device, overlap: bool = True
    ) -> None:
        self.plan = plan
        self.held: list[tuple[Piece, str, Any, Target]] = []
        """Every piece, the name of what it lies in, and the module that holds that."""
        self.owners: list[tuple[Any, str]] = []
        """The modules that hold something to be summed, and the attributes."""
        for name, recorded, module in summed:
            target = record.get(recorded)
            if target is not None and target.exact:
                self.held += [(piece, name, module, target) for piece in target.pieces]
                self.owners.append((module, name.rpartition(".")[2]))
        self.slots: dict[str, list[int]] = {}
        for slot, (piece, *_) in enumerate(self.held):
            self.slots.setdefault(piece.part, []).append(slot)
        self.shards = [Shard(piece.part, name, piece.region) for piece, name, *_ in self.held]
        self.tally = RunningSums(
            len(self.held), device, self._jobs, lambda: [getattr(m, a) for m, a in self.owners], overlap
        )
        self.unseen: set[int] = set()

    def begin(self) -> None:
        """Sums everything as it is now."""
        for bucket in range(len(self.plan.buckets)):
            self.tally.add(bucket)
        self.tally.launch()

    def result(self) -> list[int | None]:
        """The sum of each of ``shards``, None where it cannot be told. Waits for the device."""
        return [None if slot in self.unseen else total for slot, total in enumerate(self.tally.result())]

    def _jobs(self, bucket: int) -> list[bits.Job]:
        jobs: list[bits.Job] = []
        contents: dict[str, Tensor | None] = {}
        for spec in self.plan.buckets[bucket]:
            for slot in self.slots.get(spec.name, ()):
                piece, name, module, target = self.held[slot]
                if name not in contents:
                    contents[name] = _content(module, name.rpartition(".")[2], target)
                content = contents[name]
                if content is None:
                    self.unseen.add(slot)
                    continue
                self.unseen.discard(slot)
                start, step = piece.region.start, piece.region.step
                jobs.append(bits.Job(slot, piece.of(content), spec.torch_dtype, start, step))
        return jobs


def _content(module: Any, attribute: str, target: Target) -> Tensor | None:
    """What the module computes with, in the shape in which it was loaded, or None where that cannot be told."""
    if attribute in ("w13_weight", "w2_weight") and _packed_experts(module) is not None:
        return None
    linear = getattr(module, "cpu_linear", None)
    weight = getattr(module, attribute).detach()
    if attribute == "weight" and linear is not None and len(target.shape) == 2 and _multiplies(module):
        width = target.shape[1]
        rows = (torch.eye(width, dtype=target.dtype)[start : start + ROWS] for start in range(0, width, ROWS))
        return torch.cat([linear(part, weight, None) for part in rows]).t().contiguous()
    if weight.dtype != target.dtype:
        # Some CPU kernels want the bias in float32; that keeps every value.
        narrow = weight.to(target.dtype)
        if not torch.equal(narrow.to(weight.dtype), weight):
            return None
        weight = narrow
    return weight if weight.is_contiguous() and weight.numel() == torch.Size(target.shape).numel() else None


def _multiplies(module: Any) -> bool:
    """Whether the module is a matrix product, as an embedding's table is not."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(module, LinearBase | ParallelLMHead)
