"""What layers are given of a token beside what goes through them, and the part that takes it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from tandem.engines.live.layers import Given, Injection, Unlike
from tandem.engines.live.reading.calls import Call, product_of
from tandem.engines.live.reading.comparing import near, read_curve, read_norm, same, times
from tandem.engines.live.reading.watch import Watch
from tandem.engines.live.stacked import is_linear


def read_injection(watch: Watch, whole: Call, others: list[Call]) -> Injection | None:
    """That of a layer whose own two products have a curve between them, and what it is given beside."""
    linears = [call for call in others if is_linear(call.module)]
    bends = [call for call in others if linears and same(call.input, linears[0].output)]
    if len(linears) != 2 or len(bends) != 1:
        return None
    (gate, up), (bend,) = linears, bends
    curve, bent = read_curve(bend), bend.output
    given = [
        x for x in (*whole.args, *whole.kwargs)
        if isinstance(x, Tensor) and x.shape == bent.shape and near(bent * x, up.input)
    ]  # fmt: skip
    if not given or curve is None or others[others.index(gate) :] != [gate, bend, up]:
        return None
    watch.given.append(given[0].flatten(0, 1))
    return Injection(
        place=len(watch.given) - 1, curve=curve, after=None,
        gate=product_of(gate), up=product_of(up),
    )  # fmt: skip


def read_given(watch: Watch, embedded: Tensor) -> Given:
    """What makes what the layers were given, of what the embedding gives."""
    given = torch.stack(watch.given, dim=1)
    tokens, layers, size = given.shape
    products = [call for call in watch.outside if is_linear(call.module) and same(call.input, embedded)]
    norms = [(call, norm) for call in watch.outside if call.input.shape[-1] == size and (norm := read_norm(call))]
    tables = [call for call in watch.outside if not call.input.is_floating_point()]
    for product, (normed, norm), own in itertools.product(products, norms, tables):
        # Not what came out: it may have been changed since (Gemma 3n).
        inner = times(product.module(product.input), normed.input)
        if not inner or own.output.numel() != normed.output.numel():
            continue
        both = (normed.output.flatten() + own.output.flatten()).view(tokens, -1, size)
        if scale := times(both[:, :layers], given):
            return Given(
                embedding=own.module,
                projection=product_of(product),
                # Of what is not multiplied before it.
                norm=replace(norm, eps=norm.eps / inner**2),
                scale=scale,
                size=size,
            )
    raise Unlike("what its layers are given is not made of an embedding and a product")
