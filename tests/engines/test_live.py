"""The live engine against transformers' generate, against a plain forward, and against itself in other batches."""

from __future__ import annotations

import copy
import gc
import logging
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from helpers.engine_models import EOS, VOCABULARY, model, tokenizer
from helpers.family_models import families
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tandem.engines.live import probe
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.forwards import LeanForward
from tandem.engines.live.layers import Experts
from tandem.engines.live.probe import Trial, _page_logits, find_cache_shape, head_shape_of
from tandem.errors import UserError
from tandem.kernels import products
from tandem.models.loading import prepare_module
from tandem.models.proof.probe import LOW_PRECISION_TOLERANCE, gap_of
from tandem.models.proof.shrunk import shrunk, shrunken_config, trained_size
from tandem.roles import Engine
from tandem.types import Request, SamplingParams

SLOTS = ["qwen2", "qwen2-window", "llama", "gpt_neox", "mistral"]
WAYS = [(name, way) for name in SLOTS for way in ("slots", "captured")] + [("bloom", "auto")]
"""On a CPU the captured way runs its steps one by one; all else is the same, but for kernels (tests/kernels)."""


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 14))) for _ in range(count)]


def engine(module: Any, **options: Any) -> LiveEngine:
    return LiveEngine(module, tokenizer(), **options)


def requests(count: int, samples: int, sampling: SamplingParams, seed: int = 0) -> list[Request]:
    return [
        Request(prompt_ids=p, seeds=tuple(1000 * i + j for j in range(samples)), sampling=sampling)
        for i, p in enumerate(prompts(count, seed))
    ]


