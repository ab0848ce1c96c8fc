"""Compiled layers: one graph for all of a kind, the same numbers, and nobody else runs through them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers.models import VOCABULARY, make_module, make_tokenizer
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.models.attention import FlashLayout
from tandem.models.compiled import Blocks
from tandem.models.forward import forward
from tandem.models.loading import prepare_module
from tandem.models.lora.adapters import AdapterParams, put_adapters
from tandem.parallel.sharding import checkpoint_activations, transformer_layers
from tandem.types import Request, SamplingParams, Sequence

SAMPLES = [[4, 3, 1, 6], [5, 2, 7], [3, 8]]
LENGTHS = [[5, 9, 30, 2], [40, 7, 8], [3, 3, 3, 3, 17, 60]]


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return stamp_weights(pack([Sequence(token_ids=i, trainable=[True] * len(i)) for i in ids]), "token")


def groups_of(samples):
    """A prompt for each number, of another length, and as many answers to it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, count in enumerate(samples):
        prompt = torch.randint(2, VOCABULARY, (5 + 3 * number,), generator=generator).tolist()
        for i in range(count):
            own = torch.randint(2, VOCABULARY, (4 + 5 * i,), generator=generator).tolist()
            rows.append(Sequence(token_ids=prompt + own, trainable=[False] * len(prompt) + [True] * len(own)))
    return stamp_weights(pack(rows), "token")


def deep_model(layers=4, **options):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128, **options,
    )  # fmt: skip
    return prepare_module(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())


def use(model, backend="eager"):
    model.blocks = Blocks(transformer_layers(model.module), name="test", backend=backend)
    return model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def gradients(model, batch):
    model.module.zero_grad()
    out = forward(model, batch, temperature=0.7)
    (-(out.logp_T * batch.weight_T).sum()).backward()
    return out.logp_T.detach(), [p.grad.clone() for p in model.module.parameters()]


def test_all_layers_and_all_lengths_share_one_graph():
    model = use(deep_model())
    for lengths in LENGTHS:
        gradients(model, batch_of(lengths))
    assert graphs() == 1
    with torch.no_grad():
        for lengths in LENGTHS:
            forward(model, batch_of(lengths))
    assert graphs() == 2
    assert model.blocks.working


def test_shared_prompts_are_one_graph_more():
    model, plain = use(deep_model()), deep_model()
    for samples in SAMPLES:
        batch = groups_of(samples)
        (logp, grads), (want, want_grads) = gradients(model, batch), gradients(plain, batch.unshared())
        torch.testing.assert_close(logp, want, atol=1e-5, rtol=0)
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert graphs() == 1
    for lengths in LENGTHS:
        gradients(model, batch_of(lengths))
    assert graphs() == 2
    assert model.blocks.working


