"""The kernel by which routers choose experts, and which routers it is found to be the choice of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

pytest.importorskip("triton")

from tandem.kernels import choice, choice_triton
from tandem.kernels.choice import Rule, choose_torch
from tandem.models.moe import routers
from tandem.models.moe.routers import chooser_of, in_float32

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("experts", [16, 60])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(3),
        Rule(1, shared=True),
        Rule(4, "sigmoid", shared=True, eps=1e-2, scale=2.5),
        Rule(3, "sigmoid", groups=4, kept=2, best=2, shared=True),
        Rule(3, "softmax", groups=4, kept=1, best=1),
    ],
)
def test_the_kernel_chooses_as_plain_torch_does(rule: Rule, experts: int) -> None:
    torch.manual_seed(0)
    logit_TX = 3 * torch.randn(9, experts, device=DEVICE)
    for correction_X in (None, torch.randn(experts, device=DEVICE)):
        weight_TK, index_TK = choice_triton.choose(logit_TX, correction_X, rule)
        truth_TK, wanted_TK = choose_torch(logit_TX, correction_X, rule)
        assert torch.equal(index_TK, wanted_TK)
        torch.testing.assert_close(weight_TK, truth_TK, rtol=1e-5, atol=1e-8)


def test_no_number_is_an_expert_that_exists_all_the_same() -> None:
    logit_TX = torch.full((2, 6), float("nan"), device=DEVICE)
    weight_TK, index_TK = choice_triton.choose(logit_TX, None, Rule(3))
    assert weight_TK.isnan().all()
    assert ((index_TK >= 0) & (index_TK < 6)).all()


COMMON = {"hidden_size": 32, "num_experts_per_tok": 3}
GROUPED = COMMON | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
KINDS: dict[str, tuple[Any, Any, Rule | None]] = {
    "qwen3-moe": (
        Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig(**COMMON, num_experts=8, norm_topk_prob=True),
        Rule(3, shared=True),
    ),
    "qwen3-moe, not normed": (
        Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig(**COMMON, num_experts=8, norm_topk_prob=False), Rule(3),
    ),
    "gpt-oss": (
        GptOssTopKRouter, transformers.GptOssConfig(**COMMON, num_local_experts=8), Rule(3, shared=True),
    ),
    "granite": (
        GraniteMoeTopKRouter, transformers.GraniteMoeConfig(**COMMON, num_local_experts=8),
        Rule(3, shared=True),
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter, transformers.DeepseekV3Config(**GROUPED, n_routed_experts=16),
        Rule(3, "sigmoid", 4, 2, 2, True, scale=2.5),
    ),
    "deepseek-v2": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config(**GROUPED, n_routed_experts=16, topk_method="group_limited_greedy"),
        Rule(3, "softmax", 4, 2, 1, scale=2.5),
    ),
    "lfm2": (
        Lfm2MoeTopKRouter, transformers.Lfm2MoeConfig(**COMMON, num_experts=8, use_expert_bias=True),
        Rule(3, "sigmoid", shared=True, eps=1e-6),
    ),
    "minimax-m2": (
        MiniMaxM2TopKRouter, transformers.MiniMaxM2Config(**COMMON, num_local_experts=8),
        Rule(3, "sigmoid", shared=True),
    ),
    "ernie, whose correction is another module's": (
        Ernie4_5_MoeTopKRouter, transformers.Ernie4_5_MoeConfig(hidden_size=32, moe_num_experts=8, moe_k=3), None,
    ),
}  # fmt: skip


def given(router: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tensors at random in the router too, what goes into it, and what it is given beside."""
    torch.manual_seed(1)
    for tensor in (*router.parameters(), *router.buffers()):
        nn.init.normal_(tensor)
    takes_more = isinstance(router, Lfm2MoeTopKRouter | MiniMaxM2TopKRouter)
    return torch.randn(7, 32, device=DEVICE), (torch.randn(8, device=DEVICE),) if takes_more else ()


@pytest.mark.parametrize("name", KINDS)
def test_routers_are_the_choosers_that_they_are_found_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, rule = KINDS[name]
    router = kind(config).to(DEVICE).bfloat16()
    x_TE, others = given(router)
    x_TE = x_TE.bfloat16()
    in_float32(router)
    monkeypatch.setattr(routers, "on_triton", lambda _: False)
    with torch.no_grad():
        plain = router(x_TE, *others)
        assert not hasattr(router, "chooser")
        monkeypatch.setattr(routers, "on_triton", lambda _: True)
        monkeypatch.setattr(choice, "on_triton", lambda _: True)
        found = router(x_TE, *others)
        assert (router.chooser and router.chooser.rule) == rule
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype
    places = [next(n for n, x in enumerate(plain) if x.dtype == torch.int64)]
    places.append(next(n for n, x in enumerate(plain) if x.shape == plain[places[0]].shape and n not in places))
    (one, its), (other, own) = ([made[n] for n in places] for made in (found, plain))
    logits = plain[3 - sum(places)]
    found_TX, plain_TX = (torch.zeros_like(logits).scatter(-1, i, w.float()) for i, w in ((one, its), (other, own)))
    torch.testing.assert_close(found_TX, plain_TX, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[3 - sum(places)], logits, rtol=1e-5, atol=1e-5)


def test_a_router_that_does_more_is_left_alone() -> None:
    """One that squares its weights, one that chooses by another sum, and one whose kernel is wrong."""

    class Squared(Qwen3MoeTopKRouter):
        def forward(self, x: Tensor) -> Any:
            logits, weights, indices = Qwen3MoeTopKRouter.forward(self, x)
            return logits, weights**2, indices

    class Shifted(DeepseekV3TopkRouter):
        def forward(self, x: Tensor) -> Any:
            logits, weights, indices = DeepseekV3TopkRouter.forward(self, x)
            return logits, weights * (1 + self.e_score_correction_bias[indices]), indices

    for kind, like in ((Squared, "qwen3-moe"), (Shifted, "deepseek-v3")):
        assert chooser_of(kind(KINDS[like][1]).to(DEVICE), kind) is None


def test_a_kernel_that_chooses_otherwise_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, _ = KINDS["qwen3-moe"]
    monkeypatch.setattr(routers, "choose", lambda *given: tuple(x.flip(0) for x in choose_torch(*given)))
    assert chooser_of(kind(config).to(DEVICE), kind) is None
