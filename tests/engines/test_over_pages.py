"""Continuous batching over pages: sharing, running out, moving rows and stopping late change no sample."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.drawing import Rounded, drawn, gap, mixed_requests
from helpers.engine_models import EOS, VOCABULARY, bytes_tokenizer, model, tokenizer
from helpers.family_models import FAMILIES, family_model
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tandem.engines.live.decoder import Decoder, Landing
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.over_pages import bucket
from tandem.engines.live.pages import PAGE
from tandem.engines.live.probe import Trial, find_cache_shape
from tandem.engines.live.sample import Sample
from tandem.errors import UserError
from tandem.kernels import products
from tandem.models.attention import IMPLEMENTATION, PackedLayout
from tandem.types import Request, SamplingParams


def live(module: Any, **options: Any) -> LiveEngine:
    return LiveEngine(module, tokenizer(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_slots": 1},
        {"max_slots": 3, "prefill_tokens": 1},
        {"max_slots": 19, "prefill_tokens": 70},
        # Room for a few samples only: the rest wait, and those that came last give way.
        {"max_slots": 8, "cache_tokens": 6 * PAGE},
        {"max_slots": 16, "cache_tokens": 9 * PAGE},
    ],
)
def test_rows_pages_and_memory_change_no_sample(options: dict[str, int]) -> None:
    module = model("qwen2", eos=EOS)
    asked = mixed_requests(14)
    truth = live(module, way="slots").generate(asked)
    engine = live(module, way="captured", **options)
    for _ in range(2):
        found = engine.generate(asked)
        assert drawn(found) == drawn(truth)
        for a, b in zip(truth, found, strict=True):
            for one, other in zip(a, b, strict=True):
                torch.testing.assert_close(
                    torch.tensor(one.untruncated_logp), torch.tensor(other.untruncated_logp), atol=1e-4, rtol=0
                )


def test_samples_give_way_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six samples of five pages each, in eleven pages."""
    from tandem.engines.live.over_pages import PagedBatching

    gone: list[int] = []
    right = PagedBatching._preempt

    def counted(self: PagedBatching) -> None:
        gone.append(len(self.running))
        right(self)

    monkeypatch.setattr(PagedBatching, "_preempt", counted)
    module = model("llama")
    module.config.max_position_embeddings = 512
    long = SamplingParams(max_new_tokens=300, temperature=0)
    asked = [Request(prompt_ids=(5, 6, i + 2), seeds=(i,), sampling=long) for i in range(6)]
    truth = live(module, way="slots").generate(asked)
    engine = live(module, way="captured", cache_tokens=12 * PAGE)
    assert drawn(engine.generate(asked)) == drawn(truth)
    assert gone
    assert engine.fitting is not None
    assert engine.fitting.decoder is not None
    pool = engine.fitting.decoder.pool
    assert pool.available == pool.pages - 1, "every page is given back"
    assert not pool.holders.any()


