"""The cheap half of ``bench/matrix.py``: models on sequences beyond their limits, against one at a time in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.engine_models import tokenizer

from tandem.batch import Asks
from tandem.data.packing import pack
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.models.attention import IMPLEMENTATION, UnsupportedAttention, no_mask, packed_layout
from tandem.models.forward import forward
from tandem.models.loading import prepare_module
from tandem.models.proof.limits import limits_of, turning_point
from tandem.models.proof.shrunk import VOCABULARY, furthest_limit, named_limits, shrunk, shrunken_config, trained_size
from tandem.types import Request, SamplingParams, Sequence

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import matrix

WAYS = {
    "llama": ("packed", "slots"),
    "qwen2-window": ("packed", "slots"),
    "qwen2_moe-window": ("padded", "padded"),
    "phimoe-window": ("padded", "padded"),
    "phi3-longrope": ("packed", "slots"),
    "llama-dynamic": ("packed", "slots"),
    "llama-yarn": ("packed", "slots"),
    "ministral3": ("packed", "slots"),
    "llama4_text-initial": ("padded", "padded, one length"),
    "lfm2_moe-initial": ("packed", "slots"),
    "recurrent_gemma": ("packed", "slots"),
    "rwkv": ("packed", "slots"),
    "minimax": ("padded", "padded, one length"),
    "deepseek_v32": ("padded", "padded"),
    "minimax_m3_vl_text-sparse": ("padded", "padded, one length"),
    "mamba2": ("packed", "slots"),
    "olmo_hybrid": ("packed", "slots"),
    "gpt_neo": ("padded", "padded"),
    "cohere2": ("packed", "slots"),
}
"""How each is run. What is slower than it could be is seen here as well."""


@pytest.mark.parametrize("name", WAYS)
def test_what_is_computed_is_what_one_sequence_at_a_time_gives(name: str) -> None:
    row = matrix.look(name, matrix.cases()[name], tokenizer())
    assert not row.refused
    assert row.holds, row
    assert (row.layout, row.engine) == WAYS[name]


@pytest.mark.parametrize("name", ["mistral", "phi3-longrope", "ministral3", "nanochat", "llama4_text"])
def test_the_captured_way_is_proved_beyond_the_limits(name: str) -> None:
    """Ministral 3's queries are scaled by their position, NanoChat's normed after they are turned, by norms without a
    weight; Llama 4's chunked attention needs what pages lack."""
    row = matrix.look(name, matrix.cases()[name], tokenizer(), "captured")
    expected = {"llama4_text": "", "nanochat": "captured, own forward"}.get(name, "captured, fused")
    assert row.engine == expected
    assert bool(row.refused) == (not expected)
    assert row.holds, row


def test_a_model_that_its_own_cache_does_not_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = matrix.make(matrix.Case("llama"))
    own = type(module).forward

    def forgetful(self: Any, *args: Any, **options: Any) -> Any:
        out = own(self, *args, **options)
        if out.logits.shape[1] == 1:
            out.logits = out.logits.roll(1, -1)
        return out

    monkeypatch.setattr(type(module), "forward", forgetful)
    monkeypatch.setattr(type(module), "_supports_attention_backend", False)
    with pytest.raises(UserError, match="cannot be sampled: its own generate with a cache does not reproduce"):
        LiveEngine(module, tokenizer())


def test_an_encoder_is_refused() -> None:
    row = matrix.look("bert", matrix.cases()["bert"], tokenizer())
    assert "depends on the tokens after it" in row.refused


@pytest.mark.parametrize("keyword", ["indices", "position_bias", "something_new"])
def test_a_keyword_of_attention_that_is_not_known_is_refused(keyword: str) -> None:
    attend = transformers.AttentionInterface()[IMPLEMENTATION]
    x = torch.zeros(1, 2, 3, 8)
    layout = packed_layout(torch.tensor([0, 3]), torch.device("cpu"), torch.float32)
    options: dict[str, Any] = {"layout": layout, "position_ids": torch.arange(3), "use_cache": False}
    attend(torch.nn.Module(), x, x, x, no_mask(torch.device("cpu")), **options)
    attend(torch.nn.Module(), x, x, x, no_mask(torch.device("cpu")), **options, **{keyword: None})
    with pytest.raises(UnsupportedAttention, match=keyword):
        attend(torch.nn.Module(), x, x, x, no_mask(torch.device("cpu")), **options, **{keyword: torch.zeros(1)})
    with pytest.raises(UnsupportedAttention, match="a mask of its own"):
        attend(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 3, 3), **options)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_that_adds_up_in_float32_trains_and_samples_in_bfloat16(kind: str) -> None:
    module = matrix.make(matrix.Case(kind))
    trained_size(module)
    rows = pack([Sequence(token_ids=[5, 6, 7, 8] * 5, trainable=[False] + [True] * 19)])
    model = prepare_module(module, tokenizer(), dtype="bfloat16")
    exact = forward(model, rows).logp_T
    model.compute_in(torch.bfloat16)
    logp_T = forward(model, rows).logp_T
    assert logp_T is not None
    assert exact is not None
    logp_T.sum().backward()
    # 8 bits of logits of about 8, two layers.
    assert 0 < (logp_T - exact).abs().mean() < 0.2
    assert module.get_input_embeddings().weight.grad.isfinite().all()
    # As on a GPU.
    asked = Request(prompt_ids=(5, 6, 7), seeds=(0,), sampling=SamplingParams(max_new_tokens=4))
    ((drawn,),) = LiveEngine(module, tokenizer(), way="captured").generate([asked])
    found = forward(model, pack([Sequence.read([5, 6, 7, *drawn.token_ids])])).logp_T
    assert found is not None
    # Two ways to logits of about 8, whose last place is 0.03 to 0.06: up to 0.06 over 24 draws.
    assert drawn.behaviour_logp == pytest.approx(found[3:].tolist(), abs=0.1)


