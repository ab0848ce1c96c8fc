"""Layers that carry a state from token to token: linear attention, state spaces, short convolutions.

transformers keeps what such a layer needs of the tokens before in its cache. Given a cache of ours a module computes
with states that are kept elsewhere, and it says which of its parts have one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from tandem.models.attention import PackedLayout, UnsupportedAttention
from tandem.models.recurrent.scans import argument_of_segments, speed_up_scans
from tandem.models.recurrent.segments import Segments
from tandem.models.sharing import Sharing

Name = tuple[int, str, int]
"""A state's layer, its kind (an attribute of the layer), and its number there."""
KINDS = ("conv_states", "recurrent_states")
IN_MODULES = ("conv1d_state", "recurrent_states")
"""Attributes in which parts of a module keep states themselves (RecurrentGemma)."""


def states_of_layers(module: Any) -> list[int]:
    """For each layer, how many states of a kind it may keep; empty where a module keeps none.

    0 for one that only attends. Those that it does not keep in transformers' cache are of one layer here.
    """
    if takes_list(module) or kept_in_modules(module):
        return [1]
    supported = getattr(type(module), "_supports_default_dynamic_cache", None)
    if supported is not None and not supported():
        return []
    try:
        layers = DynamicCache(config=module.config).layers
    except (KeyError, AttributeError):
        return []
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return []
    return [getattr(layer, "number_of_states", 0) for layer in layers]


def takes_list(module: Any) -> bool:
    """Whether its forward is given a list of its own of states (RWKV 4)."""
    return "state" in inspect.signature(module.forward).parameters


def kept_in_modules(module: Any) -> list[tuple[Any, str]]:
    """Parts that keep states in themselves, and in which attributes."""
    return [(part, name) for part in module.modules() for name in IN_MODULES if name in vars(part)]


def put_right(module: Any) -> None:
    """Puts right what some classes of transformers have wrong, and lets the Mambas use scans of ours.

    Time steps may be as short as the config's key of that name says, or of any length: some heed another key, and
    lengthen short steps where many tokens go through at once and not where one does (Nemotron H, Zamba 2). The base
    model is found: Llama 4's goes by a name that no part has, and without it training would keep whole logits.
    """
    if module.base_model is module and hasattr(module, "model"):
        module.base_model_prefix = "model"
    limit = tuple(getattr(module.config, "time_step_limit", None) or (0.0, float("inf")))
    for part in module.modules():
        if hasattr(part, "time_step_limit"):
            part.time_step_limit = limit
    speed_up_scans(module)


def cache_argument(module: Any) -> str:
    """The name of the cache among the arguments of a module's forward."""
    return "cache_params" if "cache_params" in inspect.signature(module.forward).parameters else "past_key_values"


class Held(Cache):
    """What a module is given as its cache: states that it changes in place, nothing before its keys and values.

    ``kept``: ``states_of_layers``. ``states``: what they are, [rows, ...] each; none where sequences begin.
    """

    def __init__(self, kept: list[int], states: Mapping[Name, Tensor] | None = None) -> None:
        super().__init__(layers=[HeldLayer(number) if number else DynamicLayer() for number in kept])
        self.passed: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values [N, Hkv, L, D] of the last forward, by the number of their layer among those that attend."""
        self.attending: int | None = None
        """The one whose keys and values came last."""
        self._numbers: dict[int, int] = {}
        for (layer, kind, number), state in (states or {}).items():
            self.layers[layer].hold(kind, number, state)

    @property
    def states(self) -> dict[Name, Tensor]:
        """Those that the module has left here."""
        return {
            (place, kind, number): state
            for place, layer in enumerate(self.layers)
            if isinstance(layer, HeldLayer)
            for kind in KINDS
            for number, state in getattr(layer, kind).items()
            if state is not None
        }

    @contextmanager
    def lent(self, places: list[tuple[Any, str]]) -> Iterator[None]:
        """With states in ``kept_in_modules``: what is there afterwards is what they have become."""
        held = list(self.states.values())
        for number, (part, name) in enumerate(places):
            setattr(part, name, held[number] if held else None)
        yield
        for number, (part, name) in enumerate(places):
            self.keep(number, getattr(part, name))
            setattr(part, name, None)

    def keep(self, number: int, state: Tensor) -> None:
        """What has become of one of the states that are not kept in transformers' cache: where it is, it changes."""
        layer = self.layers[0]
        assert isinstance(layer, HeldLayer)
        if (held := layer.recurrent_states.get(number)) is None:
            layer.hold("recurrent_states", number, state)
        else:
            held.copy_(state)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as they are."""
        self.attending = self._numbers.setdefault(layer_idx, len(self._numbers))
        self.passed[self.attending] = key_states, value_states
        return key_states, value_states

    def __setattr__(self, name: str, value: Any) -> None:
        # RecurrentGemma puts functions of its own in their places (transformers before 5.19), for a cache that keeps.
        if name not in ("get_seq_length", "get_mask_sizes"):
            super().__setattr__(name, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of keys and values: the module is told its positions, and a layout has the earlier ones."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class HeldLayer(LinearAttentionLayer):
    """A layer's states as transformers keeps them."""

    def hold(self, kind: str, number: int, state: Tensor) -> None:
        """Makes a state what the next token finds."""
        getattr(self, kind)[number] = state
        getattr(self, f"is_{kind}_initialized")[number] = True
        self.has_previous_state[number] = True
        if kind == "conv_states":
            self.dtype, self.device = state.dtype, state.device
            self.conv_kernel_size[number] = state.shape[-1]


