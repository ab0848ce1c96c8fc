"""One attention function, registered with transformers, through which packed training and the live engine run.

A model loaded by Tandem has the attention implementation ``tandem``. Called as usual it is transformers' own SDPA.
Called with a ``layout=`` keyword (which transformers hands down to every attention layer), the layout computes the
attention instead: one of those below for packed sequences, the live engine's own for its slot cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tandem.batch import send
from tandem.models.sharing import Sharing

IMPLEMENTATION = "tandem"
_OF_NO_EFFECT = frozenset(
    {
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
    }
)
"""Keywords that change nothing of what attention computes here; a layout refuses every other that it does not know."""

SCORES = 1 << 26
"""Most scores that exist at a time where attention is computed score by score."""


class UnsupportedAttention(Exception):
    """The model's attention asks for something a layout does not compute (position biases)."""


class Ask(NamedTuple):
    """What a layer asks of its attention."""

    layer: int | None
    """Its number; None where it does not say."""
    scaling: float | None
    """Of the scores; None: one over the root of a head's size."""
    sliding_window: int | None
    """How many tokens a token sees, itself included; None: all before it."""
    softcap: float | None = None
    """Scores are bent to ``cap * tanh(score / cap)`` (Gemma 2)."""
    sinks: Tensor | None = None
    """[H]: for each head a score that takes its part of the softmax and gives nothing (gpt-oss, arXiv:2309.17453)."""

    @property
    def plain(self) -> bool:
        """Whether it is what kernels for attention compute: a softmax of scaled scores."""
        return self.softcap is None and self.sinks is None


def numbered(ask: Ask) -> int:
    """The layer's number. Raises UnsupportedAttention where it does not say."""
    if ask.layer is None:
        raise UnsupportedAttention("attention layers without a layer_idx")
    return ask.layer


