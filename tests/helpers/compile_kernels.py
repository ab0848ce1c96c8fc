"""Compiles all Triton kernels for a GPU that need not be there: ``python compile_kernels.py 90`` (or 80).

In a process of its own: where Triton has been imported for its interpreter, it compiles nothing.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

import ast
import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tandem import kernels
from tandem.kernels import (
    bits,
    bits_triton,
    choice_triton,
    draw_triton,
    experts_triton,
    latent_triton,
    layers_triton,
    logprob_triton,
    pages_triton,
    quantized_triton,
    states_triton,
)
from tandem.kernels.choice import Rule
from tandem.kernels.draw import FIELDS
from tandem.kernels.layers import CURVES, Norm, Rotation
from tandem.kernels.pages import EIGHT_BIT, Pages, latent_pages
from tandem.kernels.states import DeltaGates

DTYPES = (torch.float32, torch.bfloat16)
PAGE = 64
HAS_EIGHT_BIT = 89
"""The lowest compute capability on which Triton has e4m3."""


class FakeDriver:
    """What Triton's compiler asks a driver. Loading and launching would ask for more."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def check(capability: int, modules: Sequence[ModuleType], call: Callable[[], None]) -> int:
    """Compiles what ``call`` launches and prints a line a kernel. 1 if one fails, or one of ``modules`` is left out."""
    compiled: dict[str, set[str]] = defaultdict(set)
    errors: dict[str, str] = {}
    run = JITFunction.run

    def only_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = _name(kernel.fn.__module__, kernel.fn.__name__)
        try:
            compiled[name].add(run(kernel, *arguments, grid=grid, warmup=True, **options).hash)
        except Exception as error:
            # The first one of a kernel. The others are compiled all the same.
            shown = ", ".join(str(x.dtype if isinstance(x, torch.Tensor) else x) for x in arguments)
            errors.setdefault(name, f"({shown}), {options}:\n{_text(error)}")

    driver.set_active(FakeDriver(capability))
    JITFunction.run = only_compile
    try:
        call()
    finally:
        JITFunction.run = run
    for name in (_name(module.__name__, kernel) for module in modules for kernel in launched(module)):
        if name not in compiled and name not in errors:
            errors[name] = f"never compiled: add a call of what launches it to {Path(__file__).name}"
    for name in sorted(compiled.keys() - errors.keys()):
        print(f"ok     {name}: {len(compiled[name])} variants")
    for name in sorted(errors):
        print(f"FAILED {name} for compute capability {capability}: {errors[name]}")
    return 1 if errors or not compiled else 0


def _name(module: str, kernel: str) -> str:
    return f"{module.rpartition('.')[2]}.{kernel}"


def _text(error: BaseException) -> str:
    """With its causes: Triton wraps an error once for each jitted function that it passes through."""
    own = f"{type(error).__name__}: {error}"
    return own if error.__cause__ is None else f"{own}\n{_text(error.__cause__)}"


def launched(module: ModuleType) -> list[str]:
    """Names of the module that its source launches as ``name[grid](...)``. Other jitted functions are parts of them."""
    calls = (node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call))
    subscripts = (call.value for call in calls if isinstance(call, ast.Subscript))
    names = {value.id for value in subscripts if isinstance(value, ast.Name)}
    return sorted(names & vars(module).keys())


def kernel_modules() -> list[ModuleType]:
    """Whatever is there, so that none is forgotten."""
    files = sorted(Path(kernels.__path__[0]).glob("*_triton.py"))
    return [importlib.import_module(f"{kernels.__name__}.{file.stem}") for file in files]


def call_layers() -> None:
    # Of sizes, one for each type: all that a size changes is constants.
    for dtype, size in zip(DTYPES, (896, 5120), strict=True):
        x, weight = torch.zeros(2, size, dtype=dtype), torch.zeros(size, dtype=dtype)
        layers_triton.add_norm(x, x, Norm(weight))
    # Every branch once, in the last type.
    layer = Norm(weight, weight, offset=True, centered=True, wide=True)
    layers_triton.add_norm(x, None, Norm(None))
    layers_triton.add_norm(x, x, None, first=layer, scale=0.5, factor_1=torch.ones(1, dtype=dtype))
    layers_triton.add_norm(x, x.float(), replace(layer, rounds=True))
    for curve in CURVES:
        layers_triton.gated(*torch.zeros(2, 10240, dtype=dtype).chunk(2, dim=1), curve)
    for dtype, (heads, kv_heads, size) in zip(DTYPES, ((14, 2, 64), (6, 3, 24)), strict=True):
        qkv = torch.zeros(2, heads + 2 * kv_heads, size, dtype=dtype)
        for rotation in _rotations(size, dtype)[:: 1 if dtype == DTYPES[-1] else 2]:
            layers_triton.rotate_(qkv, torch.zeros(2, dtype=torch.int64), rotation, heads, kv_heads)


