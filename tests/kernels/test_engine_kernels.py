"""Triton kernels of the live engine against the plain torch beside them: on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tandem.engines.live.draws import Wanted, param_columns, stream, waiting
from tandem.engines.live.draws import draw as plain_draw
from tandem.kernels import (
    bits,
    bits_triton,
    draw,
    draw_triton,
    latent_triton,
    layers,
    layers_triton,
    pages,
    pages_triton,
    quantized_triton,
    states,
    states_triton,
)
from tandem.types import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter rounds bfloat16 towards zero, and multiplies matrices of float16 at the lowest.
LOW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _plain_torch_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatching functions give the plain torch version here, on a GPU too."""
    for module in (layers, pages, draw, states):
        monkeypatch.setattr(module, "on_triton", lambda _: False)
    monkeypatch.setattr("tandem.engines.live.draws.on_triton", lambda _: False)
    torch.manual_seed(0)


def close(found: torch.Tensor, truth: torch.Tensor, factor: float = 1.0) -> None:
    tolerance = factor * TOLERANCE.get(truth.dtype, 1e-5)
    torch.testing.assert_close(found, truth, atol=tolerance, rtol=tolerance)


KINDS = {
    "RMS": lambda weight, bias: layers.Norm(weight, eps=1e-6),
    "offset": lambda weight, bias: layers.Norm(weight, eps=1e-6, offset=True, wide=True),
    "wide": lambda weight, bias: layers.Norm(weight, eps=1e-3, wide=True),
    "layer": lambda weight, bias: layers.Norm(weight, bias, eps=1e-5, centered=True, wide=True),
    "bare": lambda weight, bias: layers.Norm(None, eps=1e-5, centered=True),
}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 48), (LOW, 896)])
@pytest.mark.parametrize("kind", KINDS)
def test_norms(dtype: torch.dtype, size: int, kind: str) -> None:
    x, residual = torch.randn(2, 5, size, device=DEVICE).to(dtype)
    by, other = (KINDS[kind](*torch.randn(2, size, device=DEVICE).to(dtype)) for _ in range(2))
    close(layers_triton.add_norm(x, None, by)[0], layers.norm(x, by), 4)
    factor = torch.tensor([0.7], device=DEVICE, dtype=dtype)
    for norm, first, scale, number in (
        (by, None, 1.0, None), (by, other, 1.0, factor), (None, by, 0.3, None), (None, None, 1.0, factor),
    ):  # fmt: skip
        found = layers_triton.add_norm(x, residual, norm, first=first, scale=scale, factor_1=number)
        truth = layers.add_norm(x, residual, norm, first=first, scale=scale, factor_1=number)
        close(found[0], truth[0], 8)
        close(found[1], truth[1], 4)
    # A residual of more bits.
    residual = residual.float()
    for norm in (by, replace(by, rounds=True)):
        found, truth = (each.add_norm(x, residual, norm) for each in (layers_triton, layers))
        close(found[0], truth[0], 8)
        assert torch.equal(found[1], residual + x)
        assert torch.equal(truth[1], residual + x)
    residual = residual.to(dtype)
    # Rows that lie apart, in place.
    wide = torch.cat((x, residual), dim=1)
    layers_triton.add_norm(wide[:, :size], None, by, out_TD=wide[:, :size])
    close(wide[:, :size], layers.norm(x, by), 4)
    assert torch.equal(wide[:, size:], residual)


def test_norms_written_out() -> None:
    x, weight, bias = torch.randn(3, 4, device=DEVICE, dtype=torch.float64).unbind()
    row = [float(v) for v in x]
    mean = sum(row) / 4
    rms = (sum(v * v for v in row) / 4 + 0.1) ** 0.5
    deviation = (sum((v - mean) ** 2 for v in row) / 4 + 0.1) ** 0.5
    offset = torch.tensor([v / rms * (1 + float(w)) for v, w in zip(row, weight, strict=True)])
    layer = torch.tensor(
        [(v - mean) / deviation * float(w) + float(b) for v, w, b in zip(row, weight, bias, strict=True)]
    )
    one = x.float()[None]
    close(layers.norm(one, layers.Norm(weight.float(), None, 0.1, offset=True))[0].cpu(), offset)
    close(layers.norm(one, layers.Norm(weight.float(), bias.float(), 0.1, centered=True))[0].cpu(), layer)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("size", "curve"), [(48, "silu"), (1500, "silu"), (48, "gelu"), (48, "gelu_tanh")])
