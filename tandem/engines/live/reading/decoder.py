"""A decoder read from the module: what is watched while a few tokens go through it becomes a description.

Names say nothing here but where a norm's epsilon and a config's multipliers are. What feeds what is seen by where
tensors lie; what a norm, an activation or a rotation computes is found by computing it. Whether the whole then computes
what the module computes is for the caller to prove.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tandem.engines.live.layers import Decoder, Unlike
from tandem.engines.live.reading.comparing import by_token, near, nearest, read_norm, rounded, same
from tandem.engines.live.reading.given import read_given
from tandem.engines.live.reading.layer import read_layer
from tandem.engines.live.reading.streams import read_split
from tandem.engines.live.reading.watch import Watch
from tandem.models.recurrent.states import Mixers, kept_in_modules, takes_list


@torch.no_grad()
def read_decoder(module: Any, positions: int | None) -> Decoder:
    """What a causal LM is built of. ``positions``: most tokens of a sequence. Raises Unlike where it is not known."""
    if positions is None:
        raise Unlike("its sequences may have any length")
    base = module.base_model
    if takes_list(module) or kept_in_modules(module):
        raise Unlike("it keeps its states " + ("in a list" if takes_list(module) else "in its modules"))
    lists = (x for x in base.children() if isinstance(x, nn.ModuleList))
    blocks = max(lists, key=lambda one: sum(x.numel() for x in one.parameters()), default=None)
    if base is module or blocks is None:
        raise Unlike("it has no list of layers")
    watch = Watch(base, blocks, positions, Mixers.of(module) or Mixers([]), read_layer)
    watch.run()
    embedding = module.get_input_embeddings()
    embedded = next((call.output for call in watch.outside if call.module is embedding), torch.empty(0))
    multiplier = getattr(module.config.get_text_config(), "embedding_multiplier", None) or 1.0
    numbers = [call for call in watch.outside if not call.input.is_floating_point()]
    placed = next((call for call in numbers if torch.equal(call.input.flatten(), watch.position_T)), None)
    starts = {scale: embedded * scale + (placed.output if placed else 0.0) for scale in (1.0, multiplier)}
    split = read_split(watch, embedded) if watch.first.ndim > 3 else None
    if split is not None:
        starts = {scale: split.begin(start.flatten(0, 1)) for scale, start in starts.items()}
    first = watch.first if split is None else by_token(watch.first)
    scale = nearest(starts, first, "what goes into its first layer is not its embedding")
    ended = watch.last if split is None else split.end(by_token(watch.last))
    last = [call for call in watch.outside if rounded(call.input, ended) or (split and near(call.input[0], ended))]
    norms = [norm for call in last if (norm := read_norm(call, ended.dtype))]
    residual = None if ended.dtype == embedded.dtype else ended.dtype
    if len(norms) > 1 or (not norms and (residual or not same(ended, watch.result))):
        raise Unlike("what follows its last layer is not one norm")
    if norms and not any(same(call.output, watch.result) for call in last):
        raise Unlike("something follows its last norm")
    return Decoder(
        embedding=embedding, embedding_scale=scale, places=placed.module if placed else None,
        given=read_given(watch, embedded) if watch.given else None,
        split=split, layers=watch.layers, norm=norms[0] if norms else None,
        residual=residual,
    )  # fmt: skip
