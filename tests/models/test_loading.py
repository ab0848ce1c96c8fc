"""Loading from Hugging Face folders, scalar heads, and the errors a person meets."""

from functools import partial

import pytest
import torch
from helpers.models import make_module, make_tokenizer
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
)

from tandem.data.packing import pack
from tandem.errors import UserError
from tandem.models.forward import forward
from tandem.models.loading import load_causal, load_scalar, load_tokenizer, pick_device, prepare_module
from tandem.models.proof.probe import Truth
from tandem.models.proof.shrunk import shrunken_config, trained_size
from tandem.types import Sequence

SEQUENCES = [
    Sequence(token_ids=[5, 9, 3, 1], trainable=[False, True, True, True]),
    Sequence(token_ids=[7, 2], trainable=[False, True]),
]


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_neox"])
def test_scalar_model_round_trip(tmp_path, name):
    make_module(name).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = load_scalar(tmp_path / "base", new_head="random", seed=3, device="cpu")
    assert model.packed
    again = load_scalar(tmp_path / "base", new_head="random", seed=3, device="cpu")
    assert torch.equal(model.module.score.weight, again.module.score.weight)
    model.export(tmp_path / "rm")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.score.out_features == 1
    batch = pack(SEQUENCES)
    with torch.no_grad():
        out = forward(load_scalar(tmp_path / "rm", new_head="refuse", device="cpu"), batch)
        want = [plain(input_ids=torch.tensor([s.token_ids])).logits.item() for s in SEQUENCES]
        prefix = plain(input_ids=torch.tensor([[5, 9]])).logits.item()
    torch.testing.assert_close(batch.scores(out).tolist(), want, atol=1e-5, rtol=0)
    # The value of token 2 is the head's number where that token was chosen: after [5, 9].
    value_T = batch.values(out)
    assert value_T[2].item() == pytest.approx(prefix, abs=1e-5)
    assert value_T[[0, 4]].tolist() == [0.0, 0.0]


def test_loading_runs_the_layers_five_times():
    """A glance at its attention, three sequences by themselves, and all of them packed; its head is proved without."""
    module, calls = make_module("gemma2_softcap"), []
    module.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model = prepare_module(module, make_tokenizer())
    assert (model.packed, model.split_head, model.head_shape.cap) == (True, True, 30.0)
    assert len(calls) == 5
    assert "forward" not in vars(module.base_model)


@pytest.mark.parametrize("bend", [lambda x: 1.3 * x, lambda x: 25 * torch.tanh(x / 25), lambda x: x + 1e-3 * x**3])
def test_a_head_that_does_more_than_the_config_says_is_not_split(bend):
    """Also where it bends large logits alone, larger than the probe's."""
    module = make_module("qwen2")
    own = module.forward

    def bent(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = bend(out.logits)
        return out

    module.forward = bent
    model = prepare_module(module, make_tokenizer())
    assert model.packed
    assert not model.split_head
    with torch.no_grad():
        found = forward(model, pack(SEQUENCES[:1])).logp_T
        truth = module(input_ids=torch.tensor([[5, 9, 3, 1]])).logits[0].log_softmax(-1)
    assert found.tolist()[1:] == pytest.approx(truth[[0, 1, 2], [9, 3, 1]].tolist(), abs=1e-5)


def test_what_comes_before_the_base_model_is_seen():
    """The base model alone does not give what it gives inside: the whole module is run."""
    module = make_module("qwen2")
    own = module.forward
    module.forward = lambda input_ids, **kwargs: own(input_ids=(input_ids + 1) % 20, **kwargs)
    model = prepare_module(module, make_tokenizer())
    assert model.packed
    assert not model.split_head


def test_a_padding_token_that_the_embedding_has_no_row_for(tmp_path):
    """Tokenizers may have more tokens than their model: transformers' embedding would not be made with such a one."""
    make_module("qwen2").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<1>", "<2>", "<3>"])
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(tmp_path)
    model = load_scalar(tmp_path, new_head="random", device="cpu")
    assert model.module.config.pad_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["mamba", "cohere", "falcon_h1", "rwkv"])