def _rotations(size: int, dtype: torch.dtype) -> list[Rotation]:
    """Without and with norms, a part of a head by pairs, and norms alone."""
    table, part = torch.zeros(9, size, dtype=dtype), torch.zeros(9, 8)
    norm = Norm(torch.zeros(size, dtype=dtype), offset=dtype == torch.float32)
    return [
        Rotation(table, table),
        Rotation(table, table, (norm, norm)),
        Rotation(part, part, (norm, norm), pairs=True),
        Rotation(table[:, :0], table[:, :0], (norm, norm)),
    ]


def call_logprob() -> None:
    number_n, target_n = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for dtype, vocabulary in zip(DTYPES, (100, 9000), strict=True):
        logits = torch.zeros(3, vocabulary, dtype=dtype)
        for entropy in (False, True):
            logprob_triton.row_stats(logits, target_n, 0.7, entropy=entropy)
        for of_logp, of_entropy in ((number_n, None), (None, number_n), (number_n, number_n)):
            logprob_triton.logits_gradient_(
                logits, target_n, number_n, of_logp, 0.7, entropy_n=number_n, grad_entropy_n=of_entropy
            )


def call_bits() -> None:
    # For each pair of dtypes: several elements a load, one a load, and rows that lie apart.
    total, wide = torch.zeros(3, dtype=torch.int32), (torch.empty(1, 4096), torch.empty(1, 5000), torch.empty(7, 30))
    for dtype in DTYPES:
        values = [x.to(dtype) for x in wide[:2]] + [wide[2].to(dtype)[:, :10]]
        bits_triton.prepare([bits.Job(1, x, wire, 3, 30) for wire in DTYPES for x in values])(total)
    # Codes of weights in few bits.
    bits_triton.prepare([bits.Job(1, wide[0].byte(), torch.uint8, 3, 30)])(total)


def call_draw() -> None:
    # Triton makes a constant of an argument of 1, such as one row or one block of logits.
    for dtype, rows, vocabulary in zip(DTYPES, (1, 3), (100, 9000), strict=True):
        column, whole = torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
        logits = torch.zeros(rows, vocabulary, dtype=dtype)
        for any_greedy in (False, True):
            draw_triton.draw(logits, column, column, whole, whole, any_greedy=any_greedy)
        state, stops = torch.zeros(FIELDS, rows, dtype=torch.int64), torch.zeros(2, 100, dtype=torch.uint8)
        drawn, ring = torch.zeros(3, rows, dtype=torch.float64), torch.zeros(4, 3, rows, dtype=torch.float64)
        draw_triton.advance(state, drawn, stops, ring, torch.zeros(1, dtype=torch.int64), rows)


def call_states() -> None:
    for dtype, (channels, kept), (size, values) in zip(DTYPES, ((8, 4), (300, 3)), ((8, 8), (128, 128)), strict=True):
        x, past, weight = (torch.zeros(2, channels, *more, dtype=dtype) for more in ((), (kept,), (kept,)))
        for bias in (None, x[0]):
            states_triton.convolve(x, past, weight.view(-1, kept)[:channels], bias, silu=bias is None)
            states_triton.convolve(
                x, past, weight.view(-1, kept)[:channels], bias, silu=True, column_C=torch.arange(channels).int()
            )
        query, value = torch.zeros(2, 3, size, dtype=dtype), torch.zeros(2, 3, values, dtype=dtype)
        state, decay, by_group = torch.zeros(2, 3, size, values), torch.zeros(2, 3), query[..., None]
        gates = DeltaGates(log_rate_H=query[0, :, 0], step_bias_H=decay[0], most=2.0, norm=Norm(value[0, 0]))
        states_triton.delta_step(
            query, query, value, by_group[:, :, 0], by_group[:, :, 0], value[:, :, None], gates, state
        )
        group, state = torch.zeros(2, 1, size, dtype=dtype), torch.zeros(2, 3, values, size, dtype=dtype)
        states_triton.select_step(value, decay, decay[0], group, group, decay[0], state)
        states_triton.select_channels(
            x,
            x,
            decay.new_zeros(channels),
            x.new_zeros(channels, size).float(),
            group[:, 0],
            group[:, 0],
            x[0],
            x,
            torch.zeros(2, channels, size),
        )


