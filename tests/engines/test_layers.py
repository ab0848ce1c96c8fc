"""What is read of a layer, and that the proof notices what would be read wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.family_models import families, family_model
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from tandem.engines.live.forwards import LeanForward, OwnForward
from tandem.engines.live.layers import Attention, Decoder, Gated, Joint, Layer, Ungated, Unlike, Whole
from tandem.engines.live.mixers import Mixer, _convolve, _select, _select_channels
from tandem.engines.live.probe import Trial, _page_logits, find_cache_shape, head_shape_of
from tandem.engines.live.reading import watch
from tandem.engines.live.reading.decoder import read_decoder
from tandem.engines.live.states import StateForward
from tandem.kernels import states
from tandem.kernels.layers import Norm
from tandem.models.attention import IMPLEMENTATION, Ask, PackedLayout
from tandem.models.proof.probe import gap_of
from tandem.models.proof.shrunk import trained_size
from tandem.models.recurrent.states import Held, put_right, states_of_layers


def read(name: str) -> tuple[Decoder, Layer, Layer]:
    decoder = read_decoder(family_model(name), 96)
    return decoder, decoder.layers[0], decoder.layers[1]


def test_what_is_read_of_gemma_2() -> None:
    decoder, windowed, full = read("gemma2")
    norms = [windowed.before, windowed.after_attention, windowed.between, windowed.after_feed, decoder.norm]
    assert all(norm is not None and norm.offset and norm.wide and not norm.centered for norm in norms)
    assert windowed.attention.ask == Ask(0, 8**-0.5, 6, 2.0, None)
    assert full.attention.ask == Ask(1, 8**-0.5, None, 2.0, None)
    assert isinstance(windowed.feed, Gated)
    assert windowed.feed.curve == "gelu_tanh"


def test_what_is_read_of_cohere() -> None:
    _, windowed, full = read("cohere2")
    assert windowed.parallel
    assert windowed.before is not None
    assert windowed.before.centered
    assert windowed.between is None, "one norm is before both parts"
    assert windowed.attention.rotation.pairs
    assert windowed.attention.rotation.cos_PR.shape == (96, 8)
    assert full.attention.rotation.cos_PR.shape == (96, 0), "layers without a window know no positions"


def test_what_is_read_of_gpt_neox() -> None:
    _, layer, _ = read("gpt-neox")
    assert layer.parallel
    assert layer.between is not None
    assert layer.between.bias is not None
    assert layer.attention.by_head
    assert isinstance(layer.feed, Ungated)
    assert layer.attention.rotation.cos_PR.shape == (96, 4), "half of each head turns"


def test_what_is_read_of_the_others() -> None:
    _, olmo, _ = read("olmo2")
    assert olmo.before is olmo.between is None
    assert olmo.attention.wide_norms is not None
    granite, layer, _ = read("granite")
    assert (granite.embedding_scale, layer.scale) == (3.0, 0.4)
    _, gpt_oss, _ = read("gpt-oss")
    assert gpt_oss.attention.ask.sinks is not None
    assert isinstance(gpt_oss.feed, Whole)
    _, phi, _ = read("phi3")
    assert isinstance(phi.feed, Gated)
    assert len(phi.feed.gate_up.linears) == len(phi.attention.qkv.linears) == 1


def test_what_is_read_of_qwen_3_5() -> None:
    _, linear, full = read("qwen3.5")
    assert isinstance(linear.attention, Mixer)
    assert linear.attention.cache == "cache_params"
    assert linear.attention.forward is not linear.attention.module, "with kernels of ours"
    assert isinstance(linear.feed, Gated)
    assert full.attention.gated
    assert full.attention.ask.layer == 0, "the first that keeps keys and values"
    assert full.attention.rotation.cos_PR.shape == (96, 2), "a quarter of each head turns"
    assert full.attention.rotation.norms is not None
    assert full.attention.rotation.norms[0].offset


def test_what_is_read_of_nemotron_h() -> None:
    """Its layers are one part each."""
    first, second, third, fourth = read_decoder(family_model("nemotron-h"), 96).layers
    assert isinstance(first.attention, Mixer)
    assert isinstance(second.feed, Whole)
    assert isinstance(third.attention, Attention)
    assert isinstance(fourth.feed, Ungated)
    assert first.feed is second.attention is third.feed is fourth.attention is None


def test_what_is_read_of_gemma_4() -> None:
    _, windowed, full = read("gemma4")
    assert (windowed.attention.size, full.attention.size) == (8, 16)
    assert (windowed.attention.tied, full.attention.tied) == (False, True), "values are keys as they are projected"
    assert len(full.attention.qkv.linears) == 2
    for layer in (windowed, full):
        assert layer.attention.value_norm is not None
        assert layer.attention.value_norm.weight is None
        assert layer.factor is not None
    decoder, *_ = read("gemma4-e")
    assert [layer.attention.shares for layer in decoder.layers] == [None, None, 0, 1]
    assert [layer.attention.kv_heads for layer in decoder.layers] == [1, 1, 0, 0]
    assert decoder.given is not None
    assert decoder.given.size == 8
    assert decoder.given.scale == pytest.approx(2**-0.5, rel=1e-5)
    assert [layer.injection.place for layer in decoder.layers] == [0, 1, 2, 3]
    _, layer, _ = read("gemma4-moe")
    assert isinstance(layer.feed, Gated)
    assert layer.experts is not None
    assert layer.experts.picks == (2, 1)


def test_what_is_read_of_gemma_3n() -> None:
    module = family_model("gemma3n")
    decoder = read_decoder(module, 96)
    first, *others = decoder.layers
    assert first.feed.cut == pytest.approx(1.64485, abs=1e-4), "of a normal distribution 0.95 are below"
    assert [layer.feed.cut for layer in others] == [None] * 3
    assert [layer.attention.shares for layer in decoder.layers] == [None, None, 0, 1]
    assert [layer.attention.ask.scaling for layer in decoder.layers] == [1.0] * 4
    assert first.attention.value_norm is not None
    assert first.streams.seen == 0
    assert first.streams.factor_E is module.model.layers[0].altup.correct_output_scale
    assert float(first.beside.factor_1) == pytest.approx(2**-0.5)
    assert len(decoder.split.begins.linears) == len(decoder.split.ends) == 2
    assert decoder.given is not None


def test_gemma_3n_is_rounded_where_its_module_rounds() -> None:
    """Bit for bit in bfloat16, of a config like that of E2B, with initial weights."""
    shape = families.TINY | {"num_key_value_heads": 2, "hidden_size": 48}
    options = {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "sliding_window": 6,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2, "num_kv_shared_layers": 4,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 7, "num_hidden_layers": 10,
    }  # fmt: skip
    torch.manual_seed(0)
    module = Gemma3nForCausalLM(Gemma3nTextConfig(**shape | families.IDS | options)).eval()
    module.set_attn_implementation(IMPLEMENTATION)
    module.bfloat16()
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    assert [layer.feed.cut for layer in lean.decoder.layers] == [1.6484375] * 3 + [None] * 7, "as bfloat16 has it"
    token_BQ = torch.randint(2, 96, (1, 20))
    position_BQ, layout = torch.arange(20)[None], PackedLayout(torch.tensor([0, 20]), "cpu")
    with torch.no_grad():
        assert torch.equal(*(each(token_BQ, position_BQ, layout) for each in (lean, OwnForward(module))))


def test_what_is_read_of_gpt_2() -> None:
    """One product holds queries, keys and values, and its weight lies transposed."""
    module = family_model("gpt2")
    decoder = read_decoder(module, 96)
    layer = decoder.layers[0]
    assert decoder.places is module.transformer.wpe
    assert [len(product.linears) for product in layer.products()] == [1, 1, 1, 1]
    assert not layer.attention.by_head
    assert layer.attention.rotation.cos_PR.shape == (96, 0)
    assert layer.attention.qkv.weight.data_ptr() == module.transformer.h[0].attn.c_attn.weight.data_ptr()
    assert isinstance(layer.feed, Ungated)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "glm4-moe-lite"])
def test_latent_attention_keeps_states_and_computes_the_same(name: str) -> None:
    """Products of queries and keys, and values, both ways; the second token's key is further behind."""
    module = family_model(name)
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    full = find_cache_shape(module)
    shape = lean.shape_of(full)
    width, shared, heads = 12, 4, 4
    assert shape.latent == (heads, width)
    assert set(shape.kept) == {(1, width + shared)}
    assert shape.page_bytes * 2 * heads * full.kept[0][1] == full.page_bytes * (width + shared)
    latent = lean.decoder.layers[0].attention
    hidden_TE, position_T = torch.randn(5, 32), torch.tensor([0, 1, 7, 30, 90])
    query, key, value, kept = latent.parts(hidden_TE, position_T)
    narrow_query, also_kept = latent.narrow_parts(hidden_TE, position_T)
    assert torch.equal(kept, also_kept)
    score, narrow_score = query.transpose(0, 1) @ key.permute(1, 2, 0), narrow_query.transpose(0, 1) @ kept[:, 0].T
    torch.testing.assert_close(narrow_score, score, atol=1e-5, rtol=1e-5)
    widened = latent.widened(kept[..., shared:].expand(-1, heads, -1))
    torch.testing.assert_close(widened, value, atol=1e-5, rtol=1e-5)