def test_a_score_on_a_base_model_that_has_no_class_with_one(tmp_path, kind):
    """Falcon-H1 computes a vector of scales from its config, which no folder holds."""
    config = shrunken_config(CONFIG_MAPPING[kind]())
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config).eval()
    trained_size(causal)
    causal.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = load_scalar(tmp_path / "base", new_head="random", device="cpu")
    model.export(tmp_path / "rm")
    batch = pack(SEQUENCES)
    with torch.no_grad():
        found = batch.scores(forward(load_scalar(tmp_path / "rm", new_head="refuse", device="cpu"), batch))
        # The lines of docs/rewards.md.
        base = AutoModel.from_pretrained(tmp_path / "rm")
        score = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
        want = [base(torch.tensor([s.token_ids])).last_hidden_state[0, -1] @ score[0] for s in SEQUENCES]
        states = [causal.base_model(torch.tensor([s.token_ids])).last_hidden_state[0, -1] for s in SEQUENCES]
    torch.testing.assert_close(found, torch.stack(want), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, torch.stack(states) @ model.module.score.weight[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="without a language-model head"):
        load_causal(tmp_path / "rm", device="cpu")


def test_a_critic_from_a_causal_lm_starts_at_zero(model_folder):
    model = load_scalar(model_folder, new_head="zero", device="cpu")
    assert not forward(model, pack(SEQUENCES)).scalar_T.any()


def test_export_loads_as_a_causal_lm(model_folder, tmp_path):
    model = load_causal(model_folder, device="cpu")
    model.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for mine, theirs in zip(model.module.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert load_tokenizer(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("load", [load_causal, partial(load_scalar, new_head="zero")])
def test_a_folder_that_is_written_over_changes_no_model_that_was_loaded(model_folder, load):
    model = load(model_folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with (model_folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_errors_name_what_is_missing(tmp_path, model_folder):
    with pytest.raises(UserError, match=r"no model folder \./nowhere"):
        load_causal("./nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: no config\.json"):
        load_causal(empty)
    with pytest.raises(UserError, match="no trained 'score' head"):
        load_scalar(model_folder, new_head="refuse")
    (model_folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="cannot load a causal language model"):
        load_causal(model_folder)
    with pytest.raises(UserError, match=r"^device: 'nonsense' is none"):
        pick_device("nonsense")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu:0", "cuda:99", "nonsense"])
def test_devices_that_cannot_be_computed_on(name):
    with pytest.raises(UserError, match=rf"^device: '?{name}'?(,| is none)"):
        pick_device(name)


def test_no_forward_changes_weights():
    """RWKV's own divides them where it is not training, from its ``rescale_every``th layer on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4, "rescale_every": 2}
    module = RwkvForCausalLM(RwkvConfig(vocab_size=32, context_length=32, **sizes))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    ids = torch.arange(2, 12)[None]
    true = module.train()(input_ids=ids).logits
    model = prepare_module(module, make_tokenizer())
    torch.testing.assert_close(model.module(input_ids=ids).logits, true)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("off", "rounding", "proved"),
    [
        ((0.04, 0.04, 0.7), 0.6, True),  # One row, of a model of which rounding makes as much.
        ((0.04, 0.04, 0.9), 0.6, False),
        ((0.04, 0.7, 0.7), 0.6, False),
        ((0.04, 0.04, 0.7), 0.1, False),
    ],
)
def test_rounding_may_make_a_row_another_and_not_most_of_them(
    off: tuple[float, ...], rounding: float, proved: bool
) -> None:
    module = make_module().bfloat16()
    value_TD = torch.ones(3, 8)
    truth = Truth(module, lambda: value_TD, beside=True)
    truth.rounding = rounding
    assert (truth.too_far((value_TD * (1 + torch.tensor(off)[:, None])).bfloat16()) == "") is proved