def test_gates(dtype: torch.dtype, size: int, curve: layers.Curve) -> None:
    gate_up = 2 * torch.randn(3, 2 * size, device=DEVICE).to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    close(layers_triton.gated(gate, up, curve), layers.gated(gate, up, curve), 4)
    given = torch.randn(3, 4, size, device=DEVICE).to(dtype)[:, 2]
    close(layers_triton.gated(gate.contiguous(), given, curve), layers.CURVES[curve](gate) * given, 4)


def rotation_of(dtype: torch.dtype, turned: int, size: int, *, normed: str, pairs: bool = False) -> layers.Rotation:
    """Of the first ``turned`` dimensions, by random angles."""
    angle = torch.randn(40, turned // 2, device=DEVICE)
    angle = angle.repeat_interleave(2, dim=1) if pairs else angle.repeat(1, 2)
    weights = torch.rand(2, size, device=DEVICE).to(dtype)
    kinds = [layers.Norm(w, eps=1e-6, offset=normed == "offset", wide=normed == "offset") for w in weights]
    return layers.Rotation(
        angle.cos().to(dtype), angle.sin().to(dtype), (kinds[0], kinds[1]) if normed else None, pairs
    )


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("normed", ["", "rms", "offset"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "turned", "pairs"),
    [(4, 1, 8, 8, False), (14, 2, 64, 64, False), (6, 3, 24, 24, True), (4, 2, 24, 8, False), (4, 2, 24, 8, True),
     (4, 2, 24, 0, False)],
)  # fmt: skip
def test_rotation(dtype, normed, heads, kv_heads, size, turned, pairs) -> None:
    qkv = torch.randn(7, heads + 2 * kv_heads, size, device=DEVICE).to(dtype)
    position = torch.randint(0, 30, (7,), device=DEVICE)
    rotation = rotation_of(dtype, turned, size, normed=normed, pairs=pairs)
    found, truth = qkv.clone(), qkv.clone()
    for function, mine in ((layers_triton.rotate_, found), (layers.rotate_, truth)):
        function(mine, position, rotation, heads, kv_heads)
    close(found, truth, 4)
    assert torch.equal(found[:, heads + kv_heads :], qkv[:, heads + kv_heads :]), "values are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("channels", "kept", "weights"), [(5, 3, 3), (300, 4, 4), (40, 4, 2)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolutions(dtype: torch.dtype, channels: int, kept: int, weights: int, silu: bool) -> None:
    wide, past, weight = (torch.randn(3, n, channels, device=DEVICE).to(dtype) for n in (2, kept, weights))
    x, past, weight = wide[:, 0], past.transpose(1, 2).contiguous(), weight[0].T.contiguous()
    for bias in (None, torch.randn(channels, device=DEVICE).to(dtype)):
        whole = torch.cat((past, x[..., None]), dim=-1)
        found, truth = past.clone(), past.clone()
        out = states_triton.convolve(x, found, weight, bias, silu=silu)
        close(out, states.convolve(x, truth, weight, bias, silu=silu), 4)
        # In another order among columns of something else.
        place, mixed = torch.randperm(channels + 3)[:channels].int().to(DEVICE), x.new_zeros(3, channels + 3)
        mixed[:, place.long()] = x
        moved = past.clone()
        close(states_triton.convolve(mixed, moved, weight, bias, silu=silu, column_C=place), out)
        assert torch.equal(moved, found)
        if bias is None:
            moved = past.clone()
            close(states.convolve(mixed, moved, weight, bias, silu=silu, column_C=place), out, 4)
        assert torch.equal(found, truth)
        assert torch.equal(found, whole[..., 1:])
        # In float64, as torch's own.
        own = torch.nn.functional.conv1d(
            whole[..., -weights:].double(), weight[:, None].double(), None if bias is None else bias.double(),
            groups=channels,
        )[..., 0]  # fmt: skip
        close(out, (torch.nn.functional.silu(own) if silu else own).to(dtype), 8)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("size", "values", "shared"), [(24, 40, 1), (128, 64, 2)])