def test_numbers_of_layers_are_read_while_they_are_still_1() -> None:
    module = family_model("gemma4")
    numbers = [layer.layer_scalar for layer in module.model.layers]
    for number in numbers:
        number.fill_(1.0)
    layers = read_decoder(module, 96).layers
    assert all(number == 1.0 for number in numbers), "as they were"
    assert all(layer.factor_1 is number for layer, number in zip(layers, numbers, strict=True))


def changed(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, **fields)


def attending(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, attention=replace(layer.attention, **fields))


def asking(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: attending(ask=layer.attention.ask._replace(**fields))(layer)


def turning(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: attending(rotation=replace(layer.attention.rotation, **fields))(layer)


def injecting(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, injection=replace(layer.injection, **fields))


def mixing(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, streams=replace(layer.streams, **fields))


def feeding(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, feed=replace(layer.feed, **fields))


def routing(**fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, experts=replace(layer.experts, **fields))


def norming(name: str, **fields: Any) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, **{name: replace(getattr(layer, name), **fields)})


WRONG = [
    ("gemma2", asking(softcap=None)),
    ("gemma2", asking(sliding_window=7)),
    ("gemma2", asking(scaling=0.4)),
    ("gemma2", changed(after_feed=None)),
    ("gemma2", norming("before", offset=False)),
    ("gpt-oss", asking(sinks=None)),
    ("granite", changed(scale=0.41)),
    ("cohere2", turning(pairs=False)),
    ("cohere2", norming("before", centered=False)),
    ("cohere2", changed(parallel=False)),
    ("olmo2", attending(wide_norms=None)),
    ("ministral3", attending(query_scale_P=None)),
    ("hunyuan", attending(late_norms=None)),
    ("deepseek-v3", asking(scaling=0.4)),
    ("deepseek-v3", turning(pairs=False)),
    ("qwen3", turning(norms=None)),
    ("qwen3", norming("between", eps=0.5)),
    ("gemma4", attending(value_norm=None)),
    ("gemma4", attending(value_norm=Norm(None, eps=0.5))),
    ("gemma4", changed(factor=None)),
    ("gemma4-e", changed(injection=None)),
    ("gemma4-e", injecting(after=None)),
    ("gemma4-e", injecting(place=1)),
    ("gemma4-moe", changed(experts=None)),
    ("gemma4-moe", routing(before=None)),
    ("gemma4-moe", routing(after_feed=None)),
    ("gemma3n", mixing(seen=1)),
    ("gemma3n", mixing(scale_1=torch.tensor(1.0))),
    ("gemma3n", mixing(factor_E=None)),
    ("gemma3n", changed(beside=None)),
    ("gemma3n", changed(injection=None)),
    ("gemma3n", feeding(cut=None)),
    ("gemma3n", feeding(cut=1.5)),
    ("gemma3n", attending(value_norm=None)),
    ("gpt2", asking(scaling=0.4)),
]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in WRONG))
def test_the_proof_notices_a_wrong_description(name: str) -> None:
    module = family_model(name)
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    trial, shape = Trial(module, (4, 12), 5), lean.shape_of(find_cache_shape(module))
    assert not trial.why_not_pages(lean, shape)
    right = lean.decoder
    for change in (change for one, change in WRONG if one == name):
        lean.decoder = replace(right, layers=[change(right.layers[0]), *right.layers[1:]])
        assert "does not reproduce" in trial.why_not_pages(lean, shape)
    lean.decoder = replace(right, embedding_scale=right.embedding_scale * 1.02)
    assert trial.why_not_pages(lean, shape)
    if right.given is not None:
        # Of Gemma 3n's a scale would go by: what comes of it is normed.
        lean.decoder = replace(right, given=replace(right.given, norm=replace(right.given.norm, eps=9.0)))
        assert trial.why_not_pages(lean, shape)
    if right.split is not None:
        lean.decoder = replace(right, split=replace(right.split, ends=right.split.ends[::-1]))
        assert trial.why_not_pages(lean, shape)
    if right.places is not None:
        lean.decoder = replace(right, places=None)
        assert trial.why_not_pages(lean, shape)
    lean.decoder = right
    lean.head_shape = lean.head_shape._replace(cap=lean.head_shape.cap and 2 * lean.head_shape.cap, scale=1.1)
    assert trial.why_not_pages(lean, shape)


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "granite4"])
def test_the_proof_notices_a_wrong_step_of_layers_that_keep_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = family_model(name)
    trial, shape = Trial(module, (4, 12), 5), find_cache_shape(module)
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    forward = StateForward(module, lean)
    assert not trial.why_not_pages(forward, shape)
    right = lean.decoder
    for number, change in ((0, changed(before=None)), (1, asking(scaling=0.4)), (1, norming("between", eps=0.5))):
        layers = list(right.layers)
        layers[number] = change(layers[number])
        lean.decoder = replace(right, layers=layers)
        assert "does not reproduce" in trial.why_not_pages(forward, shape)
    lean.decoder = right
    with monkeypatch.context() as patch:
        convolve = states.convolve
        patch.setattr(states, "delta_step", lambda q, k, v, *rest: v)
        patch.setattr(states, "select_step", lambda x, *rest: x)
        patch.setattr(states, "convolve", lambda *given, **named: convolve(*given, **named) + (name == "lfm2"))
        assert "does not reproduce" in trial.why_not_pages(forward, shape), "a kernel that computes something else"
    step = Mixer.__call__
    monkeypatch.setattr(Mixer, "__call__", lambda self, x_TE, held: step(self, x_TE, copy.deepcopy(held)))
    assert "does not reproduce" in trial.why_not_pages(forward, shape), "states that stay as they were"