def plain_logp(module: Any, prompt: tuple[int, ...], completion: list[int], temperature: float) -> torch.Tensor:
    """What a trainer computes: one forward of the whole sequence, no cache, no padding."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp[torch.arange(len(completion)), torch.tensor(completion)]


@pytest.mark.parametrize(("architecture", "way"), WAYS)
def test_greedy_is_generates_token_for_token(architecture: str, way: str) -> None:
    module = model(architecture, eos=EOS)
    asked = requests(9, 1, SamplingParams(max_new_tokens=24, temperature=0))
    live = engine(module, max_slots=4, prefill_tokens=20, way=way)
    assert live.way == ("padded" if architecture == "bloom" else way)
    assert ("padded batches (slower)" in live.slower_because) == (architecture == "bloom")
    for request, (completion,) in zip(asked, live.generate(asked), strict=True):
        ids = torch.tensor([request.prompt_ids])
        truth = module.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
        assert completion.token_ids == truth[0, ids.shape[1] :].tolist()
        assert completion.stop == ("eos" if completion.token_ids[-1] == EOS else "length")
        assert completion.behaviour_logp == [0.0] * len(completion.token_ids)


@pytest.mark.parametrize(("architecture", "way"), WAYS)
def test_log_probs_are_those_of_a_plain_forward(architecture: str, way: str) -> None:
    module = model(architecture, eos=EOS)
    sampling = SamplingParams(max_new_tokens=30, temperature=0.7)
    asked = requests(5, 3, sampling)
    for request, completions in zip(asked, engine(module, max_slots=7, way=way).generate(asked), strict=True):
        for completion in completions:
            truth = plain_logp(module, request.prompt_ids, completion.token_ids, 0.7)
            # float32 forwards in another order of summation: the promise of the design is 1e-4.
            torch.testing.assert_close(
                torch.tensor(completion.untruncated_logp, dtype=torch.float64), truth, atol=1e-4, rtol=0
            )
            assert completion.behaviour_logp == completion.untruncated_logp


@pytest.mark.parametrize(
    ("architecture", "way"),
    [("qwen2", "slots"), ("qwen2", "captured"), ("mistral", "slots"), ("mistral", "captured"), ("bloom", "auto")],
)
def test_a_sample_does_not_depend_on_its_neighbours(architecture: str, way: str) -> None:
    module = model(architecture, eos=EOS)
    kinds = [
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=7, temperature=1.3, top_k=20),
        SamplingParams(max_new_tokens=13, temperature=0.8, top_p=0.9, stop=("e",)),
        SamplingParams(max_new_tokens=9, temperature=0),
        SamplingParams(max_new_tokens=25, min_p=0.05, stop_token_ids=(40, 41)),
    ]
    asked = [
        Request(prompt_ids=p, seeds=(3 * i, 2**62 - i, 500 + 7 * i), sampling=kinds[i % len(kinds)])
        for i, p in enumerate(prompts(10))
    ]
    whole = engine(module, way=way).generate(asked)
    tokens = {(i, j): c.token_ids for i, cs in enumerate(whole) for j, c in enumerate(cs)}
    assert len({tuple(t) for t in tokens.values()}) > 20  # not all the same thing

    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    shuffled = engine(module, max_slots=4, prefill_tokens=16, way=way).generate([asked[i] for i in order])
    assert all(tokens[i, j] == c.token_ids for i, cs in zip(order, shuffled, strict=True) for j, c in enumerate(cs))

    one_slot = engine(module, max_slots=1, way=way)
    for i in (0, 3, 6):
        for j, seed in enumerate(asked[i].seeds):
            alone = Request(prompt_ids=asked[i].prompt_ids, seeds=(seed,), sampling=asked[i].sampling)
            assert one_slot.generate([alone])[0][0].token_ids == tokens[i, j]


def test_all_ways_draw_the_same() -> None:
    module = model("qwen2", eos=EOS)
    module.generation_config.repetition_penalty = 1.5  # belongs to the user's generate, not to ours
    asked = requests(6, 2, SamplingParams(max_new_tokens=15, top_k=30))
    slots, *others = (engine(module, max_slots=5, way=way).generate(asked) for way in ("slots", "captured", "padded"))
    for other in others:
        for a, b in zip(slots, other, strict=True):
            assert [(c.token_ids, c.stop, c.text) for c in a] == [(c.token_ids, c.stop, c.text) for c in b]
    assert module.generation_config.repetition_penalty == 1.5


@pytest.mark.parametrize("way", ["slots", "captured"])
def test_it_sees_an_optimizer_step_and_leaves_the_module_as_it_was(way: str) -> None:
    module = model("qwen2").train()
    module.model.layers[0].eval()
    modes = [m.training for m in module.modules()]
    version = 0
    live = engine(module, version=lambda: version, way=way)
    asked = requests(2, 1, SamplingParams(max_new_tokens=12, temperature=0))
    before = live.generate(asked)
    assert [m.training for m in module.modules()] == modes
    assert (before[0][0].version_min, before[0][0].version_max) == (0, 0)
    version = 1
    with torch.no_grad():
        module.lm_head.weight.copy_(model("qwen2", seed=5).lm_head.weight)
    after = live.generate(asked)
    assert [c[0].token_ids for c in before] != [c[0].token_ids for c in after]
    assert (after[0][0].version_min, after[0][0].version_max) == (1, 1)
    truth = module.eval().generate(torch.tensor([asked[0].prompt_ids]), max_new_tokens=12, do_sample=False)
    assert after[0][0].token_ids == truth[0, len(asked[0].prompt_ids) :].tolist()
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize("options", [{"max_slots": 3}, {"max_slots": 5, "prefill_tokens": 1}, {}])
def test_a_prompt_is_prefilled_once_and_order_is_kept(options: dict[str, int]) -> None:
    module = model("llama", eos=EOS)
    asked = requests(4, 6, SamplingParams(max_new_tokens=10))
    live = engine(module, **options)
    prefilled: list[int] = []
    widths: list[int] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        rows, width = kwargs["input_ids"].shape
        if type(kwargs["layout"]).__name__ == "PrefillLayout":
            prefilled.append(width)
        else:
            widths.append(rows)

    handle = module.register_forward_pre_hook(watch, with_kwargs=True)
    result = live.generate(asked)
    handle.remove()
    assert sum(prefilled) == sum(len(r.prompt_ids) for r in asked)
    assert max(widths) <= options.get("max_slots", 24)
    assert [len(cs) for cs in result] == [6] * 4
    # A slot never stands empty while a sample waits.
    if options.get("max_slots") == 3:
        assert widths[: len(widths) // 2] == [3] * (len(widths) // 2)


@pytest.mark.parametrize("way", ["slots", "captured"])
def test_bfloat16_parameters_stay_close_to_their_own_forward(way: str) -> None:
    module = copy.deepcopy(model("qwen2"))
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    asked = requests(3, 2, SamplingParams(max_new_tokens=16))
    results = engine(module, way=way).generate(asked)
    for request, completions in zip(asked, results, strict=True):
        for completion in completions:
            truth = plain_logp(module, request.prompt_ids, completion.token_ids, 1.0)
            # bfloat16 keeps 8 bits: logits of about 10 are good to some hundredths.
            found = torch.tensor(completion.untruncated_logp, dtype=torch.float64)
            assert (found - truth).abs().max() < 0.25
            assert (found - truth).abs().mean() < 0.05


@pytest.mark.parametrize(("kind", "low"), [("mixtral", True), ("mixtral", False), ("qwen2", True)])
def test_one_row_of_other_experts_is_no_fault_in_16_bits(kind: str, low: bool) -> None:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(shrunken_config(CONFIG_MAPPING[kind]())).eval()
    for parameter in module.parameters() if low else ():
        parameter.data = parameter.data.bfloat16()
    trial = Trial(module)
    truths = list(trial.truth.value_TD.split(len(trial.truth.value_TD) // 2))
    assert trial._compare(lambda: truths) == ""
    one = [truths[0], torch.cat((truths[1][:-1], -truths[1][-1:]))]
    forgiven = kind == "mixtral" and low
    assert (trial._compare(lambda: one) == "") is forgiven
    # What is wrong with the cache is wrong with each token that is decoded: all but the prompts' last.
    decoded = [torch.cat((truth[:1], -truth[1:])) for truth in truths]
    lost = [torch.cat((truth[:1], truth[1:] * float("nan"))) for truth in truths]
    for wrong in (decoded, lost):
        assert "does not reproduce" in trial._compare(lambda wrong=wrong: wrong)


def rounding_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products round as if their sums had another order, as a GPU's have: one in 6 numbers is a unit further."""
    own, generator = products.linear, torch.Generator().manual_seed(1)

    def moved(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out = own(x, *weights)
        share = 0.8 * (torch.rand(out.shape, generator=generator) - 0.5)
        return (out.float() * (1 + torch.finfo(out.dtype).eps * share)).to(out.dtype)

    monkeypatch.setattr(products, "linear", moved)


@torch.no_grad()
def test_experts_that_rounding_swaps_are_no_fault_of_the_fused_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is wrong is still found: in what experts give, in how they are picked, and in a single row."""
    module = families.NAMES["gemma4-moe"].module(families.TINY | {"num_hidden_layers": 8, "vocab_size": 512})
    trained_size(module)
    prepare_module(module, tokenizer()).compute_in(torch.bfloat16)
    trial, shape = Trial(module, beside=True), find_cache_shape(module)
    lean = LeanForward(module, positions=128, head_shape=head_shape_of(module))
    rounding_otherwise(monkeypatch)
    found = [torch.cat(_page_logits(lean, shape, trial)) for _ in range(3)]
    assert max(gap_of(one, trial.truth.value_TD) for one in found) > LOW_PRECISION_TOLERANCE
    assert [trial.why_not_pages(lean, shape) for _ in range(3)] == [""] * 3

    def last_row_wrong() -> torch.Tensor:
        value_TD = torch.cat(_page_logits(lean, shape, trial))
        value_TD[-1] = float("nan")
        return value_TD

    assert "off by nan" in trial.truth.why_not(last_row_wrong)
    layer = lean.decoder.layers[5]
    experts = layer.experts
    assert experts is not None

    def another(router: Callable[..., Any]) -> Experts:
        return replace(experts, router=cast(torch.nn.Module, router))

    def weighing(residual_TE: torch.Tensor) -> Any:
        scores, weights, picked = experts.router(residual_TE)
        return scores, 1.2 * weights, picked

    wrong = {
        "off by": replace(experts, after=None),
        "a router's weights are off by 20": another(weighing),
        "a router's weights are off by 1": another(lambda x: experts.router(x.roll(1, -1))),
    }
    for words, fault in wrong.items():
        lean.decoder.layers[5] = replace(layer, experts=fault)
        assert words in trial.why_not_pages(lean, shape), words


@pytest.mark.parametrize("layers", [2, 30])
def test_what_rounding_makes_of_a_model_is_found_on_it(layers: int) -> None:
    """Against what bfloat16 makes of it: how far it is off grows with the layers, from a few hundredths to a half."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
    config = CONFIG_MAPPING["qwen2"](**shape, **heads, tie_word_embeddings=False)
    module = AutoModelForCausalLM.from_config(config).eval()
    exact = Trial(module).truth.value_TD
    trial, far = Trial.both(copy.deepcopy(module).bfloat16())
    off = gap_of(trial.truth.value_TD, exact)
    assert far is not None
    assert (off < LOW_PRECISION_TOLERANCE) is (layers == 2)
    # Two roundings are root 2 times as far from each other as one is from the truth.
    assert off / 2 < trial.truth.rounding < 2.5 * off
    # Another order of sums is within it; what is wrong is not.
    assert trial._compare(lambda: [exact]) == ""
    wrong = trial.truth.value_TD.roll(1, -1)
    assert "does not reproduce" in trial._compare(lambda: [wrong])
    # Where no small copy proves the way, nothing is put down to rounding.
    assert (Trial(trial.module)._compare(lambda: [exact]) == "") is (layers == 2)


@pytest.mark.parametrize("way", ["captured", "slots"])
def test_the_small_copy_of_a_model_goes_once_it_was_tried(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def watched(module: Any) -> Any:
        small = shrunk(module)
        copies.append(weakref.ref(small))
        return small

    monkeypatch.setattr(probe, "shrunk", watched)
    gc.disable()
    try:
        live = engine(model("qwen2"), way=way)
        assert live.way == way
        live.generate(requests(1, 1, SamplingParams(max_new_tokens=2)))
        assert [small() for small in copies] == [None] * len(copies) != []
    finally:
        gc.enable()


def test_nothing_asked_nothing_done() -> None:
    live = engine(model("qwen2"))
    assert isinstance(live, Engine)
    assert live.generate([]) == []
    assert live.generate([Request(prompt_ids=(5,), seeds=(), sampling=SamplingParams(max_new_tokens=1))]) == [[]]


def test_why_a_model_is_padded_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tandem"):
        engine(model("bloom"))
        module = model("qwen2")
        module.set_attn_implementation("sdpa")
        engine(module)
    first, second = (record.getMessage() for record in caplog.records if record.name == "tandem")
    assert "BloomForCausalLM" in first
    assert "cannot be replaced" in first
    assert "'sdpa'" in second


def test_a_layout_that_is_wrong_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.engines.live.slots import DecodeLayout

    right = DecodeLayout._mask
    monkeypatch.setattr(DecodeLayout, "_mask", lambda self, window, dtype: right(self, None, dtype))
    assert engine(model("mistral")).way == "padded"
    assert engine(model("llama")).way == "slots"
    with pytest.raises(UserError, match=r"way slots: .*does not reproduce"):
        engine(model("mistral"), way="slots")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(prompt_ids=(), seeds=(0,), sampling=SamplingParams()), ["request 1", "empty"]),
        (
            Request(prompt_ids=(3,) * 100, seeds=(0,), sampling=SamplingParams(max_new_tokens=29)),
            ["request 1", "100", "29", "128", "max_position_embeddings"],
        ),
        (Request(prompt_ids=(3, 96), seeds=(0,), sampling=SamplingParams()), ["request 1", "96", "position 1"]),
        (Request(prompt_ids=(3,), seeds=(0,), sampling=SamplingParams(top_p=0)), ["request 1", "top_p"]),
        (Request(prompt_ids=(3,), seeds=(0,), sampling=SamplingParams(max_new_tokens=0)), ["max_new_tokens"]),
    ],
)
def test_wrong_requests_are_named(request_: Request, words: list[str]) -> None:
    good = Request(prompt_ids=(5,), seeds=(0,), sampling=SamplingParams(max_new_tokens=2))
    with pytest.raises(UserError) as error:
        engine(model("qwen2")).generate([good, request_])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_the_engines_own_limit_is_named() -> None:
    asked = requests(1, 1, SamplingParams(max_new_tokens=40))
    with pytest.raises(UserError, match="max_length"):
        engine(model("qwen2"), max_length=32).generate(asked)
    whole = len(asked[0].prompt_ids) + 40
    assert engine(model("qwen2"), max_length=whole).generate(asked)[0][0].token_ids
    with pytest.raises(UserError, match=f"above the engine's max_length of {whole - 1}"):
        engine(model("qwen2"), max_length=whole - 1).generate(asked)


@pytest.mark.parametrize("architecture", ["qwen2", "bloom"])
def test_logits_that_are_not_finite_name_the_request(architecture: str) -> None:
    module = model(architecture)
    live = engine(module)
    with torch.no_grad():
        module.get_input_embeddings().weight[7] = float("nan")
    good = Request(prompt_ids=(5,), seeds=(0,), sampling=SamplingParams(max_new_tokens=1))
    bad = Request(prompt_ids=(5, 7), seeds=(0, 1), sampling=SamplingParams(max_new_tokens=4))
    if architecture == "qwen2":  # Bloom's embeddings are its head too, so that no row is finite there
        assert live.generate([good])[0][0].stop == "length"
    with pytest.raises(UserError, match=r"request [01], sample 0: .* not finite"):
        live.generate([bad] if architecture == "bloom" else [good, bad])
