"""The packed forward against each module's own forward of one sequence at a time, and law 3."""

import copy

import pytest
import torch
from helpers.models import ARCHITECTURES, VOCABULARY, make_module, make_tokenizer
from transformers import NemotronConfig, NemotronForCausalLM

from tandem.data.packing import pack, stamp_weights
from tandem.models.attention import IMPLEMENTATION, PackedLayout, UnsupportedAttention, no_mask
from tandem.models.forward import forward
from tandem.models.loading import prepare_module
from tandem.types import Sequence

PADDED = {"bloom"}
LENGTHS = [1, 3, 40, 17, 2, 90, 5, 33]


def random_sequences(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [
        Sequence(
            token_ids=torch.randint(2, VOCABULARY, (n,), generator=generator).tolist(),
            trainable=(torch.rand(n, generator=generator) < 0.7).tolist(),
        )
        for n in lengths
    ]


def by_hand(module, sequences, temperature):
    """Log-probs from the module's own forward, each sequence alone, log-softmax in float64."""
    if module._supports_attention_backend:
        module.set_attn_implementation("eager")  # Of transformers' attentions the one that knows soft caps.
    logps, entropies = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        log_p = (module(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        for t, trained in enumerate(sequence.trainable):
            keep = trained and t > 0
            logps.append(log_p[t - 1, sequence.token_ids[t]] if keep else torch.zeros((), dtype=torch.float64))
            entropies.append(entropy[t - 1] if keep else torch.zeros((), dtype=torch.float64))
    return torch.stack(logps), torch.stack(entropies)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logp_and_entropy_equal_the_modules_own_forward(name):
    module = make_module(name)
    truth = copy.deepcopy(module)
    model = prepare_module(module, make_tokenizer())
    assert model.packed == (name not in PADDED)
    assert model.split_head
    sequences = random_sequences()
    with torch.no_grad():
        out = forward(model, pack(sequences), temperature=0.7, entropy=True)
        logp, entropy = by_hand(truth, sequences, 0.7)
    # float32 rounding through two layers; a wrong mask or scale is off by more than 0.1.
    torch.testing.assert_close(out.logp_T.double(), logp, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy_T.double(), entropy, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in PADDED])
def test_tokens_that_fill_up_a_batch_change_nothing(name, monkeypatch):
    """The same outputs and gradients, whatever stands behind the last segment."""
    module = make_module(name)
    model = prepare_module(module, make_tokenizer())
    batch = stamp_weights(pack(random_sequences()), "token")
    seen, found = [], []
    module.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    for few in (batch.tokens + 1, batch.tokens):
        monkeypatch.setattr("tandem.models.forward.FEW_TOKENS", few)
        module.zero_grad()
        logp_T = forward(model, batch).logp_T
        (-(logp_T * batch.weight_T).sum()).backward()
        found.append([logp_T.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert seen == [batch.tokens, batch.tokens + 1]
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, atol=1e-6, rtol=1e-5)


def test_a_model_that_cannot_be_packed_says_so(caplog):
    prepare_module(make_module("bloom"), make_tokenizer())
    assert "BloomForCausalLM" in caplog.text
    assert "padded" in caplog.text


def test_a_module_that_does_not_hand_the_layout_on_is_refused_and_not_computed_without():
    """transformers' Nemotron drops what its decoder layers do not know; what stands for no mask is no mask to use."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    module = NemotronForCausalLM(
        NemotronConfig(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )
    module.set_attn_implementation(IMPLEMENTATION)
    ids, layout = torch.tensor([[2, 3]]), PackedLayout(torch.tensor([0, 2]), torch.device("cpu"))
    with pytest.raises(UnsupportedAttention, match="does not hand the layout on"):
        module.base_model(
            input_ids=ids,
            position_ids=ids - 2,
            attention_mask=no_mask(torch.device("cpu")),
            use_cache=False,
            layout=layout,
        )


def test_bfloat16_casts_parameters_and_leaves_rotary_frequencies_alone():
    model = prepare_module(make_module(), make_tokenizer(), dtype="bfloat16")
    frequencies = {name: b.clone() for name, b in model.module.named_buffers() if "inv_freq" in name}
    batch = pack(random_sequences())
    high = forward(model, batch).logp_T
    model.compute_in(model.torch_dtype)
    low = forward(model, batch).logp_T
    assert low.dtype == torch.float32
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert frequencies
    for name, before in frequencies.items():
        assert torch.equal(model.module.get_buffer(name), before)
    assert 0 < (low - high).abs().max() < 0.2