def test_steps_of_the_delta_rule(dtype: torch.dtype, size: int, values: int, shared: int) -> None:
    """Several, after one another, each of heads that lie apart; and in float64, written out."""
    groups, heads = 2, 2 * shared
    found = torch.randn(2, heads, size, values, device=DEVICE)
    truth, exact = found.clone(), found.double()
    rate, bias, weight = (torch.randn(n, device=DEVICE).to(dtype) for n in (heads, heads, values))
    by = states.DeltaGates(
        log_rate_H=rate, step_bias_H=bias, most=float(shared), norm=layers.Norm(weight, eps=1e-3)
    )  # fmt: skip
    for _ in range(2):
        both, wide, narrow = (
            torch.randn(2, *shape, device=DEVICE).to(dtype)
            for shape in ((groups, 2 * size), (groups, 2 * shared * values), (groups, 2 * shared))
        )
        (query, key), value, gate = both.chunk(2, dim=2), wide[..., : shared * values], wide[..., shared * values :]
        value, gate = value.reshape(2, heads, values), gate.unflatten(2, (shared, values))
        # The steps of decay of all lengths, past what an exponential in float32 holds too.
        share, step = narrow[..., :shared], (narrow[..., shared:].float() * 40).to(dtype)
        given = query, key, value, step, share, gate, by
        out = states_triton.delta_step(*given, found)
        close(out, states.delta_step(*given, truth), 8)
        close(found, truth, 8)
        for row, head in itertools.product(range(2), range(heads)):
            group, place = head // shared, head % shared
            q, k = (x[row, group].double() / x[row, group].double().norm() for x in (query, key))
            long = torch.nn.functional.softplus(step[row, group, place].double() + bias[head].double())
            kept = (-rate[head].double().exp() * long).exp() * exact[row, head]
            beta = by.most * share[row, group, place].sigmoid().double()
            kept += torch.outer(k, beta * (value[row, head].double() - k @ kept))
            exact[row, head] = kept
            normed = q @ kept / size**0.5
            normed = normed * (normed.square().mean() + 1e-3).rsqrt() * weight.double()
            close(out[row, head], (normed * torch.nn.functional.silu(gate[row, group, place].double())).to(dtype), 16)
    close(found, exact.float(), 20)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("lines", "size", "groups"), [(40, 24, 2), (64, 128, 1)])
def test_steps_of_mamba_2(dtype: torch.dtype, lines: int, size: int, groups: int) -> None:
    heads = 4
    found = torch.randn(2, heads, lines, size, device=DEVICE).to(dtype)
    truth, exact = found.clone(), found.double()
    rate, skip = -torch.rand(heads, device=DEVICE), torch.randn(heads, device=DEVICE).to(dtype)
    for _ in range(2):
        wide, into = (torch.randn(2, n, m, device=DEVICE).to(dtype) for n, m in ((heads, 2 * lines), (groups, size)))
        x, out_of, step = wide[..., lines:], into.flip(2), torch.rand(2, heads, device=DEVICE)
        out = states_triton.select_step(x, step, rate, into, out_of, skip, found)
        beside = states.select_step(x, step, rate, into, out_of, skip, truth)
        assert out.dtype == beside.dtype == torch.float32, "as whole sequences"
        close(out.to(dtype), beside.to(dtype), 20)
        close(found, truth, 8)
        for row, head in itertools.product(range(2), range(heads)):
            group, long = head * groups // heads, step[row, head].double()
            kept = (long * rate[head].double()).exp() * exact[row, head]
            kept += torch.outer(long * x[row, head].double(), into[row, group].double())
            exact[row, head] = kept
            wanted = kept @ out_of[row, group].double() + skip[head].double() * x[row, head].double()
            close(out[row, head].to(dtype), wanted.to(dtype), 40)
    close(found, exact.to(dtype), 20)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("channels", "size"), [(40, 12), (300, 16)])
def test_steps_of_mamba(dtype: torch.dtype, channels: int, size: int) -> None:
    """Several, after one another, of rows that lie apart; and in float64, written out."""
    found = torch.randn(2, channels, size, device=DEVICE)
    truth, exact = found.clone(), found.double()
    rate, bias = -torch.rand(channels, size, device=DEVICE), torch.randn(channels, device=DEVICE)
    skip = torch.randn(channels, device=DEVICE).to(dtype)
    for _ in range(2):
        wide, both = (torch.randn(2, n, device=DEVICE).to(dtype) for n in (2 * channels, 2 * size))
        (x, gate), (into, out_of) = wide.chunk(2, dim=1), both.chunk(2, dim=1)
        step = (torch.randn(2, channels, device=DEVICE) * 6).to(dtype)
        given = x, step, bias, rate, into, out_of, skip, gate
        out = states_triton.select_channels(*given, found)
        close(out, states.select_channels(*given, truth), 20)
        close(found, truth, 8)
        long = torch.nn.functional.softplus((step + bias.to(dtype)).double())
        long = long if dtype == torch.float32 else long.to(dtype).double()
        for row, channel in itertools.product(range(2), range(channels)):
            kept = (long[row, channel] * rate[channel].double()).exp() * exact[row, channel]
            kept += long[row, channel] * x[row, channel].double() * into[row].double()
            exact[row, channel] = kept
            wanted = kept @ out_of[row].double() + skip[channel].double() * x[row, channel].double()
            wanted *= gate[row, channel].double() * gate[row, channel].double().sigmoid()
            close(out[row, channel], wanted.to(dtype), 40)
    close(found, exact.float(), 20)


