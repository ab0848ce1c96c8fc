"""Mixtures of experts: what their routers say in a forward, and in which precision they say it."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tandem.errors import UserError

ROUTER_LOGITS = "output_router_logits"
"""The key of a config that makes every forward give its routers' logits."""


def experts_of_a_token(kind: type, config: Any) -> int | None:
    """How many experts a router picks, of a class whose load-balancing loss transformers has; None of any other."""
    balanced = hasattr(sys.modules.get(kind.__module__), "load_balancing_loss_func")
    records = getattr(kind, "_can_record_outputs", None) or {}
    return getattr(config, "num_experts_per_tok", None) if balanced and "router_logits" in records else None


def require_experts(source: str, *, trust_remote_code: bool) -> None:
    """Raises UserError where the config of a model says that it has no load-balancing loss."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
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


def quieted(config: Any) -> bool:
    """Makes a model's forwards give no router logits unless they are asked to. Returns whether they would have.

    transformers makes of them its own loss of a padded batch, whose mask a packed one has not.
    """
    asked = bool(getattr(config, ROUTER_LOGITS, False))
    if asked:
        setattr(config, ROUTER_LOGITS, False)
    return asked


def routers_of(module: Any) -> list[nn.Module]:
    """The routers of transformers' own classes that give logits, weights and the experts picked, in any order."""
    kind = getattr((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"), "target_class", None)
    # What calls its superclass by name cannot be called for a stand-in.
    if kind is None or issubclass(kind, nn.Linear):
        return []
    return [part for part in module.modules() if isinstance(part, kind) and hasattr(part, "weight")]


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

    def forward(self: nn.Module, x: Tensor) -> Any:
        return kind.forward(_Float32(self), x.float())

    return type(kind.__name__, (kind,), {"__module__": __name__, "forward": forward, "narrow": kind})


class _Float32:
    """A module whose parameters are float32."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return value.float() if isinstance(value, nn.Parameter) else value