@torch.library.custom_op("tandem_tests::flash", mutates_args=())
def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_bounds: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Has the kernel's arguments, which only a GPU has. Queries and what a segment's keys and values add up to."""
    total = torch.stack([(k + v)[a:b].sum(dim=(0, 1)) for a, b in pairwise(bounds)])
    return q + total.repeat_interleave(own_bounds.diff(), dim=0)[:, None]


flash.register_fake(lambda q, k, v, own_bounds, bounds, longest: torch.empty_like(q))
flash.register_autograd(
    lambda ctx, up: (up, *[up.new_zeros(shape) for shape in ctx.shapes], None, None, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "shapes", [x.shape for x in inputs[1:3]]),
)


class Flash(FlashLayout):
    def attend(self, query, key, value, ask):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.sharing is not None:
            k, v = self.sharing.expand(k), self.sharing.expand(v)
        return flash(q, k, v, self.own_bounds, self.bounds, self.longest)[None]


def test_lone_samples_of_a_step_that_shares_meet_the_graph_of_the_others(monkeypatch):
    def layout(bounds, device, dtype, *, compiled, sharing, spare):
        found = Flash(bounds, device, sharing)
        found.compiled = compiled
        return found

    model = use(deep_model())
    monkeypatch.setattr("tandem.models.forward.packed_layout", layout)
    monkeypatch.setattr("tandem.models.forward._spare", lambda tokens: 0)
    batch = groups_of([4, 3, 1, 1, 6])
    for units in (range(15), range(6), [7, 8], [7], [8], [0, 4, 7, 8], [9, 10]):
        gradients(model, batch.select(list(units)))
    assert graphs() == 1
    assert model.blocks.working
    gradients(model, batch_of(LENGTHS[0]))
    assert graphs() == 2


def test_a_graph_that_shares_prompts_can_be_kept_for_the_next_process():
    kept = []

    def look(graph, inputs):
        check_cacheable(graph)
        kept.append(graph)
        return graph

    model = use(deep_model(), backend=look)
    gradients(model, groups_of(SAMPLES[0]))
    assert len(kept) == 1
    assert model.blocks.working
    with pytest.raises(BypassAOTAutogradCache):
        check_cacheable(kept[0])


def test_numbers_of_a_layer_are_constants_of_its_graph_and_no_tensors_on_the_cpu():
    inputs = []

    def backend(graph, examples):
        inputs.extend(node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward

    model = deep_model(layers=2)
    put_adapters(model.module, AdapterParams(rank=4, alpha=8), "base")
    with torch.no_grad():
        forward(use(model, backend), batch_of(LENGTHS[0]), temperature=0.7)
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    assert any(value.is_floating_point() for value in tensors)
    assert [value for value in tensors if value.is_floating_point() and value.dim() == 0] == []


def test_two_kinds_of_layers_are_two_graphs():
    model = use(
        deep_model(layer_types=["sliding_attention", "full_attention"] * 2, use_sliding_window=True, sliding_window=5)
    )
    plain = copy.deepcopy(model)
    plain.blocks = None
    for lengths in LENGTHS:
        batch = batch_of(lengths)
        torch.testing.assert_close(gradients(model, batch)[0], gradients(plain, batch)[0], atol=1e-5, rtol=0)
    assert graphs() == 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductors_graphs_give_the_same_numbers(checkpointed):
    plain, compiled = deep_model(), use(deep_model(), backend="inductor")
    if checkpointed:
        checkpoint_activations(transformer_layers(compiled.module))
    for batch in (*map(batch_of, LENGTHS[:2]), groups_of(SAMPLES[0])):
        (logp, grads), (want, want_grads) = gradients(compiled, batch), gradients(plain, batch)
        torch.testing.assert_close(logp, want, atol=1e-5, rtol=0)
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert compiled.blocks.working
    assert graphs() >= 1


def test_an_engine_on_the_same_module_compiles_nothing():
    model = use(deep_model())
    requests = [Request(prompt_ids=(5, 6, 7), seeds=(1, 2), sampling=SamplingParams(max_new_tokens=8))]
    LiveEngine(model.module, model.tokenizer).generate(requests)
    assert graphs() == 0


def test_a_copy_of_the_module_runs_its_own_weights():
    model = use(deep_model())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.module.model.layers[0].mlp.up_proj.weight.mul_(3.0)
    batch = batch_of(LENGTHS[0])
    truth = copy.deepcopy(other)
    truth.blocks = None
    assert not torch.allclose(gradients(model, batch)[0], gradients(other, batch)[0])
    torch.testing.assert_close(gradients(other, batch)[0], gradients(truth, batch)[0], atol=1e-5, rtol=0)


def test_layers_that_cannot_be_one_graph_say_so_once_and_run(caplog):
    model = use(deep_model())
    plain = deep_model()
    for layer in model.module.model.layers:
        # Printing in the midst of a layer needs Python, which a graph does not have.
        layer.mlp.register_forward_hook(lambda module, inputs, output: _break(output))
    batch = batch_of(LENGTHS[0])
    torch.testing.assert_close(gradients(model, batch)[0], gradients(plain, batch)[0], atol=1e-6, rtol=0)
    gradients(model, batch)
    assert not model.blocks.working
    assert [record.message.count("uncompiled") for record in caplog.records].count(1) == 1


def _break(output):
    torch._dynamo.graph_break()
    return output


def test_auto_is_off_on_a_cpu_and_a_padded_model_is_never_compiled():
    model = deep_model()
    model.compile_blocks("auto")
    assert model.blocks is None
    model.compile_blocks("on")
    assert model.blocks is not None
    padded = prepare_module(make_module("bloom"), make_tokenizer())
    padded.compile_blocks("on")
    assert padded.blocks is None


def test_gemma_like_kinds(tmp_path):
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, head_dim=8, sliding_window=6,
        attn_logit_softcapping=None, final_logit_softcapping=None,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = prepare_module(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    assert plain.packed
    model = use(copy.deepcopy(plain))
    for lengths in LENGTHS:
        batch = batch_of(lengths)
        torch.testing.assert_close(gradients(model, batch)[0], gradients(plain, batch)[0], atol=1e-5, rtol=0)
    assert graphs() == 2
