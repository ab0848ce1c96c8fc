"""Kernels for the experts of few tokens against a loop over picks in float64: on a GPU, or interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.engine_models import tokenizer
from helpers.targets import MIXTURES
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

pytest.importorskip("triton")

from tandem.kernels import experts_triton
from tandem.models.loading import prepare_module
from tandem.models.moe import experts as grouped
from tandem.models.moe.experts import IMPLEMENTATION, grouped_experts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter rounds bfloat16 towards zero, and multiplies matrices of float16 at the lowest.
LOW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


class Experts(nn.Module):
    """Stacked experts as transformers describes them."""

    def __init__(
        self, count: int, width: int, inner: int, dtype: torch.dtype, *, transposed: bool = False,
        bias: bool = False, gate: bool = True, act: str = "silu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = count, transposed, bias, gate
        self.act_fn = ACT2FN[act]
        shapes = {"gate_up_proj" if gate else "up_proj": (inner * (1 + gate), width), "down_proj": (width, inner)}
        for name, (out, into) in shapes.items():
            shape = (into, out) if transposed else (out, into)
            self.register_parameter(
                name, nn.Parameter(torch.randn(count, *shape, device=DEVICE).to(dtype) * into**-0.5)
            )
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(count, out, device=DEVICE).to(dtype)))

    _apply_gate = _default_apply_gate


class Clamped(Experts):
    """With a gate of their own, as gpt-oss has."""

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def one_by_one(experts: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """In float64, by vectors."""
    rows_TE = torch.zeros_like(hidden_TE, dtype=torch.float64)
    for row_E, x_E, index_K, weight_K in zip(rows_TE, hidden_TE, index_TK.tolist(), weight_TK, strict=True):
        for number, weight in zip(index_K, weight_K, strict=True):
            if number >= experts.num_experts:
                continue
            x = x_E.double()
            for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
                matrix = getattr(experts, name)[number].double()
                x = x @ matrix if experts.is_transposed else matrix @ x
                if experts.has_bias:
                    x = x + getattr(experts, f"{name}_bias")[number].double()
                if name != "down_proj":
                    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
            row_E += weight.double() * x
    return rows_TE


@dataclass(frozen=True)
class Case:
    tokens: int
    count: int
    picks: int
    width: int
    inner: int
    options: tuple[tuple[str, Any], ...] = ()
    kind: Callable[..., Experts] = Experts
    crowded: bool = False
    """Whether one expert gets all."""
    past: bool = False
    """Whether some picks are of an expert that there is not."""

    def made(self, dtype: torch.dtype) -> tuple[Experts, Tensor, Tensor, Tensor]:
        torch.manual_seed(self.tokens)
        experts = self.kind(self.count, self.width, self.inner, dtype, **dict(self.options))
        hidden_TE = torch.randn(self.tokens, self.width, device=DEVICE).to(dtype)
        scores = torch.rand(self.tokens, self.count, device=DEVICE)
        scores[:, 1] += 2.0 if self.crowded else -2.0
        index_TK = scores.topk(self.picks, dim=-1).indices
        index_TK[2::5, 0] = self.count if self.past else index_TK[2::5, 0]
        return experts, hidden_TE, index_TK, torch.rand(self.tokens, self.picks, device=DEVICE)


CASES = {
    "one row": Case(1, 8, 2, 64, 32),
    "odd sizes": Case(19, 5, 3, 72, 41),
    "two experts, one of which gets all": Case(150, 2, 1, 130, 24, crowded=True),
    "picks of none": Case(12, 3, 2, 40, 16, past=True),
    "many": Case(3, 128, 8, 40, 16),
    "transposed, with biases": Case(37, 4, 2, 96, 72, (("transposed", True), ("bias", True)), Clamped),
    "biases": Case(9, 3, 1, 24, 16, (("bias", True), ("act", "gelu"))),
    "without gates": Case(21, 6, 2, 24, 136, (("gate", False), ("act", "relu2"))),
}


@pytest.fixture(autouse=True)
def _memory_is_full_of_something() -> Iterator[None]:
    """What is not written is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The way of few picks is taken on a CPU too, but not with a copy there of what is on a GPU.

    Gives how many picks were placed, by call.
    """
    seen: list[int] = []
    place = experts_triton.place
    monkeypatch.setattr(grouped, "on_triton", lambda x: x.device.type == DEVICE.type)
    monkeypatch.setattr(experts_triton, "place", lambda index, count: seen.append(len(index)) or place(index, count))
    return seen


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [("odd sizes", LOW), ("transposed, with biases", LOW)],
)
def test_few_experts_are_those_of_a_loop_over_picks(name: str, dtype: torch.dtype, on_triton: list[int]) -> None:
    case = CASES[name]
    experts, *given = case.made(dtype)
    with torch.no_grad():
        found = grouped_experts(experts, *given)
        truth = one_by_one(experts, *given)
    assert on_triton == [case.tokens * case.picks]
    assert found.dtype == dtype
    assert (found - truth).norm() / truth.norm() < TOLERANCE[dtype]


def test_they_round_where_grouped_products_do(on_triton: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all but some numbers, in 16 bits, with biases too: what is left is in which order sums are taken."""
    for name in ("many", "transposed, with biases"):
        experts, *given = CASES[name].made(LOW)
        with torch.no_grad():
            found = grouped_experts(experts, *given)
            with monkeypatch.context() as patch:
                patch.setattr(grouped, "on_triton", lambda _: False)
                plain = grouped_experts(experts, *given)
        assert (found == plain).float().mean() > 0.95