def test_rows_that_move_down_take_their_parameters_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of three temperatures that end when they like: what is left of them decodes in fewer rows."""
    moved: list[tuple[int, int]] = []
    move = Decoder.move

    def watched(self: Decoder, sources: list[int], targets: list[int]) -> None:
        moved.extend(zip(sources, targets, strict=True))
        move(self, sources, targets)

    monkeypatch.setattr(Decoder, "move", watched)
    module = model("qwen2", eos=EOS)
    kinds = [SamplingParams(max_new_tokens=100, temperature=t, top_k=k) for t, k in ((0.7, 0), (1.5, 0), (1.0, 5))]
    asked = [Request(prompt_ids=(5, 6, 2 + i), seeds=(i,), sampling=kinds[i % 3]) for i in range(16)]
    truth = live(module, way="slots").generate(asked)
    assert drawn(live(module, way="captured").generate(asked)) == drawn(truth)
    assert any(source % 3 != target % 3 for source, target in moved), "into the place of one of another kind"


def test_texts_decoded_while_the_device_is_busy_are_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model("qwen2")
    tok = bytes_tokenizer()
    asked = [
        Request(prompt_ids=(5, 6, i + 2), seeds=(i,), sampling=SamplingParams(max_new_tokens=90)) for i in range(4)
    ]
    ahead: list[int] = []
    decode_ahead = Sample.decode_ahead
    monkeypatch.setattr(Sample, "decode_ahead", lambda self: (decode_ahead(self), ahead.append(self.decoded)))
    # A CPU has computed everything when it is asked.
    monkeypatch.setattr(Landing, "landed", False)
    for (completion,) in LiveEngine(module, tok, way="captured").generate(asked):
        assert completion.text == tok.decode(completion.token_ids)
    assert max(ahead) > 45


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox", "gemma4-e"])
def test_eight_bits_round_keys_and_values_and_nothing_else(architecture: str) -> None:
    module = family_model(architecture) if architecture in FAMILIES else model(architecture)
    sampling = SamplingParams(max_new_tokens=70)
    asked = [Request(prompt_ids=(4, 5, 6 + i), seeds=(1, 2), sampling=sampling) for i in range(4)]
    engine = live(module, way="captured", kv_cache_dtype="fp8")
    pairs = [(r, c) for r, cs in zip(asked, engine.generate(asked), strict=True) for c in cs]
    to_exact = torch.cat([gap(module, request, completion, PackedLayout) for request, completion in pairs])
    to_rounded = torch.cat([gap(module, request, completion, Rounded) for request, completion in pairs])
    # A key next to an edge may be rounded to its other side: few are.
    assert to_rounded.median() < 1e-5
    assert to_rounded.mean() < to_exact.mean() / 20
    assert engine.fitting is not None
    shape = engine.fitting.shape
    numbers, heads = sum(heads * size for heads, size in shape.kept), sum(heads for heads, _ in shape.kept)
    assert shape.page_bytes / replace(shape, eight_bit=False).page_bytes == (numbers + 4 * heads) / (4 * numbers)


def test_layers_keep_keys_and_values_of_their_own_shapes_and_share_them() -> None:
    """Of Gemma 4 E2B two layers have their own, and two are given theirs. Where others did the proof would tell."""
    shape = find_cache_shape(family_model("gemma4-e"))
    assert (shape.kept, shape.layers) == (((1, 8), (1, 16)), (0, 1, 0, 1))
    module = family_model("qwen3")
    shape = find_cache_shape(module)
    shared = replace(shape, kept=shape.kept[:1], layers=(0, 0))
    assert "does not reproduce" in Trial(module).why_not_pages(OwnForward(module), shared)


def test_eight_bits_are_refused_where_there_are_no_pages() -> None:
    with pytest.raises(UserError, match=r"kv_cache_dtype fp8 is of the paged cache, and .* by way slots; take"):
        live(model("qwen2"), kv_cache_dtype="fp8")


def test_a_cache_too_small_for_one_sample_says_how_much_it_needs() -> None:
    engine = live(model("qwen2"), way="captured", cache_tokens=2 * PAGE)
    asked = [Request(prompt_ids=(5,), seeds=(0,), sampling=SamplingParams(max_new_tokens=100))]
    with pytest.raises(UserError, match=f"room for {2 * PAGE} tokens and one sample may need {2 * PAGE}"):
        engine.generate(asked)


def test_an_error_while_sampling_leaves_an_engine_that_works(monkeypatch) -> None:
    engine = live(model("qwen2", eos=EOS), way="captured", max_slots=4)
    asked = mixed_requests()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "completion", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            engine.generate(asked)
    assert drawn(engine.generate(asked)) == drawn(live(engine.module, way="slots").generate(asked))


def test_the_lean_forward_is_used_where_it_is_right_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    qwen3, gemma = Qwen3ForCausalLM(Qwen3Config(**size)), GemmaForCausalLM(GemmaConfig(**size))
    for module in (qwen3, gemma):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.2, 0.9)  # so that a norm that is left out is seen
        module.eval().set_attn_implementation(IMPLEMENTATION)
    sinful = model("llama")
    # A thing that nobody knows of: it does nothing yet, and what it will do is unknown.
    sinful.model.layers[1].gain = torch.nn.Parameter(torch.zeros(()))
    odd = model("llama")
    odd.model.layers[1].mlp.act_fn.register_forward_hook(lambda _, __, out: out * 1.01)
    reasons = []
    for module in (model("qwen2"), model("mistral"), qwen3, gemma, model("gpt_neox"), odd, sinful):
        engine = live(module, way="captured")
        assert engine.fitting is not None
        reasons.append(engine.slower_because)
        asked = [Request(prompt_ids=(4, 5, 6), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=70))]
        assert drawn(engine.generate(asked)) == drawn(live(module, way="slots").generate(asked))
    assert reasons == ["", "", "", "", "", "", "it has gain of unknown use"]
    # A CPU waits for no device: this only a GPU would say.
    monkeypatch.setattr(Trial, "why_not_captured", lambda *_: "layer 1 waits for the host")
    with pytest.raises(UserError, match=r"layer 1 waits for the host, nor has it .* \(it has gain of unknown use\)"):
        live(sinful, way="captured")


def test_the_lean_forward_takes_linears_that_multiply_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_held_back", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    module = model("qwen2")
    asked = [Request(prompt_ids=(4, 5, 6), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=70))]
    truth = live(module, way="slots").generate(asked)
    products.speed_up_linears(module)
    assert type(module.model.layers[0].mlp.up_proj) is products.Linear
    engine = live(module, way="captured")
    assert engine.fitting is not None
    assert not engine.fitting.own_because
    assert drawn(engine.generate(asked)) == drawn(truth)


def test_stacked_parameters_stay_the_modules_own() -> None:
    module = model("qwen2", eos=EOS)
    names = [name for name, _ in module.named_parameters()]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine = live(module, way="captured")
    assert [name for name, _ in module.named_parameters()] == names
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    attention = module.model.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() == attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    asked = [Request(prompt_ids=(4, 5, 6), seeds=(1,), sampling=SamplingParams(max_new_tokens=9))]
    engine.generate(asked)
    with torch.no_grad():
        attention.k_proj.weight.mul_(-1)
        # Taken out of its place, as a cast or a load may do.
        attention.v_proj.weight.data = attention.v_proj.weight.data * 2
    assert drawn(engine.generate(asked)) == drawn(live(module, way="slots").generate(asked))


def test_few_graphs_serve_all_numbers_of_rows() -> None:
    sizes = {bucket(rows, 1000) for rows in range(1, 1001)}
    assert len(sizes) <= 24
    assert all(rows <= bucket(rows, 1000) <= 1000 for rows in range(1, 1001))
    assert all(bucket(rows, 1000) <= 1.4 * rows + 9 for rows in range(1, 1001))


def test_a_cache_that_is_given_back_is_gone_at_once() -> None:
    """Without a garbage collection: it may be most of a device's memory."""
    engine = live(model("qwen2", eos=EOS), way="captured")
    engine.generate(mixed_requests())
    assert engine.fitting is not None
    assert engine.fitting.decoder is not None
    gone = weakref.ref(engine.fitting.decoder.pool)
    gc.disable()
    try:
        engine.fitting.release()
        assert gone() is None
    finally:
        gc.enable()