def new_pages(dtype: torch.dtype, shape: tuple[int, ...], *, eight_bit: bool) -> pages.Pages:
    """A layer's cache of random content."""
    kept = torch.randn(2, *shape, device=DEVICE).to(pages.EIGHT_BIT if eight_bit else dtype)
    return pages.Pages(*kept, *torch.rand(2, *shape[:-1], device=DEVICE) if eight_bit else ())


def copy_of(cache: pages.Pages) -> pages.Pages:
    return pages.Pages(*(None if x is None else x.clone() for x in vars(cache).values()))


def same(one: pages.Pages, two: pages.Pages) -> bool:
    tensors = zip(vars(one).values(), vars(two).values(), strict=True)
    return all(a is b if a is None else torch.equal(a.float(), b.float()) for a, b in tensors)


# Triton's interpreter has no 8-bit floats.
EIGHT_BIT = (False, True) if DEVICE.type == "cuda" else (False,)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: Triton's interpreter has no 8-bit floats")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_8_bits_are_whole_to_the_last_bit(dtype: torch.dtype) -> None:
    """Every code but NaN's, in rows that are no multiple of a program's."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(9 * 5001 // 256 + 1)[: 9 * 5001].view(9, 5001)
    codes[codes & 0x7F == 0x7F] = 0
    scale_O = 2.0 ** torch.arange(-12, 6, 2)
    truth = (codes.view(torch.float8_e4m3fn).double() * scale_O.double()[:, None]).to(dtype)
    assert torch.equal(quantized_triton.whole(codes.to(DEVICE), scale_O.to(DEVICE), dtype).cpu(), truth)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "page"), [(4, 2, 16, 16), (6, 1, 24, 16), (14, 2, 64, 64)])
def test_pages(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, page: int, eight_bit: bool, monkeypatch
) -> None:
    cache = new_pages(dtype, (9, kv_heads, page, size), eight_bit=eight_bit)
    kept = copy_of(cache)
    key, value = torch.randn(2, 5, kv_heads, size, device=DEVICE).to(dtype)
    target = torch.tensor([3, 17, page + 9, 0, 8 * page + 3], device=DEVICE)
    pages.store(key, value, cache, target)
    pages_triton.store(key, value, kept, target)
    assert same(cache, kept)

    # Each row's last page is its own.
    table = torch.cat((torch.randint(0, 5, (4, 3), device=DEVICE), torch.arange(5, 9, device=DEVICE)[:, None]), 1).int()
    length = torch.tensor([0, page - 1, page, 3 * page + 5], device=DEVICE)
    for row in range(3):
        table[row, length[row] // page] = 5 + row
    alive = torch.tensor([1, 0, 1, 1], device=DEVICE)
    plain_rows = pages.decode_rows(table, length, alive, page=page, kv_heads=kv_heads)
    some_rows = pages_triton.decode_rows(table, length, alive, page, kv_heads)
    assert torch.equal(some_rows.target_B, plain_rows.target_B)
    rows = pages_triton.decode_rows(table, length, torch.ones_like(alive), page, kv_heads)
    query = torch.randn(4, heads, size, device=DEVICE).to(dtype)
    sinks = torch.randn(heads, device=DEVICE).to(dtype)
    for window, softcap, sink in ((None, None, None), (page + 3, 1.5, None), (1, 0.5, sinks)):
        arguments = (query, key[:4], value[:4])
        how = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "sink_H": sink}
        plain = copy_of(cache)
        truth = pages.append_attend(*arguments, plain, rows, **how)
        for share, most in ((None, None), (4, 4), (1, 2), (1, 4)):
            kept = copy_of(cache)
            # A page in two parts, as those of wide heads are taken, or whole.
            in_parts = most == 4 and page > 16
            monkeypatch.setattr(pages_triton, "TILE", page * size * dtype.itemsize // 2 if in_parts else 1 << 16)
            given = rows if share is None else replace(rows, share=torch.tensor([share], device=DEVICE))
            found = pages_triton.append_attend(*arguments, kept, given, **how, most=most)
            close(found, truth, 2)
            assert rows.arrived_BK is not None
            assert not rows.arrived_BK.any(), "the next layer counts from zero"
            assert same(kept, plain), "the new token is stored"


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(
    ("normed", "size", "turned", "pairs"),
    [("", 16, 16, False), ("rms", 24, 24, False), ("offset", 16, 8, False), ("", 24, 12, True), ("rms", 16, 0, False)],
)
def test_decoding_turns_queries_and_keys_by_the_way(dtype, normed, size, turned, pairs) -> None:
    heads, kv_heads, page = 6, 2, 16
    qkv = torch.randn(3, heads + 2 * kv_heads, size, device=DEVICE).to(dtype)
    length = torch.tensor([0, 5, 20], device=DEVICE)
    rotation = rotation_of(dtype, turned, size, normed=normed, pairs=pairs)
    table = torch.tensor([[1, 2], [3, 4], [5, 6]], device=DEVICE).int()
    rows = pages_triton.decode_rows(table, length, torch.ones_like(length), page, kv_heads)
    after = qkv.clone()
    layers.rotate_(after, length, rotation, heads, kv_heads)
    parts = [heads, kv_heads, kv_heads]
    cache = new_pages(dtype, (7, kv_heads, page, size), eight_bit=False)
    plain, found, by_itself = (copy_of(cache) for _ in range(3))
    truth = pages.append_attend(*after.split(parts, dim=1), plain, rows, scaling=0.3)
    for most in (1, 4):
        out = pages_triton.append_attend(
            *qkv.split(parts, dim=1), found, rows, scaling=0.3, sliding_window=None, rotation=rotation, most=most
        )
        close(out, truth, 4)
        close(found.keys, plain.keys, 4)
        assert torch.equal(found.values, plain.values)
    close(pages.append_attend(*qkv.split(parts, dim=1), by_itself, rows, scaling=0.3, rotation=rotation), truth, 4)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT)
@pytest.mark.parametrize(("dtype", "weighted"), [(torch.float32, False), (LOW, True)])
def test_values_are_normed_and_what_is_kept_is_attended_to_again(dtype, weighted: bool, eight_bit: bool) -> None:
    """Values that are the keys as they come, normed by the way; then queries of a layer without keys and values."""
    heads, kv_heads, size, page = 6, 2, 24, 16
    qk, other = torch.randn(2, 3, heads + kv_heads, size, device=DEVICE).to(dtype)
    query, key = qk.split([heads, kv_heads], dim=1)
    length = torch.tensor([0, 5, 20], device=DEVICE)
    table = torch.tensor([[1, 2], [3, 4], [5, 6]], device=DEVICE).int()
    rows = pages_triton.decode_rows(table, length, torch.ones_like(length), page, kv_heads)
    rotation = rotation_of(dtype, size, size, normed="rms")
    norm = layers.Norm(torch.rand(size, device=DEVICE).to(dtype) if weighted else None, wide=weighted)
    cache = new_pages(dtype, (7, kv_heads, page, size), eight_bit=eight_bit)
    plain, written, found = (copy_of(cache) for _ in range(3))
    turned, before = qk.clone(), qk.clone()
    layers.rotate_(turned, length, rotation, heads, kv_heads)
    normed = layers.norm(key.reshape(-1, size), norm).view_as(key)
    truth = pages.append_attend(turned[:, :heads], turned[:, heads:], normed, plain, rows, scaling=0.3)
    how = {"scaling": 0.3, "sliding_window": None, "rotation": rotation}
    close(pages.append_attend(query, key, key, written, rows, **how, value_norm=norm), truth, 4)
    nothing = other[:, :0]
    for most in (1, 4):
        out = pages_triton.append_attend(query, key, key, found, rows, **how, value_norm=norm, most=most)
        close(out, truth, 4 if not eight_bit else 40)
        close(found.values.float(), plain.values.float(), 4 if not eight_bit else 40)
        assert torch.equal(qk, before)
        kept = copy_of(found)
        again = pages_triton.append_attend(other[:, :heads], nothing, nothing, found, rows, **how, most=most)
        close(again, pages.append_attend(other[:, :heads], nothing, nothing, kept, rows, **how), 4)
        assert same(found, kept)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("heads", "shared", "width"), [(3, 4, 12), (20, 64, 512), (17, 6, 40)])
def test_keys_that_hold_their_values(dtype, heads: int, shared: int, width: int, eight_bit: bool, monkeypatch) -> None:
    """Against keys and values apart, as far as that is the same: in 8 bits they have one scale here."""
    page, size = 64, shared + width
    whole = new_pages(dtype, (9, 1, page, size), eight_bit=eight_bit)
    cache = pages.latent_pages(whole.keys, whole.key_scales, values=width)
    kept = pages.latent_pages(whole.keys.clone(), None if not eight_bit else whole.key_scales.clone(), values=width)
    key = torch.randn(5, 1, size, device=DEVICE).to(dtype)
    target = torch.tensor([3, 17, page + 9, 0, 8 * page + 3], device=DEVICE)
    pages.store(key, None, cache, target)
    pages_triton.store(key, None, kept, target)
    assert same(cache, kept)

    table = torch.cat((torch.randint(0, 5, (4, 3), device=DEVICE), torch.arange(5, 9, device=DEVICE)[:, None]), 1).int()
    length = torch.tensor([0, page - 1, page, 3 * page + 5], device=DEVICE)
    for row in range(3):
        table[row, length[row] // page] = 5 + row
    blocks = -(-heads // pages.LATENT_HEADS)
    rows = pages_triton.decode_rows(table, length, torch.ones_like(length), page, blocks)
    query = torch.randn(4, heads + 1, size, device=DEVICE).to(dtype)[:, :heads]
    before = whole.keys.clone(), None if not eight_bit else whole.key_scales.clone()
    truth = pages.append_attend(query, key[:4], None, cache, rows, scaling=0.05)
    if not eight_bit:
        apart = pages.Pages(before[0].clone(), torch.nn.functional.pad(before[0][..., shared:], (0, shared)))
        wide = torch.nn.functional.pad(key[:4, :, shared:], (0, shared))
        close(truth, pages.append_attend(query, key[:4], wide, apart, rows, scaling=0.05)[..., :width], 2)
    for share, most, tile in ((None, None, 1 << 15), (1, 2, 1 << 12), (1, 4, 1 << 15)):
        monkeypatch.setattr(latent_triton, "TILE", tile)
        kept = pages.latent_pages(before[0].clone(), None if before[1] is None else before[1].clone(), values=width)
        given = rows if share is None else replace(rows, share=torch.tensor([share], device=DEVICE))
        found = latent_triton.append_attend(query, key[:4], kept, given, scaling=0.05, most=most)
        close(found, truth, 2)
        assert rows.arrived_BK is not None
        assert not rows.arrived_BK.any(), "the next layer counts from zero"
        assert same(kept, cache), "the new token is stored"


def test_long_rows_are_divided_among_programs() -> None:
    """Eleven pages to eleven programs beside one page to one, or as many as are allowed, or shared out evenly."""
    heads, kv_heads, size, page = 6, 2, 16, 16
    length = torch.tensor([11 * page, 3, 40, 7 * page + 1], device=DEVICE)
    table = torch.arange(1, 49, device=DEVICE).view(4, 12).int()
    rows = pages_triton.decode_rows(table, length, torch.ones_like(length), page, kv_heads)
    assert rows.share is not None
    assert rows.share.tolist() == [pages_triton.LEAST]
    cache = new_pages(torch.float32, (49, kv_heads, page, size), eight_bit=False)
    query, key, value = torch.randn(4, heads + 2 * kv_heads, size, device=DEVICE).split([heads, kv_heads, kv_heads], 1)
    truth = pages.append_attend(query, key, value, copy_of(cache), rows, scaling=0.3)
    for share, most in ((1, None), (1, 3), (3, 16), (100, 16)):
        given = replace(rows, share=torch.tensor([share], device=DEVICE))
        found = pages_triton.append_attend(
            query, key, value, copy_of(cache), given, scaling=0.3, sliding_window=None, most=most
        )
        close(found, truth, 2)
    # 300 rows of 1 to 10 pages: what each program would take if all took as much.
    length = torch.arange(300, device=DEVICE) % 10 * page + 5
    rows = pages_triton.decode_rows(table[:1].expand(300, 12), length, torch.ones_like(length), page, kv_heads)
    assert rows.share is not None
    assert rows.share.tolist() == [-(-300 * 11 // 2 * kv_heads // pages_triton.FULL)]


def test_the_new_token_is_attended_to_and_stored() -> None:
    """Against softmax attention written out, on pages that hold a sequence in order."""
    page, size = 16, 8
    key, value = torch.randn(2, 2 * page + 3, 1, size, device=DEVICE)
    cache = pages.Pages(*torch.zeros(2, 4, 1, page, size, device=DEVICE))
    last = len(key) - 1
    pages.store(key[:last], value[:last], cache, page + torch.arange(last, device=DEVICE))
    query = torch.randn(1, 2, size, device=DEVICE)
    table, length = torch.tensor([[1, 2, 3]], device=DEVICE).int(), torch.tensor([last], device=DEVICE)
    rows = pages.DecodeRows(table, length, page + length)
    found = pages.append_attend(query, key[last:], value[last:], cache, rows, scaling=0.5, sliding_window=None)
    weight = (0.5 * query[0] @ key[:, 0].T).softmax(-1)
    close(found[0], weight @ value[:, 0], 2)
    stored = [x[1:4, 0].reshape(-1, size)[: last + 1] for x in (cache.keys, cache.values)]
    assert torch.equal(stored[0], key[:, 0])
    assert torch.equal(stored[1], value[:, 0])


def test_soft_caps_and_sinks_written_out() -> None:
    """Against scores bent by tanh, and a softmax with one column more whose value is nothing."""
    page, size = 16, 8
    key, value = torch.randn(2, page + 3, 1, size, device=DEVICE)
    cache = pages.Pages(*torch.zeros(2, 3, 1, page, size, device=DEVICE))
    last = len(key) - 1
    pages.store(key[:last], value[:last], cache, page + torch.arange(last, device=DEVICE))
    query, sinks = torch.randn(1, 2, size, device=DEVICE), torch.tensor([0.3, 4.0], device=DEVICE)
    table, length = torch.tensor([[1, 2]], device=DEVICE).int(), torch.tensor([last], device=DEVICE)
    rows = pages.decode_rows(table, length, torch.ones_like(length), page=page, kv_heads=1)
    how = {"scaling": 0.5, "sliding_window": 5, "softcap": 0.8, "sink_H": sinks}
    found = pages.append_attend(query, key[last:], value[last:], cache, rows, **how)
    score = (0.8 * torch.tanh(0.5 * query[0].double() @ key[-5:, 0].double().T / 0.8)).exp()
    weight = score / (score.sum(-1, keepdim=True) + sinks.double().exp()[:, None])
    close(found[0].double(), weight @ value[-5:, 0].double(), 2)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_eight_bits_keep_a_head_within_a_sixteenth(magnitude: float) -> None:
    """e4m3 has three digits after the first: what is kept differs by a sixteenth of itself, or of a small floor."""
    cache = new_pages(torch.float32, (2, 3, 16, 24), eight_bit=True)
    key, value = magnitude * torch.randn(2, 4, 3, 24)
    cache = pages.Pages(*(x.cpu() for x in vars(cache).values()))
    pages.store(key, value, cache, torch.arange(16, 20))
    for x, kept, scales in ((key, cache.keys, cache.key_scales), (value, cache.values, cache.value_scales)):
        found = (kept.float() * scales[..., None])[1, :, :4].transpose(0, 1)
        floor = x.abs().amax(-1, keepdim=True) / 448 * 2**-10
        assert ((found - x).abs() <= x.abs() / 16 + floor).all()


@pytest.mark.parametrize(
    ("dtype", "wire"), [*itertools.product((torch.float32, LOW), repeat=2), (torch.uint8, torch.uint8)]
)
def test_sums_of_bits(dtype: torch.dtype, wire: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tensors at once: one with several blocks a program, views, positions past 2^31, two jobs for a slot."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(bits_triton, "LEAST_PROGRAMS", 16)
    most = 2048 * 512 * 3 if DEVICE.type == "cuda" else 3 * 2048  # interpreted
    jobs: list[bits.Job] = []
    for rows, width in ((1, 1), (1, 5000), (7, 900), (32, 64), (3, most + 17)):
        wide = (50 * torch.randn(rows, width + 5, device=DEVICE).abs()).to(dtype)
        for values in (wide[:, 3 : width + 3], wide[:, 3 : width + 3].contiguous()):
            for start, step in ((0, width), (2**31 - 40, width + 9)):
                jobs.append(bits.Job(len(jobs) % 7, values, wire, start, step))
    total = torch.zeros(7, dtype=torch.int32, device=DEVICE)
    add = bits_triton.prepare(jobs)
    add(total)
    plain = torch.zeros(7, dtype=torch.int32)
    bits.prepare([job._replace(values_RC=job.values_RC.cpu()) for job in jobs])(plain)
    assert total.tolist() == plain.tolist()
    assert len(set(total.tolist())) == 7
    # It adds to what is there, and reads what the tensors hold then.
    jobs[4].values_RC.neg_()
    add(total)
    changed = total != 2 * plain.to(DEVICE)
    touched = {job.slot for job in jobs if job.values_RC.data_ptr() == jobs[4].values_RC.data_ptr()}
    assert set(changed.nonzero().flatten().tolist()) == touched
    assert 0 < len(touched) < 7


@pytest.mark.parametrize("vocabulary", [100, 5000, 9000])
def test_draws(vocabulary: int) -> None:
    rows = 40
    logits = 3 * torch.randn(rows, vocabulary, device=DEVICE)
    logits[3, : vocabulary // 2] = -float("inf")
    params = [SamplingParams(temperature=(1, 0.7, 0, 1.3)[i % 4]) for i in range(rows)]
    columns, seeds = param_columns(params).to(DEVICE), torch.tensor([i * 7919 - 2**63 for i in range(rows)]).to(DEVICE)
    drawn = torch.randint(0, 99, (rows,), device=DEVICE)
    truth = plain_draw(logits, seeds, columns, drawn, Wanted.of(params))
    found = draw_triton.draw(logits, columns[0], columns[1], seeds, drawn)
    without = draw_triton.draw(logits, columns[0], columns[1], seeds, drawn, any_greedy=False)
    drawn_at_random = columns[1] == 0
    assert torch.equal(without[:, drawn_at_random], found[:, drawn_at_random])
    assert torch.equal(found[0], truth[0])
    close(found[1:], truth[1:])


@pytest.mark.filterwarnings("ignore:invalid value|divide by zero|All-NaN:RuntimeWarning")
def test_logits_that_are_not_finite_come_back_as_nan() -> None:
    """One NaN among the others, or among forbidden tokens only, a block or a row of them; infinity; no token at all."""
    logits = torch.randn(10, 300, device=DEVICE)
    size, nan = draw.block_size(300), float("nan")
    logits[1, 3] = logits[2, size : 2 * size] = logits[3] = nan
    logits[4:6, size : 2 * size] = logits[6:8, -5:] = logits[8] = -float("inf")
    logits[5, size + 3] = logits[7, -2] = nan
    logits[9, 3] = float("inf")
    ones, seeds = torch.ones(10, dtype=torch.float64, device=DEVICE), torch.arange(10, device=DEVICE)
    params = [SamplingParams()] * 10
    truth = plain_draw(logits, seeds, param_columns(params).to(DEVICE), seeds, Wanted.of(params))
    assert truth[2].isnan().tolist() == [i in (1, 2, 3, 5, 7, 8, 9) for i in range(10)]
    for greedy in (False, True):
        there = [i for i in range(10) if not greedy or DEVICE.type == "cuda" or i not in (2, 3)]  # the interpreter
        kept, of_greedy = logits[there], ones[there] * greedy
        found = draw_triton.draw(kept, ones[there], of_greedy, seeds[there], seeds[there], any_greedy=greedy)
        assert torch.equal(found[1:].isnan(), truth[1:, there].isnan())
        assert ((found[0] >= 0) & (found[0] < 300)).all()


def test_draws_use_the_published_stream() -> None:
    """Of two equal tokens the one is drawn that waits less."""
    rows = 64
    seeds = torch.arange(rows, device=DEVICE) * 2**57 - 2**62
    ones = torch.ones(rows, dtype=torch.float64, device=DEVICE)
    counter = torch.arange(rows, device=DEVICE) * 3
    found = draw_triton.draw(torch.zeros(rows, 2, device=DEVICE), ones, 0 * ones, seeds, counter)
    waits = waiting(stream(seeds, counter), torch.arange(1, 3, device=DEVICE))
    assert torch.equal(found[0], (waits[:, 1] < waits[:, 0]).double())


def test_a_step_moves_on_the_rows_that_live() -> None:
    state = torch.zeros(draw.FIELDS, 6, dtype=torch.int64)
    state[draw.TOKEN], state[draw.LENGTH], state[draw.DRAWN] = 9, torch.arange(10, 16), torch.arange(6)
    state[draw.LIMIT] = torch.tensor([50, 50, 3, 50, 50, 50])
    state[draw.RULE] = torch.tensor([0, 0, 0, 1, 1, 0])
    state[draw.ALIVE] = torch.tensor([1, 0, 1, 1, 1, 1])
    stops = torch.zeros(2, 20, dtype=torch.uint8)
    stops[1, 7] = 1
    results = torch.tensor([[5.0, 6, 8, 7, 4, 7], [-1, -2, -3, -4, -5, -6], [-1, -2, -3, -4, -5, -7]]).double()
    expected = {
        draw.TOKEN: [5, 9, 8, 7, 4, 9],
        draw.LENGTH: [11, 0, 0, 0, 15, 15],
        draw.DRAWN: [1, 1, 3, 4, 5, 5],
        draw.ALIVE: [1, 0, 0, 0, 1, 1],
    }
    for function in (draw.advance, draw_triton.advance):
        mine = state.to(DEVICE, copy=True)
        ring = torch.full((3, 3, 6), 77.0, dtype=torch.float64, device=DEVICE)
        cursor = torch.ones(1, dtype=torch.int64, device=DEVICE)
        function(mine, results.to(DEVICE)[:, :5].contiguous(), stops.to(DEVICE), ring, cursor, 5)
        assert {name: mine[name].tolist() for name in expected} == expected
        assert cursor.item() == 2
        assert ring[1, 0].tolist() == [5, -1, 8, 7, 4, 77]
        assert ring[1, 2, :5].tolist() == results[2, :5].tolist()
        assert (ring[0] == 77).all()
