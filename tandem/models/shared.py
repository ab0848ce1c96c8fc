"""A critic on the base of a policy with adapters: layers are the policy's own, adapters and head are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tandem.errors import UserError
from tandem.models.forward import LoadedModel
from tandem.models.loading import load_tokenizer, prepare_module
from tandem.models.lora.adapters import AdapterParams, put_adapters
from tandem.models.lora.folder import base_of
from tandem.models.proof.limits import model_config
from tandem.models.scalar import forget_scale, scalar_class
from tandem.models.trusted import is_trusted


def scalar_beside(policy: LoadedModel, source: str, adapters: AdapterParams) -> LoadedModel:
    """A model with one scalar a token, whose base is in memory once: the policy's, without the policy's adapters.

    ``adapters`` are put on it; its head says 0 at first, but where they are of a folder that brings one along. Raises
    UserError where they are not of that base.
    """
    assert policy.adapters is not None, "a base is shared by models with adapters"
    tokenizer = load_tokenizer(source)
    base = base_of(source)
    config = model_config(base)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    forget_scale(config)
    kind = scalar_class(config, base)
    with torch.device("meta"):
        module = kind.from_config(config, trust_remote_code=is_trusted(base))
    if not isinstance(getattr(module, "score", None), nn.Linear):
        raise UserError(f"{source}: {kind.__name__} has no linear head named 'score'; use a decoder model")
    if policy.module.base_model is policy.module:
        raise UserError(
            f"lora.share_critic: transformers has no base model in a {type(policy.module).__name__}; leave it out"
        )
    share(policy.module.base_model, module.base_model)
    head = nn.Linear(module.score.in_features, 1, bias=False, device=policy.device)
    nn.init.zeros_(head.weight)
    module.score = head
    if left := [name for name, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta]:
        raise UserError(
            f"lora.share_critic: {left[0]} of {type(module).__name__} is no part of {type(policy.module).__name__}; "
            "leave it out"
        )
    put = put_adapters(module, adapters, str(base), base_sum=policy.adapters.body_sum)
    model = prepare_module(module, tokenizer, dtype=policy.dtype, device=str(policy.device))
    model.adapters, model.shares_base = put, True
    return model


def share(policy: nn.Module, module: nn.Module) -> None:
    """Gives a module of the policy's class the policy's own layers, parameters and buffers, without its adapters.

    Whatever has no parts is shared itself, quantised layers with what they know of their numbers; of other parts the
    parameters and buffers are.
    """
    for name, mine in module.named_children():
        theirs: Any = getattr(policy, name)
        while hasattr(theirs, "base_layer"):
            theirs = theirs.base_layer
        if any(True for _ in theirs.children()):
            share(theirs, mine)
        else:
            setattr(module, name, theirs)
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        module._parameters[name] = policy._parameters[name]
    for name in [name for name, _ in module.named_buffers(recurse=False)]:
        module._buffers[name] = policy._buffers[name]