class _Asked(Held):
    """Writes down which parts of a module ask for a state, ``running`` being those whose forward runs, outer first."""

    def __init__(self, kept: list[int], running: list[Any]) -> None:
        super().__init__(kept)
        self.running = running
        self.parts: list[Any] = []

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._note()
        return super().update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._note()
        return super().update_recurrent_state(recurrent_states, *args, **kwargs)

    def _note(self) -> None:
        if self.running[-1] not in self.parts:
            self.parts.append(self.running[-1])


class Mixers:
    """The parts of a module that carry a state from token to token, found by what asks its cache for one, or keeps one.

    Sequences that lie packed in all else begin without a state in these parts: they are told of ``Segments``, or the
    sequences are put side by side for them.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self.arguments = [argument_of_segments(part) for part in parts]
        """By which name a part takes segments; empty where it takes rows alone."""

    @property
    def packed(self) -> bool:
        """Whether all of them take segments."""
        return all(self.arguments)

    def take_rows(self) -> None:
        """None of them is told of segments from now on."""
        self.arguments = [""] * len(self.parts)

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> Mixers | None:
        """None where no part keeps a state, or the module takes a cache of its own only."""
        kept = states_of_layers(module)
        if not kept:
            return None
        if takes_list(module):
            taking = [part for part in module.modules() if takes_list(part)]
            return cls([part for part in taking if not any(x in taking for x in _inside(part))])
        if keeping := [part for part, _ in kept_in_modules(module)]:
            return cls([part for part in dict.fromkeys(keeping) if not any(part in _inside(x) for x in keeping)])
        running: list[Any] = []
        asked = _Asked(kept, running)

        def ends(*_: Any) -> None:
            running.pop()

        hooks: list[Any] = []
        for part in module.modules():
            hooks.append(part.register_forward_pre_hook(lambda part, _: running.append(part)))
            hooks.append(part.register_forward_hook(ends))
        ids = torch.full((1, 2), 2, device=module.get_input_embeddings().weight.device)
        base = module.base_model
        try:
            base(input_ids=ids, use_cache=True, **{cache_argument(base): asked})
        except ValueError:
            return None  # It takes a cache of its own only (MiniMax-01).
        finally:
            for hook in hooks:
                hook.remove()
        return cls(asked.parts) if asked.parts else None

    @contextmanager
    def apart(self, layout: PackedLayout | None, told: Told | None = None) -> Iterator[None]:
        """Segments of the packed tokens go through these parts by themselves.

        As ``layout`` puts them side by side; those that take segments are ``told`` where they are.
        """
        for part, name in zip(self.parts, self.arguments, strict=True):
            if name and told is not None:
                part.forward = partial(_with_segments, part.forward, told, name)
            else:
                part.forward = partial(_side_by_side, part.forward, layout)
        try:
            yield
        finally:
            for part in self.parts:
                del part.forward


@dataclass(frozen=True)
class Told:
    """What parts are told that take segments: where these are, before any of their tokens are shared."""

    segments: Segments
    sharing: Sharing | None


def _inside(module: Any) -> list[Any]:
    return [part for part in module.modules() if part is not module]


def _with_segments(
    run: Callable[..., Any], told: Told, name: str, /, hidden_states: Tensor, *others: Any, **options: Any
) -> Any:
    """[1, U, D] → [1, U, D], the T tokens of all segments at once. Zeros for what stands behind the U."""
    options = _of_tokens(others, options)
    options.pop("position_ids", None)
    sharing = told.sharing
    x_1TD = hidden_states[:, : told.segments.tokens] if sharing is None else sharing.expand(hidden_states[0])[None]
    found, more = _alone(run(x_1TD, **options | {name: told.segments}))
    found = found if sharing is None else found.index_select(1, sharing.kept_U)
    packed = F.pad(found, (0, 0, 0, hidden_states.shape[1] - found.shape[1]))
    return (packed, *more) if more else packed


def _side_by_side(
    run: Callable[..., Any], beside: PackedLayout | None, /, hidden_states: Tensor, *others: Any, **options: Any
) -> Any:
    """[1, U, D] → [1, U, D]."""
    assert beside is not None
    options = _of_tokens(others, options)
    more: list[Any] = []

    def tokens_of(rows: Tensor) -> Tensor:
        if "position_ids" in options:
            options["position_ids"] = torch.arange(rows.shape[1], device=rows.device)[None]
        found, more[:] = _alone(run(rows, **options))
        return found

    packed = beside.side_by_side(tokens_of, hidden_states)
    return (packed, *more) if more else packed


def _of_tokens(others: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a part without those that say how packed tokens attend to each other."""
    if others:
        raise UnsupportedAttention("arguments without a name for layers with a state")
    masked = {"attention_mask": None} if "attention_mask" in options else {}
    return {name: value for name, value in options.items() if name != "layout"} | masked


def _alone(found: Any) -> tuple[Tensor, list[Any]]:
    """What becomes of the tokens, and the Nones that a part gives beside it."""
    tokens, *more = found if isinstance(found, tuple) else (found,)
    if not isinstance(tokens, Tensor) or any(x is not None for x in more):
        raise UnsupportedAttention("layers with a state that give more than what becomes of their tokens")
    return tokens, more