@pytest.mark.parametrize("kind", ["minimax", "xlstm"])
def test_a_model_that_does_not_compute_in_bfloat16_is_refused(kind: str) -> None:
    module = matrix.make(matrix.CASES[kind])
    with pytest.raises(UserError, match=r"does not compute in bfloat16 .*dtype float32"):
        prepare_module(module, tokenizer(), dtype="bfloat16")


def test_longrope_is_sampled_up_to_where_it_turns() -> None:
    module = matrix.make(matrix.CASES["phi3-longrope"])
    assert turning_point(module.config) == matrix.LIMIT
    assert (limits_of(module.config).positions, limits_of(module.config).sampling.positions) == (256, 40)
    model = prepare_module(module, tokenizer())
    live = LiveEngine(module, tokenizer())
    asked = Request(prompt_ids=(5,) * 30, seeds=(0,), sampling=SamplingParams(max_new_tokens=11))
    with pytest.raises(UserError, match=r"longrope .*original_max_position_embeddings.* of 40"):
        live.generate([asked])
    # Ranks whose parameters are sharded go through the layers together, equally often.
    model.sharded = model  # type: ignore[assignment]
    rows = [Sequence(token_ids=[5] * n, trainable=[True] * n) for n in (30, 50)]
    from tandem.models.forward import _run

    with pytest.raises(UserError, match="30 and 50 tokens do not go through it together"):
        _run(model, module, pack(rows), "logits", Asks())
    model.sharded = None
    # Where they are not, each is what it is alone: up to the turn, and from one token beyond it.
    rows = [Sequence.read([2 + (i * i + n) % 29 for i in range(n)]) for n in (50, 40, 30, 41)]
    found, alone = forward(model, pack(rows)).logp_T, [forward(model, pack([row])).logp_T for row in rows]
    assert found is not None
    torch.testing.assert_close(found, torch.cat([one for one in alone if one is not None]), rtol=0, atol=2e-5)


def test_limits_that_no_sequence_reaches_are_none() -> None:
    config = transformers.MistralConfig(max_position_embeddings=4096, sliding_window=4096)
    assert named_limits(config) == []
    config.max_position_embeddings = 8192
    assert named_limits(config) == ["sliding_window"]
    config = transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096)
    assert named_limits(config) == []


def test_what_a_probe_of_an_engine_goes_past() -> None:
    config = transformers.Cohere2Config(max_position_embeddings=8192, sliding_window=4096)
    assert furthest_limit(config, None, by=33) == 4096
    assert furthest_limit(config, 4129, by=33) == 4096
    assert furthest_limit(config, 4128, by=33) == 0
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
    config = transformers.Ministral3Config(max_position_embeddings=262144, rope_parameters=rope, sliding_window=None)
    assert furthest_limit(config, None, by=33) == 0
    config.rope_parameters = rope | {"llama_4_scaling_beta": 0.1}
    assert furthest_limit(config, None, by=33) == 16384


def test_a_shrunken_copys_attention_is_given_what_the_models_is() -> None:
    """Zamba 2's gets a token's embedding beside it, and is twice as wide as the model: in the copy as well."""
    kind = transformers.Zamba2ForCausalLM
    large = kind.__new__(kind)
    object.__setattr__(large, "config", transformers.Zamba2Config())
    small = shrunk(large)
    assert (small.config.hidden_size, small.config.attention_hidden_size) == (64, 128)


def test_a_shrunken_copy_is_small_the_same_and_leaves_torchs_numbers_alone() -> None:
    class Large:
        """A model of 7B that is never made."""

        config = transformers.Gemma3TextConfig(hidden_size=3840, num_hidden_layers=48, sliding_window=1024)

    kind = transformers.Gemma3ForCausalLM
    large = kind.__new__(kind)
    object.__setattr__(large, "config", Large.config)
    state = torch.get_rng_state()
    first, again = shrunk(large), shrunk(large)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.get_input_embeddings().weight.shape == (VOCABULARY, 64)
    assert set(first.config.layer_types) == {"sliding_attention", "full_attention"}
    assert first.config.sliding_window == 8
    assert Large.config.sliding_window == 1024
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 7
    config = transformers.Gemma4TextConfig(num_hidden_layers=35, layer_types=kinds, num_kv_shared_layers=20)
    copied = shrunken_config(config)
    assert (copied.num_hidden_layers, copied.num_kv_shared_layers) == (10, 5), "also layers that are given keys"
