"""Which layers of a model get adapters: those whose names are asked for, where adapters can be put on them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError
from tandem.kernels import products
from tandem.models.lora.pairs import last_name
from tandem.models.moe.experts import stacks_of
from tandem.models.moe.routers import routers_of
from tandem.models.quantized.layers import READ_PAST, Quantized

ALL_LINEAR, EXPERTS = "all-linear", "experts"
FORWARDS = (nn.Linear.forward, products.Linear.forward, Quantized.forward, Conv1D.forward)
"""What ``all-linear`` knows linear layers by."""
READ_BY_KERNELS = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), "out_proj")
"""By model types, a linear layer whose weight kernels may read past the layer: peft refuses adapters on it."""
HEADS = ("score",)
"""A scalar head, which is trained whole, and saved with the adapters."""
TIED = (
    "the model's head is its embedding (tie_word_embeddings), and adapters on the one would not be on the other, nor "
    "could they be merged into their base"
)
log = logging.getLogger("tandem")


def is_tied(module: Any) -> bool:
    """Whether its head is its embedding."""
    head = module.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is module.get_input_embeddings().weight


def require_own_weights(module: Any) -> None:
    """Raises UserError where linear layers have their weights in common (Zamba's shared blocks)."""
    base = {id(part) for part in module.base_model.modules()}
    for name in getattr(module, "all_tied_weights_keys", None) or {}:
        part = module.get_submodule(name.rpartition(".")[0])
        if isinstance(part, (nn.Linear, Quantized)) and id(part) in base:
            raise UserError(
                f"lora: {type(module).__name__} has linear layers with weights in common ({name}), and adapters on one "
                "would not be on the other; train the whole model, without lora"
            )


def targets_of(
    module: Any, targets: Seq[str], rank: int, *, beside: bool = False, dora: bool = False
) -> tuple[list[str] | str, list[str]]:
    """Names of the layers that get adapters, or a pattern of them, and of the stacked parameters, as peft matches both.

    Raises UserError for names that nothing in the model has, for what adapters cannot be put on, and for a ``rank``
    that none of their matrices has.
    """
    others = {id(getattr(module, head, None)) for head in HEADS} | {*map(id, routers_of(module))}
    apart = {id(module.get_output_embeddings()), id(module.get_input_embeddings())}
    parts = {name.rpartition(".")[2]: id(part) for name, part in module.named_modules() if id(part) in apart}
    linear = {
        last_name(name)
        for name, p in module.named_modules()
        # A router that is a subclass (Phi-MoE's) gives more than a product.
        if isinstance(p, nn.Linear | Conv1D) and type(p).forward in FORWARDS and id(p) not in apart | others
    }
    model_type = module.config.model_type
    left_out = linear & {READ_BY_KERNELS.get(model_type), *READ_PAST.get(model_type, ())}
    linear -= left_out
    stacked = {f"{last_name(name)}.{n}" for name, names in stacks_of(module).items() for n in names}
    kind = type(module).__name__
    if left_out and ALL_LINEAR in targets and module.device.type != "meta":  # once, when they are put on
        log.warning(
            "%s: all-linear leaves out %s, whose weights it reads past its layers", kind, " and ".join(sorted(left_out))
        )
    tied = is_tied(module)
    has = [*sorted(linear), *([] if tied else sorted(parts)), *([EXPERTS, *sorted(stacked)] if stacked else [])]
    wanted = [name for name in targets if not (beside and name not in has and name != ALL_LINEAR)]
    if not linear and ALL_LINEAR in wanted:
        raise UserError(f"lora: {kind} has no linear layers (torch.nn.Linear, Conv1D) to put adapters on")
    if not wanted:
        pattern = targets[0]
        if len(targets) == 1 and any(
            last_name(n) in linear and re.fullmatch(pattern, n) for n, _ in module.named_modules()
        ):
            # That of the policy's folder, which peft has written.
            return pattern, []
        raise UserError(f"lora.targets: {kind}, beside the policy, has no {' and no '.join(targets)}; add others")
    for name in wanted:
        if name in parts and tied:
            raise UserError(f"lora.targets: {name}: {TIED}; leave it out")
        if dora and (name in parts or name == EXPERTS or name in stacked):
            raise UserError(f"lora.dora: is of linear layers, and lora.targets has {name}; leave one of them out")
        if name != ALL_LINEAR and name not in has:
            raise UserError(
                f"lora.targets: {kind} has no layer {name} that adapters can be put on; those it has: {', '.join(has)}"
                + ("; its experts are not stacked, or computed in a way of their own" if name == EXPERTS else "")
            )
    layers = set(wanted) - {ALL_LINEAR, EXPERTS} - stacked | (linear if ALL_LINEAR in wanted else set())
    if dora and stacked and (taken := _taken_for_experts(module, layers)):
        rest = sorted(layers.difference(taken))
        raise UserError(
            f"lora.dora: is of linear layers, and peft takes {', '.join(taken)} of {kind} for those of its experts; "
            f"leave it out, or give --lora.targets {' '.join(rest) or 'others'}"
        )
    stacked = stacked if EXPERTS in wanted else stacked.intersection(wanted)
    found = [(last_name(n), p) for n, p in module.named_modules() if last_name(n) in layers]
    if dora and (transposed := [name for name, part in found if isinstance(part, Conv1D)]):
        raise UserError(f"lora.dora: is of layers that are stored as [out, in], and {kind}'s {transposed[0]} is not")
    shapes = [(name, _shape(part)) for name, part in found if hasattr(part, "weight")]
    for name, names in stacks_of(module).items():
        shapes += [(f"{last_name(name)}.{n}", getattr(module.get_submodule(name), n).shape[1:]) for n in names]
    _require_low(module, [(name, shape) for name, shape in shapes if name in layers | stacked], rank)
    return sorted(layers), sorted(stacked)


def _taken_for_experts(module: Any, layers: set[str]) -> list[str]:
    """Those of the names that peft takes for what stacked experts of this kind of model were called before."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[*layers])
    with suppress(ValueError):  # of one that is stacked with others that are not named: said as they are put on
        convert_peft_config_for_transformers(config, module, None)
    return sorted(layers.difference(config.target_modules or ()))


def _shape(layer: Any) -> tuple[int, ...]:
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _require_low(module: Any, shapes: Seq[tuple[str, tuple[int, ...]]], rank: int) -> None:
    """Raises UserError where no matrix of these names and shapes has so high a rank; says which have less."""
    low = {name: min(shape) for name, shape in sorted(shapes, key=lambda one: -min(one[1])) if min(shape) < rank}
    said = ", ".join(f"{name} ({size})" for name, size in sorted(low.items()))
    if low and all(min(shape) < rank for _, shape in shapes):
        raise UserError(f"lora.rank: {rank} is more than the matrices of its targets have: {said}; give less")
    if low and module.device.type != "meta":
        log.warning(
            "%s: lora.rank: %d is more than the matrices of some targets have, which is no low rank: %s",
            type(module).__name__, rank, said,
        )  # fmt: skip