def test_attention_beside_a_state_is_read_and_proved() -> None:
    """With all numbers by which Falcon H1 multiplies."""
    tiny = family_model("falcon-h1")
    config = copy.deepcopy(tiny.config)
    config.update({f"{name}_multiplier": 0.6 for name in ("key", "ssm_in", "embedding")})
    config.update({"attention_in_multiplier": 0.7, "attention_out_multiplier": 0.8, "ssm_out_multiplier": 1.3})
    config.update({"mlp_multipliers": [0.9, 1.2], "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]})
    module = type(tiny)._from_config(config).eval()
    trained_size(module)
    module.set_attn_implementation(IMPLEMENTATION)
    put_right(module)
    trial, shape = Trial(module, (4, 12), 5), find_cache_shape(module)
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    forward = StateForward(module, lean)
    assert not trial.why_not_pages(forward, shape)
    right = lean.decoder
    first, *others = right.layers
    joint = first.attention
    assert isinstance(joint, Joint)
    assert isinstance(joint.attention, Attention)
    numbers = joint.start, joint.attention_scale, joint.mixer_scale, joint.attention.key_scale
    assert numbers == (0.7, 0.8, 1.3, 0.6)
    wrong: list[Any] = [replace(joint, **{name: 1.0}) for name in ("start", "attention_scale", "mixer_scale")]
    wrong += [replace(joint, attention=replace(joint.attention, key_scale=1.0)), joint.attention, joint.mixer]
    for attention in wrong:
        lean.decoder = replace(right, layers=[replace(first, attention=attention), *others])
        assert "does not reproduce" in trial.why_not_pages(forward, shape)
    # In 16 bits a number near 1 is not taken for 1.
    config.update({"attention_out_multiplier": 1.02, "ssm_out_multiplier": 1.01})
    close = type(tiny)._from_config(config).eval().bfloat16()
    put_right(close)
    joint = read_decoder(close, 96).layers[0].attention
    assert isinstance(joint, Joint)
    assert (joint.attention_scale, joint.mixer_scale) == (1.02, 1.01)


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next", "olmo-hybrid"])
def test_delta_rules_are_read_and_proved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of five operations rounds where the module's own does; what computes something else is not taken."""
    module = family_model(name)
    with torch.no_grad():
        trained_size(module)
    module.to(torch.bfloat16)

    def mixers() -> list[Mixer]:
        layers = LeanForward(module, positions=96, head_shape=head_shape_of(module)).decoder.layers
        return [layer.attention for layer in layers if isinstance(layer.attention, Mixer)]

    mixer = mixers()[0]
    delta = mixer.delta
    assert delta is not None
    channels, heads = len(delta.convolution.weight), len(delta.gates.log_rate_H)
    past = torch.randn(3, channels, 4).bfloat16()
    state = torch.randn(3, heads, delta.keys, delta.values)
    own, ours = (
        Held(
            states_of_layers(module),
            {(0, "conv_states", 0): past.clone(), (0, "recurrent_states", 0): state.clone()},
        )
        for _ in range(2)
    )
    for _ in range(3):
        x = torch.randn(3, module.config.hidden_size).bfloat16()
        with torch.no_grad():
            truth, found = Mixer(mixer.module, mixer.cache)(x, own), mixer(x, ours)
        torch.testing.assert_close(found, truth, atol=0, rtol=2**-7)
        for (name, before), after in zip(own.states.items(), ours.states.values(), strict=True):
            torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
            assert name[1] == "conv_states" or not torch.equal(before, state), "it changes"
    module.float()
    delta = mixers()[0].delta
    assert delta is not None
    gates = replace(delta.gates, most=1.1 * delta.gates.most)
    monkeypatch.setattr(watch, "read_delta", lambda part: replace(delta, gates=gates))
    assert mixers()[0].delta is None


def page_logits(module: Any, lean: LeanForward | None, trial: Trial) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(_page_logits(StateForward(module, lean), find_cache_shape(module), trial))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon-mamba"])
def test_layers_that_are_added_up_in_float32_are_read_and_rounded_as_their_module_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in bfloat16, where the layers' parts are the module's own."""
    module = family_model(name)
    put_right(module)
    assert read_decoder(module, 96).residual is None
    module.bfloat16()
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    right = lean.decoder
    assert right.residual == torch.float32
    assert [layer.before.rounds for layer in right.layers] == [True] * len(right.layers)
    assert not right.norm.rounds
    trial = Trial(module, (4, 12), 5)
    found = page_logits(module, lean, trial)
    with monkeypatch.context() as patch:
        patch.setattr(states, "select_channels", lambda x, *rest: x)
        patch.setattr(states, "select_step", lambda x, *rest: x)
        assert "does not reproduce" in trial.why_not_pages(StateForward(module, lean), find_cache_shape(module))
    for layer in right.layers:
        layer.attention.forward = layer.attention.module
    own = page_logits(module, None, trial)
    assert torch.equal(page_logits(module, lean, trial), own)
    assert gap_of(found, trial.truth.value_TD) < gap_of(own, trial.truth.value_TD), "nearer to what is trained"
    lean.decoder = replace(right, residual=None)
    assert not torch.equal(page_logits(module, lean, trial), own)
    lean.decoder = replace(right, layers=[norming("before", rounds=False)(layer) for layer in right.layers])
    assert not torch.equal(page_logits(module, lean, trial), own)
    module.backbone.layers[0].residual_in_fp32 = False
    with pytest.raises(Unlike, match="added up in several types"):
        read_decoder(module, 96)


def test_the_proof_notices_layers_that_are_added_up_in_too_few_bits() -> None:
    """Each adds less than half of what bfloat16 tells from the residual, all together many times that."""
    more = {"num_hidden_layers": 24, "use_bias": True, "tie_word_embeddings": False}
    module = families.NAMES["mamba"].module(families.TINY | more)
    sign_E = torch.tensor([1.0, -1.0]).repeat(families.TINY["hidden_size"] // 2)
    with torch.no_grad():
        module.get_input_embeddings().weight.fill_(1.0)
        module.lm_head.weight.copy_(torch.randn(len(module.lm_head.weight), 1) * sign_E)
        for layer in module.backbone.layers:
            layer.mixer.out_proj.weight.zero_()
            layer.mixer.out_proj.bias.copy_(0.0015 * sign_E)
    module.bfloat16()
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    forward, trial, shape = StateForward(module, lean), Trial(module, (4, 12), 2), find_cache_shape(module)
    assert not trial.why_not_pages(forward, shape)
    lean.decoder = replace(lean.decoder, residual=None)
    assert "does not reproduce" in trial.why_not_pages(forward, shape)


def added_up_in_float32(layer: Any, fault: str = "") -> None:
    """A layer of Llama whose residual is float32; the norm behind the last layer is given it in bfloat16."""

    def forward(hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        low = hidden_states.bfloat16()
        attended = layer.self_attn(hidden_states=layer.input_layernorm(low), **options)[0]
        residual = hidden_states.float() + attended
        if fault == "rounded between":
            residual = residual.bfloat16().float()
        start = low if fault == "parallel" else residual.bfloat16()
        out = residual + layer.mlp(layer.post_attention_layernorm(start))
        return out.bfloat16() if fault == "several" else out.bfloat16().float() if fault == "rounded" else out

    if fault == "no norm":
        layer.post_attention_layernorm = torch.nn.Identity()
    layer.forward = forward


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("", ""),
        ("rounded between", "not a sum of its parts"),
        ("rounded", "not a sum of its parts"),
        ("parallel", "not a sum of its parts"),
        ("several", "added up in several types"),
        ("no norm", "not norms alone"),
    ],
)
def test_layers_of_two_parts_that_are_added_up_in_float32(fault: str, why: str) -> None:
    module = family_model("llama").bfloat16()
    for number, layer in enumerate(module.model.layers):
        added_up_in_float32(layer, fault if number == 1 else "")
    module.model.norm.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
    if fault:
        with pytest.raises(Unlike, match=why):
            read_decoder(module, 96)
        return
    lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    assert lean.decoder.residual == torch.float32
    assert all(layer.before.rounds and layer.between.rounds for layer in lean.decoder.layers)
    assert lean.decoder.norm.rounds
    token_BQ = torch.randint(2, 96, (1, 20))
    position_BQ, layout = torch.arange(20)[None], PackedLayout(torch.tensor([0, 20]), "cpu")
    with torch.no_grad():
        assert torch.equal(*(each(token_BQ, position_BQ, layout) for each in (lean, OwnForward(module))))


def test_what_our_kernels_do_not_compute_is_left_to_those_of_the_module() -> None:
    x, past, weight = torch.ones(1, 2, 1), torch.ones(1, 2, 3), torch.ones(2, 3)
    given: list[Any] = []
    _convolve(lambda *all: given.append(all), x, past, weight, None, "gelu")
    assert given == [(x, past, weight, None, "gelu")]
    two, told = torch.ones(1, 2, 1, 4), {}
    _select(lambda *all, **named: told.update(named), *[two] * 6, D=two, dt_bias=two, dt_softplus=True, z=two)
    assert told["z"] is two
    _select_channels(lambda *all, **named: told.update(named), *[two] * 6, D=two, dt_bias=None, dt_softplus=True, z=two)
    assert told == {"D": two, "dt_bias": None, "dt_softplus": True, "z": two}


def gate_after(module: Any) -> None:
    """Attention's result is gated before its last product, by nothing that a query brings along (Qwen 3.5)."""
    module.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].sigmoid(),))