class Layout(Protocol):
    """How the tokens of one forward lie in memory and what each may attend to."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [B, H, Q, D], key and value [B, Hkv, K, D] → [B, Q, H, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None and attention_mask is not None and attention_mask is no_mask(attention_mask.device):
        raise UnsupportedAttention("the module does not hand the layout on to it")
    if layout is None and (softcap is not None or s_aux is not None):
        # transformers' SDPA would leave them out.
        if kwargs.get("position_bias") is not None or dropout:
            raise UnsupportedAttention("position_bias or attention dropout beside a soft cap or sinks")
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        mask = attention_mask
        if mask is None and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        out = scored_attention(query, key, value, mask, Ask(None, scaling, None, softcap, s_aux))
        return out.transpose(1, 2), None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    unsupported = [name for name, value in kwargs.items() if value is not None and name not in _OF_NO_EFFECT]
    if unsupported or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedAttention(", ".join(unsupported) or "attention that is not causal")
    if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
        raise UnsupportedAttention("a mask of its own")
    if dropout:
        raise UnsupportedAttention("attention dropout")
    # A compiled layer that reads its own number is a graph of its own: it is read only for those who want it.
    layer = None if getattr(layout, "one_graph", False) else getattr(module, "layer_idx", None)
    return layout.attend(query, key, value, Ask(layer, scaling, sliding_window, softcap, s_aux)), None


@cache
def no_mask(device: torch.device) -> Tensor:
    """The ``attention_mask`` beside a layout: transformers takes any 4-D mask as it is and builds none of its own.

    There is one on each device: models that choose the keys of a token add it to what they choose by.
    """
    return torch.zeros(1, 1, 1, 1, device=device)


@torch.no_grad()
def leave_sdpa(module: Any) -> None:
    """Gives a module whose attention transformers' SDPA would compute wrongly, without a word, its eager attention.

    SDPA leaves out soft caps and sinks. Another attention, and a module that has none to choose, stay as they are.
    """
    own = module.config._attn_implementation
    if own != "sdpa" or not module._supports_attention_backend:
        return
    device = module.get_input_embeddings().weight.device
    asked = _Asked(torch.tensor([0, 2]), device)
    module.set_attn_implementation(IMPLEMENTATION)
    try:
        ids, position = torch.full((1, 2), 2, device=device), torch.arange(2, device=device)[None]
        module.base_model(
            input_ids=ids, position_ids=position, attention_mask=no_mask(device), use_cache=False, layout=asked
        )
    except (UnsupportedAttention, TypeError):
        pass  # What a layout does not compute is found out by whoever wants one.
    module.set_attn_implementation(own if asked.plain else "eager")


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, K, D] → [B, heads, K, D]: each key-value head once for every query head that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def scored_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ask: Ask) -> Tensor:
    """What ``ask`` asks, score by score: query [B, H, Q, D], key and value [B, H, K, D] → [B, H, Q, D].

    ``mask`` is true where a query sees a key (bool), or is added to the scores; it says what the window is. Sinks may
    be [H, Q]: one a query. Softmax is in float32, or float64 where the queries are. No more than ``SCORES`` exist at a
    time: where gradients are enabled they are made again in the backward pass.
    """
    step = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    with_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    parts = []
    for start in range(0, query.shape[2], step):
        part = query[:, :, start : start + step]
        seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., start : start + step, :]
        own = ask
        if ask.sinks is not None and ask.sinks.ndim == 2:
            own = ask._replace(sinks=ask.sinks[:, start : start + step])
        if with_gradient:
            parts.append(checkpoint(_scored, part, key, value, seen, own, use_reentrant=False))
        else:
            parts.append(_scored(part, key, value, seen, own))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scored(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ask: Ask) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if ask.scaling is None else ask.scaling
    score = torch.matmul(query.to(wide) * scaling, key.to(wide).transpose(2, 3))
    if ask.softcap is not None:
        score = ask.softcap * torch.tanh(score / ask.softcap)
    if mask is not None and mask.dtype == torch.bool:
        # Not infinity: a query that is padding may see nothing, and NaN would go on from it.
        score = score.masked_fill(~mask, torch.finfo(wide).min)
    elif mask is not None:
        score = score + mask
    if ask.sinks is not None:
        sink = ask.sinks.to(wide).view(score.shape[1], -1)[..., None].expand(len(score), -1, score.shape[2], 1)
        score = torch.cat((score, sink), dim=-1)
    weight = torch.softmax(score, dim=-1)[..., : key.shape[2]]
    return torch.matmul(weight, value.to(wide)).to(query.dtype)


class PackedLayout:
    """Causal attention inside each segment of a packed [1, H, U, D] forward.

    Segments of similar length are padded side by side just for the attention, [n, H, L, D]; everything else in the
    model runs without padding. ``bounds`` is int64 [S + 1] on the CPU, over all T tokens; without ``sharing`` U is T,
    with it queries are a segment's own tokens, and keys those of the whole segment. ``spare`` more tokens may stand
    behind the U: they belong to no segment, and what they get means nothing.

    Gradients are the same bits every time, on any device: what several tokens share is added up by
    ``Sharing.expand``, and of the places that an index names twice all but one belong to padding, whose gradient is 0.
    """

    compiled = False
    """Whether compiled layers are to be used with it (``tandem.models.compiled``)."""

    def __init__(
        self, bounds: Tensor, device: torch.device | str, sharing: Sharing | None = None, *, spare: int = 0
    ) -> None:
        own_bounds = bounds if sharing is None else sharing.own_bounds
        self.groups: list[_Group] = []
        inverse = torch.zeros(int(own_bounds[-1]) + spare, dtype=torch.int64)
        offset = 0
        for group in self._all_groups(bounds, own_bounds):
            index, real = _padded(own_bounds, group)
            inverse[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
            offset += index.numel()
            keys = index if sharing is None else _padded(bounds, group)[0]
            dropped_S = None if sharing is None else sharing.dropped_S[group]
            self.groups.append(_Group.of(index, keys, dropped_S).to(device))
        self.sharing = sharing
        self.inverse = send(inverse, device)

    def _all_groups(self, bounds: Tensor, own_bounds: Tensor) -> Iterator[list[int]]:
        """Segments that go through whole apart from those that drop a prefix, which are alike in keys and queries."""
        sizes, own = bounds.diff().tolist(), own_bounds.diff().tolist()
        yield from self._grouped([s for s, size in enumerate(sizes) if own[s] == size], sizes)
        for group in self._grouped([s for s, size in enumerate(sizes) if own[s] < size], own):
            yield from self._grouped(group, sizes)

    def _grouped(self, segments: list[int], sizes: list[int]) -> list[list[int]]:
        """Segments of similar size, each group in ascending order of it."""
        groups: list[list[int]] = []
        for segment in sorted(segments, key=sizes.__getitem__):
            # A group's padding is at most a third of it, plus a little where sequences are short.
            if groups and sizes[segment] <= 1.5 * sizes[groups[-1][0]] + 16:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        return groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [1, H, U, D], key and value [1, Hkv, U, D] → [1, U, H, D]."""
        heads = query.shape[1]
        query_U, key_T, value_T = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.sharing is not None:
            key_T, value_T = self.sharing.expand(key_T), self.sharing.expand(value_T)
        parts = []
        for group in self.groups:
            q, k, v = (
                _rows(x, index).transpose(1, 2)
                for x, index in ((query_U, group.queries), (key_T, group.keys), (value_T, group.keys))
            )
            k, v = repeat_heads(k, heads), repeat_heads(v, heads)
            mask = group.causal
            if ask.sliding_window is not None and ask.sliding_window < len(group.column):
                distance = group.position[..., None] - group.column
                mask = (distance >= 0) & (distance < ask.sliding_window)
            if ask.plain:
                # Without a mask: padding is on the right, where a causal mask already hides it.
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=ask.scaling)
            else:
                mask = group.position[..., None] >= group.column if mask is None else mask
                out = scored_attention(q, k, v, mask, ask)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return self._packed(parts)

    def side_by_side(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """[1, U, D] → [1, U, D]: what ``run`` makes of whole segments, [n, K, D] each, padded on the right."""
        x_T = x[0] if self.sharing is None else self.sharing.expand(x[0])
        parts = []
        for group in self.groups:
            out = run(_rows(x_T, group.keys))
            if group.position.ndim > 1:
                index = group.position[:, 0, :, None].clamp(max=out.shape[1] - 1)
                out = out.gather(1, index.expand(-1, -1, out.shape[-1]))
            parts.append(out.flatten(0, 1))
        return self._packed(parts)

    def _packed(self, parts: list[Tensor]) -> Tensor:
        """What the groups' queries are given, [n Q, ...] each, in the order of the packed tokens."""
        packed_U = parts[0] if len(parts) == 1 else torch.cat(parts)
        return packed_U.index_select(0, self.inverse)[None]


class _Asked(PackedLayout):
    """Writes down whether all layers ask for what kernels compute."""

    plain = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        self.plain = self.plain and ask.plain
        return super().attend(query, key, value, ask)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for an index [n, L]. The gradient of brackets is added up in the order in which threads come."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Segments side by side: Q queries and K keys of each, padded on the right."""

    queries: Tensor
    """[n, Q]: which of the U tokens"""
    keys: Tensor
    """[n, K]: which of the T tokens"""
    position: Tensor
    """Of the queries in their segments: [Q], or [n, 1, Q] where they differ."""
    column: Tensor
    """[K]: positions of the keys."""
    causal: Tensor | None = None
    """bool [n, 1, Q, K]; None: query i sees keys 0 to i."""

    @staticmethod
    def of(queries: Tensor, keys: Tensor, dropped_n: Tensor | None) -> _Group:
        """``dropped_n``: leading tokens that are keys only; nothing is dropped where it is None or 0."""
        column = torch.arange(keys.shape[1])
        if dropped_n is None or not dropped_n.any():
            return _Group(queries=queries, keys=keys, position=column, column=column)
        position = dropped_n[:, None, None] + torch.arange(queries.shape[1])
        causal = position[..., None] >= column
        return _Group(queries=queries, keys=keys, position=position, column=column, causal=causal)

    def to(self, device: torch.device | str) -> _Group:
        queries, column = send(self.queries, device), send(self.column, device)
        return _Group(
            queries=queries,
            keys=queries if self.keys is self.queries else send(self.keys, device),
            position=column if self.position is self.column else send(self.position, device),
            column=column,
            causal=None if self.causal is None else send(self.causal, device),
        )


def _padded(bounds: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens [n, L] of the segments, padded on the right with their first ones, and which are real."""
    start, length = bounds[:-1][segments][:, None], bounds.diff()[segments][:, None]
    column = torch.arange(int(length.max()))
    real = column < length
    return torch.where(real, start + column, start), real


class OneShapeLayout(PackedLayout):
    """``PackedLayout`` with segments padded to the longest: one shape, so one graph for a compiled layer.

    With a shared prefix it is two shapes: of those that go through whole, and of those that drop it.
    """

    one_graph = True
    """Whether layers may run as one compiled graph: it treats them all alike, so none needs its number."""

    def _grouped(self, segments: list[int], sizes: list[int]) -> list[list[int]]:
        return [sorted(segments, key=sizes.__getitem__)] if segments else []


class FlashLayout:
    """Causal attention inside each segment of a packed forward on a GPU, by torch's variable-length flash kernel.

    Nothing is padded, and key-value heads are shared without repeating them. ``bounds`` is int64 [S + 1] on the CPU,
    over all T tokens; without ``sharing`` U is T, with it queries are a segment's own tokens, and keys those of the
    whole segment.
    """

    one_graph = True
    compiled = False

    def __init__(self, bounds: Tensor, device: torch.device | str, sharing: Sharing | None = None) -> None:
        self.host_bounds = bounds
        self.device = device
        self.sharing = sharing
        self.bounds = send(bounds.int(), device)
        self.own_bounds = self.bounds if sharing is None else send(sharing.own_bounds.int(), device)
        self.longest = int(bounds.diff().max())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        """Query [1, H, U, D], key and value [1, Hkv, U, D] → [1, U, H, D], in bfloat16 or float16."""
        size = query.shape[-1]
        odd = size % 8 or size > 256 or value.shape[-1] != size or value.dtype == torch.float32
        if odd or ask.softcap is not None:
            # What the kernel does not take. Padded instead: slower, the same numbers.
            return self._padded.attend(query, key, value, ask)
        # Where rotation is in float32, queries and keys come wider than values; the kernel wants one type.
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        if self.sharing is not None:
            k, v = self.sharing.expand(k), self.sharing.expand(v)
        window = {}
        if ask.sliding_window is not None:
            window = {"window_size_left": ask.sliding_window - 1, "window_size_right": 0}
        # Where a segment has fewer queries than keys, the kernel takes them for its last tokens: they are.
        arguments = (self.own_bounds, self.bounds, self.longest, self.longest, 0.0, True)
        options = {"scale": ask.scaling, **window}
        if ask.sinks is None:
            out_UHD = torch.ops.aten._flash_attention_forward(q, k, v, *arguments, False, **options)[0]
        else:
            out_UHD = FlashWithSinks.apply(q, k, v, ask.sinks, arguments, options)
        return out_UHD[None].to(query.dtype)

    @cached_property
    def _padded(self) -> PackedLayout:
        return PackedLayout(self.host_bounds, self.device, self.sharing)


class FlashWithSinks(torch.autograd.Function):
    """The flash kernel's attention with one more score a head in each softmax, whose value is 0.

    With the log of the softmax's sum ``l`` and a sink ``s``, weights are those of the kernel times
    ``exp(l - l')``, ``l' = log(exp(l) + exp(s))``. The kernel's backward computes them from the log of the sum that it
    is given, so ``l'`` makes its gradients right. A sink's own is ``-sum_t exp(s - l'_t) (dO_t · O_t)``.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        out_UHD, log_HU, *random, _ = torch.ops.aten._flash_attention_forward(q, k, v, *arguments, False, **options)
        total_HU = torch.logaddexp(log_HU, sink_H.to(log_HU.dtype)[:, None])
        out_UHD = (out_UHD * (log_HU - total_HU).exp().T[..., None]).to(out_UHD.dtype)
        ctx.arguments, ctx.options = arguments, options
        ctx.save_for_backward(q, k, v, out_UHD, total_HU, sink_H, *random)
        return out_UHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UHD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_UHD, total_HU, sink_H, *random = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            grad_UHD.contiguous(), q, k, v, out_UHD, total_HU, *ctx.arguments, *random, **ctx.options
        )
        weight_HU = (sink_H.to(total_HU.dtype)[:, None] - total_HU).exp()
        grad_sink_H = -(weight_HU * (grad_UHD.float() * out_UHD.float()).sum(-1).T).sum(-1)
        return (*found, grad_sink_H.to(sink_H.dtype), None, None)


def packed_layout(
    bounds: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    sharing: Sharing | None = None,
    spare: int = 0,
) -> PackedLayout | FlashLayout:
    """The fastest layout for packed sequences computed in ``dtype`` there, or the fastest that suits compiled layers.

    ``bounds`` is int64 [S + 1] on the CPU; nobody waits for the device. ``spare`` is for a CPU's layouts.
    """
    layout: PackedLayout | FlashLayout
    if device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0):
        layout = FlashLayout(bounds, device, sharing)
    else:
        layout = (OneShapeLayout if compiled else PackedLayout)(bounds, device, sharing, spare=spare)
    layout.compiled = compiled
    return layout