@pytest.mark.parametrize("name", CASES)
def test_places_are_those_of_a_stable_sort(name: str) -> None:
    case = CASES[name]
    _, _, index_TK, _ = case.made(torch.float32)
    index_N = index_TK.reshape(-1)
    places = experts_triton.place(index_N, case.count)
    expert_N, order_N = torch.sort(index_N, stable=True)
    assert torch.equal(places.order_N.long(), order_N)
    covered = []
    for expert, begin, end in places.tile_S3.tolist():
        rows = range(begin, min(begin + places.rows, end))
        assert all(expert_N[row] == expert for row in rows)
        covered += rows
    assert int(places.tile_S3.max()) < 10 * (len(index_N) + places.rows), "all are written"
    assert sorted(covered) == list(range(int((index_N < case.count).sum())))
    if case.past:
        assert len(covered) < len(index_N)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_a_row_is_the_same_bits_whatever_is_beside_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours go to other experts, which moves it to another row of another tile."""
    # The interpreter multiplies by numpy, which adds in another order where it comes to a matrix's last columns.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None].astype(dtype) * b[None]).sum(1))
    case = CASES["odd sizes"]
    experts, hidden_TE, index_TK, weight_TK = case.made(dtype)
    others = torch.arange(case.tokens, device=DEVICE) % 3 > 0
    with torch.no_grad():
        found = grouped._few_experts(experts, hidden_TE, index_TK, weight_TK)
        hidden_TE[others], index_TK[others] = 7.0, (index_TK[others] + 2) % case.count
        again = grouped._few_experts(experts, hidden_TE, index_TK, weight_TK)
    assert torch.equal(found[~others], again[~others])
    assert not torch.equal(found[others], again[others])


def test_they_are_for_few_picks_without_gradients(on_triton: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["one row"]
    experts, *given = case.made(torch.float32)
    grouped_experts(experts, *given).sum().backward()
    with torch.no_grad():
        torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")(experts, *given)
        assert not on_triton
        for few, waits, taken in ((1, False, []), (2, False, [2]), (1, True, [2, 2])):
            monkeypatch.setattr(grouped, "FEW", few)
            monkeypatch.setattr(grouped, "_waits", lambda _, waits=waits: waits)
            grouped_experts(experts, *given)
            assert on_triton == taken


@pytest.mark.parametrize("wrong", [False, True])
def test_the_probe_proves_them(
    wrong: bool, on_triton: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = transformers.AutoModelForCausalLM.from_config(MIXTURES["qwen3_moe"]())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0 if parameter.ndim >= 2 else 1.0)
    if wrong:
        weighted = experts_triton.weighted
        monkeypatch.setattr(experts_triton, "weighted", lambda x, factor, *more: weighted(x, factor.flip(0), *more))
    model = prepare_module(module, tokenizer(), device=DEVICE.type)
    assert model.packed is not wrong
    assert on_triton
    assert ("packed sequences do not reproduce its own forward" in caplog.text) is wrong
    assert module.config._experts_implementation == ("grouped_mm" if wrong else IMPLEMENTATION)