def between(module: Any) -> None:
    module.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))


def before_all(module: Any) -> None:
    module.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 0.3, *args[1:]))


def sum_of_more(module: Any) -> None:
    module.model.layers[0].register_forward_hook(lambda _, args, out: out + 0.1 * args[0])


def rolled_keys(module: Any) -> None:
    module.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, __, out: out.roll(1, -1))


def gate_of_heads(module: Any) -> None:
    """A product more of what goes into attention, narrower than a head."""
    attention = module.model.layers[0].self_attn
    attention.more = torch.nn.Linear(attention.q_proj.in_features, 2, bias=False)

    def gate(part: Any, args: Any, kwargs: Any) -> None:
        part.more(kwargs["hidden_states"])

    attention.register_forward_pre_hook(gate, with_kwargs=True)


def given_more(module: Any) -> None:
    module.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0], args[1] * 1.5, *args[2:]))


def moved_values(module: Any) -> None:
    module.model.layers[3].self_attn.register_forward_hook(lambda _, __, out: (out[0] + 0.3, *out[1:]))


def other_experts(module: Any) -> None:
    module.model.layers[0].experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], args[2] * 1.5))


def other_router(module: Any) -> None:
    module.model.layers[0].altup.modality_router.register_forward_hook(lambda _, __, out: out * 1.5)


