"""Attention: what its queries, keys and values are made of, and what becomes of what it gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tandem.engines.live.layers import Attention, Latent, Product, Unlike, queries_and_gates
from tandem.engines.live.reading.calls import Attended, Call, product_of
from tandem.engines.live.reading.comparing import near, nearest, read_norm, same
from tandem.engines.live.reading.watch import Watch
from tandem.engines.live.stacked import is_linear
from tandem.kernels import layers as kernels
from tandem.kernels.layers import Norm, Rotation

Pair = tuple[Norm, Norm]
"""A query's and a key's."""


def read_attention(watch: Watch, whole: Call, attended: Attended) -> Attention | Latent:
    """``whole``: the part that asked for it."""
    parts = watch.parts(whole)
    place = parts.index(attended)
    before = [x for x in parts[:place] if isinstance(x, Call)]
    after = [x for x in parts[place + 1 :] if isinstance(x, Call) and not same(x.input, x.output)]
    projections = [call for call in before if is_linear(call.module)]
    inner = [call for call in projections if not same(call.input, whole.input)]
    if inner and len(projections) - len(inner) == 2:
        return _read_latent(watch, before, after, attended, projections, inner)
    if not projections or not all(same(call.input, whole.input) for call in projections):
        raise Unlike("its queries, keys and values are not a product of its input each")
    tokens = len(watch.position_T)
    query, key, value = (x[0].transpose(0, 1) for x in (attended.query, attended.key, attended.value))
    if watch.query_scale_P is not None:
        query = query / watch.query_scale_P[watch.position_T, None, None].to(query.dtype)
    key_scale = getattr(watch.base.config.get_text_config(), "key_multiplier", None) or 1.0
    alike = (x for x in watch.attended if same(x.key, attended.key) and same(x.value, attended.value))
    shares = None if (first := next(alike)) is attended else first.ask.layer
    heads, size, kv_heads = query.shape[1], query.shape[2], key.shape[1] if shares is None else 0
    if value.shape != key.shape or size % 2:
        raise Unlike(f"its heads have {size} dimensions, and its values {value.shape[-1]}")
    out = torch.cat([call.output.reshape(tokens, -1) for call in projections], dim=-1)
    width = out.shape[1] // size
    tied = shares is None and width == heads + kv_heads
    gated = shares is None and width == 2 * (heads + kv_heads)
    if out.shape[1] % size or not (gated or tied or width == heads + 2 * kv_heads):
        raise Unlike("its queries, keys and values are not a product of its input each")
    normed = {call: norm for call in before if call not in projections and (norm := read_norm(call))}
    value_norm: Norm | None = None
    for call in [call for call in normed if shares is None and _storage(call.output) == _storage(attended.value)]:
        if call.input.shape[-1] != size:
            raise Unlike("its values are not normed one by one")
        value_norm, value = normed.pop(call), call.input.reshape(tokens, kv_heads, size)
    wide, by_size = _norms_of_heads(list(normed.values()), heads, kv_heads, size)
    late = by_size is not None and _are_late(list(normed), projections, attended)
    if by_size and watch.query_scale_P is not None:
        raise Unlike("its queries are normed and then scaled by their position")
    attended_THD = attended.out[0]
    if gated:
        attended_THD = attended_THD * queries_and_gates(out, heads, size)[1].sigmoid()
    if key_scale != 1.0 and (normed or tied or shares is not None):
        raise Unlike("its keys are multiplied by a number, and more is done to them")
    read = Attention(
        ask=attended.ask, heads=heads, kv_heads=kv_heads, size=size, shares=shares, tied=tied,
        qkv=product_of(*projections),
        by_head=kv_heads > 0 and not gated and not near(out[:, -kv_heads * size :], value.flatten(1)),
        gated=gated,
        wide_norms=wide,
        rotation=Rotation(out[:, :0], out[:, :0]),
        late_norms=by_size if late else None,
        query_scale_P=None if watch.query_scale_P is None else watch.query_scale_P.to(query.dtype),
        key_scale=key_scale,
        value_norm=value_norm,
        output=_read_output(watch, after, attended_THD),
    )  # fmt: skip
    parts_THD = read.parts(out.clone())
    if shares is None and not near(parts_THD[2].flatten(1), value.flatten(1)):
        raise Unlike("its values are not a product of its input")
    if late:
        query, key = (call.input[0].transpose(0, 1) for call in normed)
    turned = torch.cat((query, key / key_scale), dim=1) if shares is None else query
    rotation = _read_rotation(watch, torch.cat(parts_THD, dim=1), turned, None if late else by_size)
    return replace(read, rotation=rotation)


def _norms_of_heads(norms: list[Norm], heads: int, kv_heads: int, size: int) -> tuple[Pair | None, Pair | None]:
    """A query's and a key's: over all heads, and of each head; one of both is None, or both where it has none."""
    if len(norms) not in (0, 2 if kv_heads else 1):
        raise Unlike("it has norms in its attention that are not a query's and a key's")
    sizes = {norm.weight.shape for norm in norms if norm.weight is not None and norm.bias is None}
    kinds = {(norm.eps, norm.offset, norm.centered, norm.wide) for norm in norms}
    pair = (norms[0], norms[-1]) if norms else None
    if pair and sizes == {(heads * size,), (kv_heads * size,)}:
        return pair, None
    if pair and (sizes != {(size,)} or len(kinds) > 1 or norms[0].centered):
        raise Unlike("its query and key norms are neither one a head nor one over all heads")
    return None, pair


def _are_late(normed: list[Call], projections: list[Call], attended: Attended) -> bool:
    """Whether queries and keys are normed once they are turned.

    Where a layer turns nothing, what is projected is normed and attended to.
    """
    if {_storage(call.input) for call in normed} & {_storage(call.output) for call in projections}:
        return False
    if [call.output.data_ptr() for call in normed] != [x.data_ptr() for x in (attended.query, attended.key)]:
        raise Unlike("its queries and keys are normed between other things")
    return True


def _read_latent(
    watch: Watch, before: list[Call], after: list[Call], attended: Attended, starts: list[Call], ends: list[Call]
) -> Latent:
    """``starts``: the products of what goes in; ``ends``: those of what comes of them, normed."""
    if watch.mixers.parts:
        raise Unlike("its cache may keep what its keys and values come from")
    norms = {call: norm for call in before if call not in (*starts, *ends) and (norm := read_norm(call))}
    from_whole: list[tuple[Call, Call, Call]] = []
    from_part: list[tuple[Call, Call, Call]] = []
    for end in ends:
        state = next((call for call in norms if same(call.output, end.input)), None)
        start = next((call for call in starts if state and state.input.data_ptr() == call.output.data_ptr()), None)
        if state and start:
            (from_whole if same(state.input, start.output) else from_part).append((start, state, end))
    if len(from_part) != 1 or not len(from_part + from_whole) == len(ends) == len(norms):
        raise Unlike("its queries, keys and values come from states of another kind")
    ((start, state, end),) = from_part
    first = next(call for call in starts if call is not start)
    last = from_whole[0][2] if from_whole else first
    query, key, value = (x[0].transpose(0, 1) for x in (attended.query, attended.key, attended.value))
    read = Latent(
        ask=attended.ask, heads=query.shape[1], shared=start.output.shape[-1] - state.input.shape[-1],
        narrow=product_of(first, start),
        query=(norms[from_whole[0][1]], product_of(last)) if from_whole else None,
        key_value=(norms[state], product_of(end)),
        rotation=Rotation(query[:, 0, :0], query[:, 0, :0]),
        query_scale_P=None if watch.query_scale_P is None else watch.query_scale_P.to(query.dtype),
        output=_read_output(watch, after, attended.out[0]),
    )  # fmt: skip
    size, own = query.shape[2], query.shape[2] - read.shared
    widths = last.output.shape[-1], end.output.shape[-1]
    if key.shape != query.shape or widths != (read.heads * size, read.heads * (own + value.shape[2])):
        raise Unlike("its queries, keys and values come from states of another kind")
    scale_P = None if read.query_scale_P is None else read.query_scale_P[watch.position_T]
    place_T = torch.arange(len(query), device=query.device)
    found = {}
    for name, some in watch.rotations.some(read.shared):
        mine = replace(read, rotation=some, query_scale_P=scale_P).parts(starts[0].input.flatten(0, 1), place_T)
        # In whatever order a head's dimensions are.
        found[name] = torch.cat((mine[0].transpose(0, 1) @ mine[1].permute(1, 2, 0), mine[2].transpose(0, 1)), dim=2)
    truth = torch.cat((query.transpose(0, 1) @ key.permute(1, 2, 0), value.transpose(0, 1)), dim=2)
    name = nearest(found, truth, "its queries and keys are turned in another way")
    return replace(read, rotation=watch.rotations.of(name, None))


def _read_output(watch: Watch, after: list[Call], attended_THD: Tensor) -> Product:
    outputs = [call for call in after if is_linear(call.module)]
    if len(outputs) != 1 or not near(outputs[0].input.flatten(0, 1), attended_THD.flatten(1)):
        raise Unlike("what attention gives does not go through one product")
    return product_of(outputs[0])


def _read_rotation(watch: Watch, qkv_THD: Tensor, turned_THD: Tensor, norms: Pair | None) -> Rotation:
    """The rotation that makes of queries and keys what attention was given."""
    count, size = turned_THD.shape[1], turned_THD.shape[2]
    heads = count - (qkv_THD.shape[1] - count)
    found: dict[tuple[int, bool], Tensor] = {}
    for name, some in watch.rotations.some(size):
        mine = qkv_THD.clone()
        place_T = torch.arange(len(mine), device=mine.device)
        kernels.rotate_(mine, place_T, replace(some, norms=norms), heads, count - heads)
        found[name] = mine[:, :count].flatten(1)
    name = nearest(found, turned_THD.flatten(1), "its queries and keys are turned in another way")
    return watch.rotations.of(name, norms)


def _storage(x: Tensor) -> int:
    """The memory that it is a view of."""
    return x.untyped_storage().data_ptr()
