"""Tandem's grouped experts against a loop over tokens in float64, compiled or not, and what goes unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from helpers.engine_models import tokenizer
from helpers.targets import MIXTURES
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tandem.models.loading import prepare_module
from tandem.models.moe import experts as grouped
from tandem.models.moe.experts import IMPLEMENTATION, grouped_experts

TOKENS, EXPERTS, WIDTH, INNER = 37, 5, 24, 16
UNUSED = 3
KINDS = {
    "gated": (Qwen3MoeExperts, transformers.Qwen3MoeConfig, "num_experts", "moe_intermediate_size"),
    "transposed, with biases": (GptOssExperts, transformers.GptOssConfig, "num_local_experts", "intermediate_size"),
    "without gates": (NemotronHExperts, transformers.NemotronHConfig, "n_routed_experts", "moe_intermediate_size"),
}


def made(kind: str, dtype: torch.dtype) -> Any:
    part, config, count, inner = KINDS[kind]
    torch.manual_seed(0)
    experts = part(config(hidden_size=WIDTH, **{count: EXPERTS, inner: INNER}))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def given(picks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, what the routers say, and the gradient of the output. One expert is picked by nobody."""
    generator = torch.Generator().manual_seed(picks)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, UNUSED] = -1.0
    index_TK = scores.topk(picks, dim=-1).indices
    weight_TK = torch.rand(TOKENS, picks, generator=generator)
    hidden_TE, gradient_TE = torch.randn(2, TOKENS, WIDTH, generator=generator).to(dtype)
    return hidden_TE.requires_grad_(), index_TK, weight_TK.requires_grad_(), gradient_TE


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_past_the_last_expert_adds_nothing(kind: str) -> None:
    """Also where every pick is one: against the same picks of the first expert at a weight of 0."""
    experts = made(kind, torch.float32)
    for none in (torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(0)) < 0.4, torch.ones(TOKENS, 2).bool()):
        asked, zeros = given(2, torch.float32), given(2, torch.float32)
        found = results(experts, grouped_experts, (asked[0], asked[1].masked_fill(none, EXPERTS), *asked[2:]))
        experts.zero_grad()
        weight_TK = zeros[2].detach().masked_fill(none, 0.0).requires_grad_()
        without = (zeros[0], zeros[1].masked_fill(none, 0), weight_TK, zeros[3])
        expected = results(experts, grouped_experts, without)
        expected["weight"] = expected["weight"].masked_fill(none, 0.0)
        experts.zero_grad()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def one_by_one(experts: Any, hidden_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """In the dtype of the parameters, by vectors."""
    rows = []
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for x_E, index_K, weight_K in zip(hidden_TE, index_TK.tolist(), weight_TK, strict=True):
        row_E = torch.zeros_like(x_E)
        for number, weight in zip(index_K, weight_K, strict=True):
            x = x_E
            for name in (up, "down_proj"):
                matrix = getattr(experts, name)[number]
                x = x @ matrix if experts.is_transposed else matrix @ x
                if experts.has_bias:
                    x = x + getattr(experts, f"{name}_bias")[number]
                if name == up:
                    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
            row_E = row_E + weight * x
        rows.append(row_E)
    return torch.stack(rows)


def results(experts: Any, compute: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    hidden_TE, index_TK, weight_TK, gradient_TE = inputs
    out_TE = compute(experts, hidden_TE, index_TK, weight_TK)
    out_TE.backward(gradient_TE)
    of_parameters = {name: p.grad for name, p in experts.named_parameters()}
    return {"out": out_TE.detach(), "hidden": hidden_TE.grad, "weight": weight_TK.grad, **of_parameters}


@pytest.mark.parametrize(
    ("kind", "picks", "way"),
    [(kind, picks, way) for kind in KINDS for picks in (1, 3) for way in ("float32", "bfloat16")]
    + [("gated", 3, "compiled"), ("transposed, with biases", 3, "compiled")],
)
def test_output_and_gradients_are_those_of_a_loop_over_tokens(kind: str, picks: int, way: str) -> None:
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    experts, inputs = made(kind, dtype), given(picks, dtype)
    compute: Any = grouped_experts
    if way == "compiled":
        compute = torch.compile(grouped_experts, fullgraph=True, dynamic=True, backend="aot_eager")
    found = results(experts, compute, inputs)
    exact = made(kind, dtype).double()
    doubles = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = results(exact, one_by_one, tuple(doubles))
    for name, want in wanted.items():
        assert (found[name].dtype == torch.float32) is (dtype == torch.float32 or name == "weight")
        error = (found[name] - want).norm() / want.norm()
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), (name, error)
        assert want.abs().max() > 0.1
    for name, parameter in experts.named_parameters():
        assert not found[name][UNUSED].any()
        assert found[name].shape == parameter.shape


def test_gradients_are_the_same_bits_every_time() -> None:
    """With several threads, of enough numbers for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        experts = made("transposed, with biases", torch.float32)
        once, *again = (
            results(
                copy.deepcopy(experts),
                grouped_experts,
                tuple(x.detach().repeat(60, 1).requires_grad_(x.requires_grad) for x in given(3, torch.float32)),
            )
            for _ in range(4)
        )
    finally:
        torch.set_num_threads(threads)
    for other in again:
        assert all(torch.equal(found, once[name]) for name, found in other.items())


def test_it_takes_the_place_of_grouped_products_alone() -> None:
    for own, wanted in (("grouped_mm", IMPLEMENTATION), ("eager", "eager")):
        module = transformers.AutoModelForCausalLM.from_config(MIXTURES["qwen3_moe"]())
        module.set_experts_implementation(own)
        prepare_module(module, tokenizer())
        assert module.config._experts_implementation == wanted


@contextmanager
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(grouped, "_collect", lambda x, back, picks: x.unflatten(0, (-1, picks)).sum(dim=1))
        yield


def test_one_that_computes_something_else_is_found_by_the_probe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = transformers.AutoModelForCausalLM.from_config(MIXTURES["qwen3_moe"]())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0 if parameter.ndim >= 2 else 1.0)
    with wrong(monkeypatch):
        model = prepare_module(module, tokenizer())
    assert not model.packed
    assert "packed sequences do not reproduce its own forward" in caplog.text
    assert module.config._experts_implementation == "grouped_mm"