def other_correction(module: Any) -> None:
    """Of more than the router says, which no part of the layer shows."""
    altup = module.model.layers[1].altup
    correct = altup.correct
    altup.correct = lambda predictions, activated: correct(predictions, activated) * 1.1


def aside_twice(module: Any) -> None:
    module.model.layers[0].laurel.register_forward_hook(lambda _, __, out: 2 * out)


def stretched_stream(module: Any) -> None:
    module.model.altup_projections[0].register_forward_hook(lambda _, __, out: out.roll(1, -1))


def test_gates_that_are_cut_as_no_config_says_are_the_modules_own() -> None:
    module = family_model("gemma3n")
    module.model.layers[0].mlp.activation_sparsity = 0.9
    assert isinstance(read_decoder(module, 96).layers[0].feed, Whole)


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", change) for change in (gate_after, between, before_all, sum_of_more, rolled_keys, gate_of_heads)]
    + [("gemma3n", change) for change in (other_router, other_correction, aside_twice, stretched_stream)]
    + [("gemma4-e", given_more), ("gemma4-e", moved_values), ("gemma4-moe", other_experts)],
)
def test_a_module_that_computes_something_else_is_not_read(name: str, change: Callable[[Any], None]) -> None:
    module = family_model(name)
    change(module)
    try:
        lean = LeanForward(module, positions=96, head_shape=head_shape_of(module))
    except Unlike:
        return
    assert Trial(module, (4, 12), 5).why_not_pages(lean, find_cache_shape(module))


def test_a_norm_is_read_by_what_it_computes() -> None:
    from tandem.engines.live.reading.calls import Call
    from tandem.engines.live.reading.comparing import read_norm

    @torch.no_grad()
    def found(module: torch.nn.Module) -> Norm | None:
        x = torch.randn(3, 16)
        return read_norm(Call(module, x, module(x), False))

    layer = torch.nn.LayerNorm(16, eps=1e-3)
    assert found(layer) == Norm(layer.weight, layer.bias, 1e-3, centered=True)
    rms = torch.nn.RMSNorm(16, eps=1e-5)
    assert found(rms) == Norm(rms.weight, None, 1e-5)
    assert found(torch.nn.Linear(16, 16)) is None
    assert found(torch.nn.SiLU()) is None

    class Odd(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.01

    assert found(Odd(16, eps=1e-5)) is None