def call_experts() -> None:
    # Tiles of 16 rows and of 128, of sizes that are a multiple of what is loaded at a time and of others; both layouts.
    for dtype, (tokens, picks, count, width), transposed in (
        (torch.float32, (1, 1, 1, 40), False), (torch.bfloat16, (256, 2, 8, 896), False),
        (torch.bfloat16, (1024, 4, 32, 100), True),
    ):  # fmt: skip
        x, index = torch.zeros(tokens, width, dtype=dtype), torch.zeros(tokens * picks, dtype=torch.int64)
        stack, factor = torch.zeros(count, width, width, dtype=dtype), torch.zeros(tokens * picks)
        places = experts_triton.place(index, count)
        bias = stack[:, 0].contiguous() if transposed else None
        out = experts_triton.product(x, stack.mT if transposed else stack, bias, places, factor)
        experts_triton.collect(out, index, count, x)
        experts_triton.weighted(out, factor, None if transposed else "silu")
    for rule in (Rule(8, shared=True), Rule(3, "sigmoid", 4, 2, 2)):
        choice_triton.choose(torch.zeros(3, 60), None if rule.groups == 1 else torch.zeros(60), rule)


def call_pages(*, eight_bit: bool) -> None:
    for dtype in DTYPES:
        for scaled in (False, True) if eight_bit else (False,):
            # Normed heads and splits; a window and a page a row, both 1; many rows, for which there are few warps.
            call_attention(dtype, (14, 2, 64), count=5, width=20, window=None, rotation=1, scaled=scaled)
            call_attention(dtype, (6, 1, 24), count=1, width=1, window=1, rotation=2, scaled=scaled)
            call_attention(dtype, (4, 2, 64), count=512, width=20, window=100, rotation=None, scaled=scaled)
            call_latent(dtype, (20, 64, 512), count=5, scaled=scaled)
            call_latent(dtype, (3, 4, 12), count=512, scaled=scaled)


def call_latent(dtype: torch.dtype, heads_shared_width: tuple[int, int, int], *, count: int, scaled: bool) -> None:
    """One decoding step of ``count`` rows whose keys hold their values."""
    heads, shared, width = heads_shared_width
    both = torch.zeros(count, heads + 1, shared + width, dtype=dtype)
    kept = torch.zeros(4, 1, PAGE, shared + width, dtype=EIGHT_BIT if scaled else dtype)
    pages = latent_pages(kept, torch.zeros(4, 1, PAGE) if scaled else None, values=width)
    length = torch.zeros(count, dtype=torch.int64)
    rows = pages_triton.decode_rows(torch.zeros(count, 20, dtype=torch.int32), length, length, PAGE, 2)
    pages_triton.store(both[:, -1:], None, pages, rows.target_B)
    latent_triton.append_attend(both[:, :-1], both[:, -1:], pages, rows, scaling=0.1)


def call_attention(
    dtype: torch.dtype, heads_kv_size: tuple[int, int, int], *, count: int, width: int, window: int | None,
    rotation: int | None, scaled: bool,
) -> None:  # fmt: skip
    """One decoding step of ``count`` rows of ``width`` pages. ``rotation``: which of ``_rotations``."""
    heads, kv_heads, size = heads_kv_size
    qkv = torch.zeros(count, heads + 2 * kv_heads, size, dtype=dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    kept = torch.zeros(2, 4, kv_heads, PAGE, size, dtype=EIGHT_BIT if scaled else dtype)
    pages = Pages(*kept, *torch.zeros(2, 4, kv_heads, PAGE) if scaled else ())
    length = torch.zeros(count, dtype=torch.int64)
    table = torch.zeros(count, width, dtype=torch.int32)
    rows = pages_triton.decode_rows(table, length, length, PAGE, kv_heads)
    pages_triton.store(key, value, pages, rows.target_B)
    # Soft caps and sinks where there is a window.
    pages_triton.append_attend(
        query, key, value, pages, rows, scaling=0.1, sliding_window=window,
        rotation=None if rotation is None else _rotations(size, dtype)[rotation],
        softcap=None if window is None else 50.0, sink_H=None if window is None else torch.zeros(heads, dtype=dtype),
        value_norm=None if rotation is None else Norm(None if window is None else qkv[0, 0], wide=True),
    )  # fmt: skip
    if rotation is not None:
        # Keys and values are there.
        pages_triton.append_attend(query, key[:, :0], value[:, :0], pages, rows, scaling=0.1, sliding_window=window)


def main() -> int:
    capability = int(sys.argv[1])

    eight_bit = capability >= HAS_EIGHT_BIT

    def call() -> None:
        call_layers()
        call_logprob()
        call_bits()
        call_draw()
        call_states()
        call_experts()
        call_pages(eight_bit=eight_bit)
        for dtype in DTYPES if eight_bit else ():
            quantized_triton.whole(torch.zeros(7, 300, dtype=torch.uint8), torch.ones(7), dtype)

    modules = [module for module in kernel_modules() if eight_bit or module is not quantized_triton]
    return check(capability, modules, call)


if __name__ == "__main__":
    sys.exit(main())
