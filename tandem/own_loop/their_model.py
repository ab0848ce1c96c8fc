"""The model of somebody's own training loop, as it is handed over: wrapped, compiled, sharded, in training mode."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from tandem.engines.live.core import evaluating
from tandem.errors import UserError, listed
from tandem.models.moe.routers import all_weights, has_experts
from tandem.models.proof.probe import rounding_by_token
from tandem.models.seeing import PartNames
from tandem.models.text_config import sees
from tandem.parallel.sharding import forget_gathered

INSIDE = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile and the checkpoint wrapper keep the module that they wrap."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class GivenModel:
    """A transformers causal LM and its parameters by the names that the unwrapped model has.

    A sharded parameter is a DTensor with its rows spread over a mesh of one dimension.
    """

    module: Any
    parameters: dict[str, Tensor]

    @property
    def vocabulary(self) -> int:
        """Rows of its input embedding."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def mesh_device(self) -> str | None:
        """The kind of device that the ranks gather on; None where nothing is sharded."""
        return next((p.device_mesh.device_type for p in self.parameters.values() if isinstance(p, DTensor)), None)

    def logprobs(self, sequences: Seq[Seq[int]], own: torch.device) -> tuple[list[list[float]], bool]:
        """Log-prob, at temperature 1, of every token but the first, by the model's own forward.

        Also whether all of it was computed in float32. A collective where the model is sharded. ``own`` is this
        rank's device: offloaded parameters lie elsewhere.
        """
        device = own if self.mesh_device == "cuda" else self.module.get_input_embeddings().weight.device
        dtypes: set[torch.dtype] = {p.dtype for p in self.parameters.values()}
        head = self.module.get_output_embeddings()
        # What FSDP casts to shows inside the forward only.
        hook = head and head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        rows = []
        try:
            with evaluating(self.module.modules()):
                for sequence in sequences:
                    token_1L = torch.tensor([list(sequence)], device=device)
                    logp_LV = self.module(input_ids=token_1L, use_cache=False).logits[0].float().log_softmax(-1)
                    rows.append(logp_LV[:-1].gather(1, token_1L[0, 1:, None]).squeeze(1).tolist())
        finally:
            if hook:
                hook.remove()
            forget_gathered(self.module)
        tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return rows, dtypes == {torch.float32} and not torch.is_autocast_enabled(device.type) and not tf32

    def rounding(self, sequences: Seq[Seq[int]], own: torch.device, exact: bool) -> list[list[float]]:
        """How far rounding may move each of ``logprobs``, in nats, by deciding which experts a token takes; all 0 where
        they are ``exact`` or there are no experts. A collective where the model is sharded."""
        if exact or not has_experts(self.module):
            return [[0.0] * (len(ids) - 1) for ids in sequences]
        return rounding_by_token(self.module, lambda: self.logprobs(sequences, own)[0])


def given(model: nn.Module) -> GivenModel:
    """Looks through DDP, torch.compile and checkpoint wrappers. Raises UserError for FSDP1 and other shardings."""
    module: Any = model
    if not isinstance(module, nn.Module):
        raise UserError(f"update: a {type(module).__name__} is no model; give the module itself")
    while inner := _inside(module):
        module = inner
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise UserError("update: the model is wrapped in FullyShardedDataParallel (FSDP1); shard it with fully_shard")
    if not hasattr(module, "get_input_embeddings"):
        raise UserError(f"update: {type(module).__name__} is no transformers model; give the one inside it")
    # What a forward has left gathered is a copy, in another dtype, and older than the last optimizer step.
    forget_gathered(module)
    weights = {".".join(x for x in n.split(".") if x not in INSIDE): p for n, p in all_weights(module).items()}
    if sees(module.config, "update"):
        # Of a model that also sees the sampler has the text half, by its own names.
        names = PartNames.of(module.config)
        weights = {own: p for n, p in weights.items() if (own := names.in_half(n)) is not None}
    return GivenModel(module, {n: _in_rows(n, p) for n, p in weights.items()})


def require_same(given: Mapping[str, Tensor], expected: Shapes, source: str) -> None:
    """Raises UserError, naming a parameter, where the model is not the one that the sampler has loaded."""
    advice = f"save the model that you train, with its tokenizer, and give the sampler that folder instead of {source}"
    unknown = [name for name in given if name not in expected]
    if adapter := next((name for name in unknown if "lora_" in name), None):
        raise UserError(f"update: {adapter} is an adapter's parameter; give the model with its adapters merged")
    missing = [name for name in expected if name not in given]
    if unknown or missing:
        words = [f"has {listed(unknown)}, which the sampler's has not"] if unknown else []
        words += [f"lacks {listed(missing)}"] if missing else []
        raise UserError(f"update: the model {' and '.join(words)}; {advice}")
    for name, tensor in given.items():
        if tuple(tensor.shape) != tuple(expected[name]):
            raise UserError(
                f"update: {name} has shape {tuple(tensor.shape)} and {tuple(expected[name])} in the sampler; {advice}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"update: {name} is {tensor.dtype}, a quantized weight; give the model dequantized")


def _inside(module: Any) -> Any:
    if isinstance(module, DistributedDataParallel):
        return module.module
    return next((getattr(module, name) for name in INSIDE if hasattr(module, name)), None)


def _in_rows(name: str, parameter: Tensor) -> Tensor:
    """The parameter over the one mesh dimension that it is sharded on (HSDP's other one holds copies)."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh, placements = parameter.device_mesh, parameter.placements
    over = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not over:
        return parameter.to_local()
    if len(over) > 1 or not placements[over[0]].is_shard(0):
        raise UserError(
            f"update: {name} is placed as {placements} on a mesh of {tuple(mesh.shape)}; the sampler takes weights "
            "sharded by rows over one mesh dimension (fully_shard as it comes, with or without replication)"
        )
    if mesh.ndim == 1:
        return parameter
    names = mesh.mesh_dim_names
    if names is None:
        raise UserError(f"update: {name} lies on a mesh of {tuple(mesh.shape)} without mesh_dim_names; name them")
    return DTensor.from_local(
        parameter.to_local(),
        mesh[names[over[0]]],
        [Shard(0)],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
