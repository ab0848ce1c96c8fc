"""Mixtures of experts: what their routers say in a forward, and in which precision they say it."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tandem.errors import UserError
from tandem.kernels import products
from tandem.kernels.available import on_triton
from tandem.kernels.choice import Rule, Score, choose, choose_torch
from tandem.models.kinds import kind_of
from tandem.models.text_config import config_in
from tandem.types import CORRECTION_BIAS

LINEAR = (nn.Linear.forward, products.Linear.forward)
"""What linear layers that do no more than multiply are known by."""
TRIED = 16
"""Tokens with which a router is compared."""
ROUTER_LOGITS = "output_router_logits"
"""The key of a config that makes every forward give its routers' logits."""


def experts_of_a_token(kind: type, config: Any) -> int | None:
    """How many experts a router picks, of a class whose load-balancing loss transformers has; None of any other."""
    balanced = hasattr(sys.modules.get(kind.__module__), "load_balancing_loss_func")
    records = getattr(kind, "_can_record_outputs", None) or {}
    # 0: a model of a class that may have experts, without any (Granite 4 Micro).
    return getattr(config, "num_experts_per_tok", None) or None if balanced and "router_logits" in records else None


def require_experts(source: str) -> None:
    """Raises UserError where the config of a model says that it has no load-balancing loss."""
    config = config_in(source)
    # Of a class that is not transformers' own nobody knows before it is loaded.
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if known and experts_of_a_token(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config) is None:
        raise no_experts(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def no_experts(kind: type) -> UserError:
    """What is said of ``aux_loss_coef`` for a model that it has no effect on."""
    return UserError(
        f"aux_loss_coef: {kind.__name__} has no experts that are balanced by a loss (transformers has none for it); "
        "leave it out"
    )


def correction_biases(module: Any) -> dict[str, Tensor]:
    """The buffers that its routers add to experts' scores before they pick, [E] each, by name."""
    return {name: b for name, b in module.named_buffers() if name.rpartition(".")[2] == CORRECTION_BIAS}


def all_weights(module: Any) -> dict[str, Tensor]:
    """What of it training changes and a push carries, by name: its parameters, and its ``correction_biases``."""
    return {**dict(module.named_parameters()), **correction_biases(module)}


def require_biases(source: str) -> None:
    """Raises UserError where the config of a model says that its routers have no biases."""
    config = config_in(source)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            Picks(AutoModelForCausalLM.from_config(config))


class Picks:
    """Which experts the routers with biases of a module pick in a forward.

    Raises UserError where it has no such routers.
    """

    def __init__(self, module: Any) -> None:
        self.biases = correction_biases(module)
        self.seen: dict[int, Tensor] | None = None
        if not self.biases:
            raise UserError(
                f"bias_update_speed: {type(module).__name__} has no router with a bias for each expert "
                f"({CORRECTION_BIAS}); leave it out"
            )
        for number, name in enumerate(self.biases):
            see = functools.partial(self._see, number)
            _experts_beside(module, name).register_forward_pre_hook(see, with_kwargs=True)

    @contextmanager
    def watched(self) -> Iterator[dict[int, Tensor]]:
        """Gives a dict that a forward inside fills: by a router's number what it picks, int64 [tokens, k]."""
        self.seen = {}
        try:
            yield self.seen
        finally:
            # A checkpointed layer runs again in the backward pass.
            self.seen = None

    def load(self, picked: list[Tensor]) -> Tensor:
        """How many tokens each expert was picked for, int64 [L, E] of L routers."""
        size = max(len(bias) for bias in self.biases.values())
        # Some pick an expert that does not exist, to pick none.
        load_LE = picked[0].new_zeros(len(picked), size + 1)
        for load_E, picked_TK in zip(load_LE, picked, strict=True):
            load_E.scatter_add_(0, picked_TK.flatten(), torch.ones_like(picked_TK.flatten()))
        return load_LE[:, :size]

    def _see(self, number: int, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is not None:
            self.seen[number] = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach()


def _experts_beside(module: Any, bias: str) -> nn.Module:
    """The experts among which the router with this bias picks."""
    path = bias.split(".")[:-1]
    while path:
        experts = getattr(module.get_submodule(".".join(path)), "experts", None)
        if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
            return experts
        path.pop()
    raise UserError(f"bias_update_speed: the experts that {bias} is for are not stacked in one module; leave it out")


def quieted(config: Any) -> bool:
    """Makes a model's forwards give no router logits unless they are asked to. Returns whether they would have.

    transformers makes of them its own loss of a padded batch, whose mask a packed one has not.
    """
    asked = bool(getattr(config, ROUTER_LOGITS, False))
    if asked:
        setattr(config, ROUTER_LOGITS, False)
    return asked


def routers_of(module: Any) -> list[nn.Module]:
    """The routers of transformers' own classes, which stand beside stacked experts: parts with a row of weights for
    each, that give logits, weights and the experts picked, or linear layers that give logits alone (Jamba, Hunyuan)."""
    found: list[nn.Module] = []
    for part in module.modules():
        experts: Any = getattr(part, "experts", None)
        for beside in part.children() if hasattr(experts, "num_experts") else []:
            if beside is experts:
                continue
            weight = getattr(beside, "weight", None)
            # Linear layers that do more call their superclass by name (Phi-MoE, Llama 4): not to be had for a stand-in.
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(beside, nn.Linear):
                found += [beside] if len(weight) == experts.num_experts else []
                continue
            layers = [x for x in beside.modules() if isinstance(x, nn.Linear)]
            if [x.out_features for x in layers] == [experts.num_experts]:
                found += [x for x in layers if getattr(x, "narrow", type(x)).forward in LINEAR]
    return found


def has_experts(module: Any) -> bool:
    """Whether some of its layers pick experts for each token, of any class whose experts transformers can replace."""
    return any(hasattr(part, "num_experts") for part in module.modules())


def in_float32(router: nn.Module) -> None:
    """From its next call on a router of a model in lower precision computes in float32, from the same parameters.

    Logits in bfloat16 have 8 bits, and which expert comes first is often an accident of theirs.
    """
    if not hasattr(router, "narrow"):
        kind: Any = type(router)
        router.__class__ = _in_float32(kind)


@functools.cache
def _in_float32(kind: Any) -> Any:
    """The class of a router that sees float32 in the places of its parameters.

    A class, and not a ``forward`` of each router's own: compiled layers share a graph where their parts are of one.
    """

    def forward(self: Any, x: Tensor, *others: Any) -> Any:
        # Compiled layers and gradients are the module's own matter.
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and on_triton(x):
            if not hasattr(self, "chooser"):
                self.chooser = chooser_of(self, kind, *others)
            if self.chooser is not None:
                return self.chooser(self, x, *(others or (getattr(self, CORRECTION_BIAS, None),)))
        return kind.forward(_Float32(self), x.float(), *others)

    return kind_of(_in_float32, kind, forward=forward, narrow=kind)


class _Float32:
    """A module whose parameters are float32, some of them ``others`` than its own."""

    def __init__(self, module: nn.Module, others: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.module, self.others = module, others

    def __getattr__(self, name: str) -> Any:
        value = self.others[name] if name in self.others else getattr(self.module, name)
        return value.float() if isinstance(value, nn.Parameter) else value


@dataclass(frozen=True)
class Chooser:
    """A router that is a product with its weight, and a choice by a ``Rule``: two operations in a step of decoding."""

    rule: Rule
    names: tuple[str, ...]
    """What it gives, in its order: logits, weights and indices."""

    def __call__(self, router: Any, x: Tensor, correction_X: Tensor | None) -> tuple[Tensor, ...]:
        """What the router gives for x [..., E], in float32."""
        x_TE, weight_XE = x.reshape(-1, x.shape[-1]), router.weight
        if x.is_cuda and x.dtype == weight_XE.dtype != torch.float32:
            logit_TX = torch.mm(x_TE, weight_XE.T, out_dtype=torch.float32)
        else:
            logit_TX = F.linear(x_TE.float(), weight_XE.float())
        if getattr(router, "bias", None) is not None:
            logit_TX += router.bias
        weight_TK, index_TK = choose(logit_TX, correction_X, self.rule)
        made = {"logits": logit_TX, "weights": weight_TK, "indices": index_TK}
        return tuple(made[name] for name in self.names)


@torch.no_grad()
def chooser_of(router: Any, kind: Any, *others: Any) -> Chooser | None:
    """What reproduces the ``forward`` of a kind of router for tensors drawn at random in the place of its own.

    None if nothing does. It waits for the device.
    """
    known = {"weight", "bias", CORRECTION_BIAS}
    if not {name for name, _ in (*router.named_parameters(), *router.named_buffers())} <= known or len(others) > 1:
        return None
    experts, width = router.weight.shape
    generator = torch.Generator().manual_seed(0)
    weight_XE, x_TE, common_1E = (torch.randn(n, width, generator=generator) for n in (experts, TRIED, 1))
    bias_X, correction_X = (torch.rand(experts, generator=generator) for _ in range(2))
    # Of the first tokens the scores of all experts are near 0, where what is added to their sum shows.
    common_1E *= width**0.5 / common_1E.norm()
    weight_XE = (weight_XE + common_1E) * width**-0.5
    shift_T1, size_T1 = (torch.linspace(*ends, TRIED)[:, None] for ends in ((-9.0, 4.0), (0.1, 3.0)))
    x_TE = size_T1 * x_TE + shift_T1 * common_1E * width**-0.5
    weight_XE, x_TE, bias_X, correction_X = (
        t.to(router.weight.device) for t in (weight_XE, x_TE, bias_X, correction_X)
    )
    its = {"weight": nn.Parameter(weight_XE), "bias": nn.Parameter(bias_X), CORRECTION_BIAS: correction_X}
    stand_in = _Float32(router, {name: value for name, value in its.items() if getattr(router, name, None) is not None})
    made = kind.forward(stand_in, x_TE, *(correction_X for _ in others))
    index_TK = next((x for x in made if x.dtype == torch.int64), None) if isinstance(made, tuple) else None
    if index_TK is None or index_TK.shape[-1] == experts:
        return None
    picks = index_TK.shape[-1]
    roles = {(torch.float32, experts): "logits", (torch.float32, picks): "weights", (torch.int64, picks): "indices"}
    names = tuple(roles.get((x.dtype, x.shape[-1]), "") for x in made)
    if sorted(names) != ["indices", "logits", "weights"]:
        return None
    truth_TX = torch.zeros_like(made[names.index("logits")]).scatter_(-1, index_TK, made[names.index("weights")])

    def is_it(rule: Rule, choose: Callable[..., tuple[Tensor, Tensor]]) -> bool:
        corrected = others or hasattr(router, CORRECTION_BIAS)
        weight_TK, found_TK = choose(made[names.index("logits")], correction_X if corrected else None, rule)
        return torch.allclose(
            torch.zeros_like(truth_TX).scatter_(-1, found_TK, weight_TK), truth_TX, rtol=1e-4, atol=0.0
        )

    # The kernel is compiled for one rule only.
    rule = next((rule for rule in _rules(router, picks) if is_it(rule, choose_torch)), None)
    return Chooser(rule, names) if rule is not None and is_it(rule, choose) else None


def _rules(router: Any, picks: int) -> Iterator[Rule]:
    """By which it might choose."""
    groups, kept = getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    ways = itertools.product(get_args(Score), (1, 2) if groups > 1 else (1,), ((False, 0.0), (True, 0.0), (True, 1e-6)))
    for score, best, (shared, eps) in ways:
        yield Rule(picks, score, groups, kept, best, shared, eps, scale)
