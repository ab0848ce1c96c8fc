"""The text half of a model that also sees: trained and sampled alone, and put back among the rest."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.engine_models import tokenizer
from helpers.seeing import BEGIN, END, FAMILIES, IMAGE, make_seeing, save_seeing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp
from tandem.engines.live.engine import LiveEngine
from tandem.engines.vllm.names import Names
from tandem.engines.vllm.setup import require_read
from tandem.errors import RunFailure, UserError
from tandem.models.loading import load_causal, load_scalar
from tandem.models.lora.adapters import AdapterParams
from tandem.models.proof.shrunk import shrunk
from tandem.models.seeing import PartNames, SeeingModel
from tandem.models.shared import scalar_beside
from tandem.models.text_config import PLAIN, half_of
from tandem.own_loop.their_model import given, require_same
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams, Sequence

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
ROWS = [[5, 9, 60, 33, 41, 7, 88, 12, 3, 14, 15, 9, 26], list(range(2, 40))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "base"
            save_seeing(make_seeing(family), made[family])
        return made[family]

    return folder


def whole_in(folder: Path):
    kind = getattr(transformers, json.loads((folder / "config.json").read_bytes())["architectures"][0])
    whole, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not (info["missing_keys"])
    assert not (info["unexpected_keys"])
    assert not (info["mismatched_keys"])
    return whole.eval()


@torch.no_grad()
def logps(module, rows=ROWS):
    """What transformers' own forward of one sequence at a time gives each token but the first."""
    found = []
    for row in rows:
        logp = module(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)
        found += logp[range(len(row) - 1), row[1:]].tolist()
    return torch.tensor(found)


def batch_of(rows=ROWS):
    return stamp(pack([Sequence(token_ids=row, trainable=[False] + [True] * (len(row) - 1)) for row in rows]), "token")


def surprise(out, batch):
    return TokenLoss(loss_T=-out.logp_T * batch.trainable_T)


def trained(model, steps=2) -> LocalTrainer:
    trainer = LocalTrainer(model, surprise, OptimParams(learning_rate=1e-2, total_steps=9), token_budget=64)
    for _ in range(steps):
        trainer.forward_backward(batch_of())
        trainer.optim_step()
    return trainer


def scored(trainer):
    batch = batch_of()
    return trainer.score(batch).logp_T[batch.trainable_T]


def text_names(whole) -> set[str]:
    """The tensors of the whole that its text model and its head have, by a walk of its own."""
    parts = {id(p) for name, p in whole.named_parameters() if "language_model" in name or "lm_head" in name}
    return {name for name, p in whole.state_dict(keep_vars=True).items() if id(p) in parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_half_says_what_the_whole_says_and_is_put_back_among_the_rest(folders, family, tmp_path):
    base, whole = folders(family), whole_in(folders(family))
    model = load_causal(base, device="cpu")
    assert model.packed is (family != "llama4")  # whose chunks begin anew at fixed positions
    assert not any("vision" in name or "visual" in name for name, _ in model.module.named_modules())

    # Greedy: the engine on the half, past the windows, and transformers' generate on the whole.
    engine = LiveEngine(model.module, model.tokenizer, version=lambda: 0)
    ask = [Request(prompt_ids=tuple(row), seeds=(0,), sampling=GREEDY) for row in ROWS]
    for row, (completion,) in zip(ROWS, engine.generate(ask), strict=True):
        ids = torch.tensor([row])
        wanted = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(completion.token_ids) == wanted[0, len(row) :].tolist()

    trainer = trained(model, steps=0)
    torch.testing.assert_close(scored(trainer), logps(whole), rtol=0, atol=1e-5)
    trainer = trained(model)
    trainer.export(tmp_path / "out")

    again = whole_in(tmp_path / "out")
    torch.testing.assert_close(logps(again), scored(trainer), rtol=0, atol=1e-5)
    before, after, text = whole.state_dict(), again.state_dict(), text_names(whole)
    assert text < set(before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) is (name not in text or "layer_scalar" in name), name
    assert (tmp_path / "out" / "preprocessor_config.json").read_text().count("as it was")
    ours, theirs = (json.loads((f / "config.json").read_bytes()) for f in (tmp_path / "out", base))
    assert {**ours, "text_config": None} == {**theirs, "text_config": None}

    loaded = load_causal(tmp_path / "out", device="cpu").module.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.module.state_dict().items())


def image_prompt(family):
    if family == "gemma3":
        ids = torch.tensor([[5, 9, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, 33, 41, 7]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == IMAGE).long()}
    ids = torch.tensor([[5, 9, BEGIN, *[IMAGE] * 6, END, 33, 41, 7]])  # 2 x 3, of 4 x 6 patches
    kinds = {"mm_token_type_ids": (ids == IMAGE).int(), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    return {"input_ids": ids, "pixel_values": torch.randn(24, 3 * 2 * 14 * 14), **kinds}


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_an_image_is_seen_as_by_the_whole_with_the_same_text_weights(folders, family, tmp_path):
    model = load_causal(folders(family), device="cpu")
    trained(model).export(tmp_path / "out")
    exported, whole = whole_in(tmp_path / "out"), whole_in(folders(family))
    seen = image_prompt(family)
    with torch.no_grad():
        untrained = whole(**seen).logits
        whole.model.language_model.load_state_dict(model.module.model.state_dict())
        whole.lm_head.load_state_dict(model.module.lm_head.state_dict())
        wanted, found = whole(**seen).logits, exported(**seen).logits
        blind = exported(**seen | {"pixel_values": torch.zeros_like(seen["pixel_values"])}).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (untrained - wanted).abs().max() > 1e-2
    assert (blind - wanted).abs().max() > 1e-2


def test_a_folder_of_bfloat16_in_parts_and_under_other_names(tmp_path):
    whole = make_seeing("mistral3").to(torch.bfloat16)
    base = tmp_path / "base"
    save_seeing(whole, base, max_shard_size="40KB", save_original_format=False)
    parts = [path.name for path in base.glob("*.safetensors")]
    assert len(parts) == 3
    model = load_causal(base, device="cpu")
    trained(model).export(tmp_path / "out")
    again = whole_in(tmp_path / "out")
    assert all(torch.equal(t, again.state_dict()[n].to(t.dtype)) for n, t in whole.state_dict().items() if "vis" in n)
    assert all(torch.equal(t, dict(again.model.language_model.named_parameters())[n]) for n, t in body_of(model))
    stored = {name: tensor.dtype for name, tensor in load_parts(tmp_path / "out").items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert set(index) == set(stored)
    assert {index[n] for n in index} == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    # The others are as they were; the text is as it was trained, and the config says so.
    assert {dtype for name, dtype in stored.items() if "vis" in name} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == "float32"


def load_parts(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def body_of(model):
    return model.module.model.named_parameters()


def changed(folder: Path, out: Path, change) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_text_tensors_that_are_missing_or_unknown_are_refused_by_name(folders, family, tmp_path):
    base, text = folders(family), "language_model.model."
    cases = {
        "lacks model.norm.weight": lambda t: t.pop(f"{text}norm.weight"),
        "holds model.layers.0.new.weight": lambda t: t.update({f"{text}layers.0.new.weight": torch.zeros(2)}),
        "shape (3,) where": lambda t: t.update({f"{text}norm.weight": torch.zeros(3)}),
    }
    for number, (words, change) in enumerate(cases.items()):
        folder = changed(base, tmp_path / str(number), change)
        for load in (load_causal, lambda f, **options: load_scalar(f, new_head="zero", **options)):
            with pytest.raises(UserError) as caught:
                load(folder, device="cpu")
            assert words in str(caught.value)
    # What is not of the text half is not asked about, and goes along.
    folder = changed(base, tmp_path / "more", lambda t: t.update({"vision_tower.new": torch.ones(2)}))
    load_causal(folder, device="cpu").export(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())["weight_map"]
    with safe_open(tmp_path / "out" / index["vision_tower.new"], "pt") as file:
        assert file.get_tensor("vision_tower.new").tolist() == [1, 1]


def test_without_the_original_the_text_half_is_saved(folders, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(folders("mistral3"), base)
    trainer = trained(load_causal(base, device="cpu"))
    shutil.rmtree(base)
    with caplog.at_level(logging.WARNING, "tandem"):
        trainer.export(tmp_path / "out")
    assert f"without the other parts of {base}" in caplog.text
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(module).__name__ == "Ministral3ForCausalLM"
    torch.testing.assert_close(logps(module), scored(trainer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("whose", ["the whole's", "the text's"])
def test_an_untied_head_is_written_whatever_a_config_says_of_it(folders, tmp_path, whose):
    """transformers ties none of which the folder holds both; Mistral 3's config may leave the key out."""
    base = changed(folders("mistral3"), tmp_path / "base", lambda _: None)
    config = json.loads((base / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is False
    if whose == "the whole's":
        del config["tie_word_embeddings"]
    else:
        config["text_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config))
    trainer = trained(load_causal(base, device="cpu"), steps=1)
    trainer.export(tmp_path / "out")
    torch.testing.assert_close(logps(whole_in(tmp_path / "out")), scored(trainer), rtol=0, atol=1e-5)


def test_other_parts_are_read_from_where_the_text_half_was_and_never_written_over(folders, tmp_path, caplog):
    base = changed(folders("mistral3"), tmp_path / "base", lambda t: t.update({"vision_tower.new": torch.ones(2)}))
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"vision_tower.new": "model-00001-of-00001.safetensors"}}))
    for name in ("best.json", "trainer_state.json", "pytorch_model.bin.index.json", "preprocessor_config.json"):
        (base / name).write_text("{}")
    model = load_causal(base, device="cpu")
    with pytest.raises(UserError, match="would be lost"):
        model.export(base)
    model.export(tmp_path / "out")
    assert "vision_tower.new" in json.loads((tmp_path / "out" / index.name).read_bytes())["weight_map"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == [
        *("config.json", "generation_config.json", index.name, "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    (base / "model.safetensors").unlink()  # it is mapped into memory
    (base / "model.safetensors").write_bytes(b"damaged since")
    with pytest.raises(RunFailure, match="cannot be written"):
        model.export(tmp_path / "nothing")
    (base / "model.safetensors").unlink()
    model.export(tmp_path / "half")
    assert "no model-00001-of-00001.safetensors in" in caplog.text
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "half")).__name__ == "Ministral3ForCausalLM"


def test_adapters_are_those_of_the_whole(folders, tmp_path):
    """peft puts them on the whole, and on no part that sees; Tandem reads them again, as they are and merged."""
    peft = pytest.importorskip("peft")
    base = folders("gemma3")
    trainer = trained(load_causal(base, device="cpu", adapters=AdapterParams(rank=2)))
    trainer.export(tmp_path / "lora")
    wanted = scored(trainer)
    put = peft.PeftModel.from_pretrained(whole_in(base), tmp_path / "lora")
    torch.testing.assert_close(logps(put), wanted, rtol=0, atol=1e-5)
    assert all("language_model" in name for name, _ in put.named_parameters() if ".lora_" in name)
    merged = load_causal(tmp_path / "lora", device="cpu")
    torch.testing.assert_close(logps(merged.module), wanted, rtol=0, atol=1e-5)
    merged.export(tmp_path / "merged")
    torch.testing.assert_close(logps(whole_in(tmp_path / "merged")), wanted, rtol=0, atol=1e-5)
    # The base may be elsewhere by now, and is the one that is given.
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_bytes())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    again = load_causal(base, device="cpu", adapters=AdapterParams(folder=str(tmp_path / "lora")))
    torch.testing.assert_close(scored(trained(again, steps=0)), wanted, rtol=0, atol=1e-5)


def test_a_whole_in_4_bits_is_trained_on_and_its_vision_stays_as_it_is(folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    base, four = folders("qwen3_vl"), tmp_path / "four"
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": bits, "device_map": {"": "cpu"}, "dtype": torch.float32}
    transformers.Qwen3VLForConditionalGeneration.from_pretrained(base, **options).save_pretrained(four)
    tokenizer().save_pretrained(four)
    ours = load_causal(base, device="cpu", adapters=AdapterParams(rank=2, quantize="nf4"))
    trainer = trained(load_causal(four, device="cpu", adapters=AdapterParams(rank=2)), steps=0)
    assert trainer.policy.adapters.quantized == "nf4"
    torch.testing.assert_close(scored(trainer), scored(trained(ours, steps=0)), rtol=0, atol=1e-6)
    trainer.forward_backward(batch_of())
    trainer.optim_step()
    trainer.export(tmp_path / "lora")
    load_causal(tmp_path / "lora", device="cpu").export(tmp_path / "merged")
    again = whole_in(tmp_path / "merged")
    torch.testing.assert_close(logps(again), scored(trainer), rtol=0, atol=2e-5)
    before, after = load_parts(four), load_parts(tmp_path / "merged")
    others = {name for name in before if "visual" in name}
    assert any(".quant_state." in name for name in others)
    assert others == {name for name in after if "visual" in name}
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert not any(".quant_state." in name for name in set(after) - others)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "llama4", "qwen3_vl_moe"])
def test_a_push_is_called_as_the_wholes_folder_calls_it(folders, family, tmp_path):
    model, whole = load_causal(folders(family), device="cpu"), whole_in(folders(family))
    text = text_names(whole)
    expected = revert_weight_conversion(whole, {n: p for n, p in whole.named_parameters() if n in text})
    found = dict(Names(whole.config).of(list(model.module.named_parameters())))
    assert set(found) == set(expected)
    if family == "qwen3_vl_moe":
        # The hub's have experts the other way round: the only way that vLLM reads, and transformers writes none so.
        model.export(tmp_path / "out")
        require_read(str(tmp_path / "out"))
        with pytest.raises(UserError, match=r"its experts are as transformers writes them, .* tandem export --model"):
            require_read(str(folders(family)))
        expected = load_parts(tmp_path / "out")
        assert {tuple(t.shape) for n, t in expected.items() if "experts" in n} == {(4, 32, 192), (4, 96, 32)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_whole_that_somebody_trains_gives_the_sampler_its_text_half(folders):
    model, whole = load_causal(folders("qwen2_vl"), device="cpu"), whole_in(folders("qwen2_vl"))
    own = dict(model.module.named_parameters())
    found = given(whole)
    require_same(found.parameters, {name: tuple(p.shape) for name, p in own.items()}, "the folder")
    assert all(torch.equal(p, own[name]) for name, p in found.parameters.items())
    rows, _ = found.logprobs(ROWS, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor([x for row in rows for x in row]), logps(model.module), rtol=0, atol=1e-5)


def test_a_reward_model_is_one_of_the_text_half(folders, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tandem"):
        model = load_scalar(folders("gemma4"), new_head="random", device="cpu")
    assert "its vision parts stay" in caplog.text
    model.export(tmp_path / "out")
    again = load_scalar(tmp_path / "out", new_head="refuse", device="cpu")
    assert again.module.config.model_type == "gemma4_text"
    assert all(torch.equal(t, again.module.state_dict()[n]) for n, t in model.module.state_dict().items())


def test_llama_4s_base_is_found_under_another_name_than_its_class_says(folders, tmp_path):
    """So its logits are made in chunks, a critic shares it, and a head that the config calls tied is no part of it."""
    base = changed(folders("llama4"), tmp_path / "base", lambda _: None)
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    policy = load_causal(base, device="cpu", adapters=AdapterParams(rank=2))
    assert policy.split_head
    critic = scalar_beside(policy, str(base), AdapterParams(rank=2))
    assert critic.module.model.embed_tokens is policy.module.model.embed_tokens
    policy.module.base_model_prefix = "nothing"
    with pytest.raises(UserError, match="share_critic: transformers has no base model in a Llama4ForCausalLM"):
        scalar_beside(policy, str(base), AdapterParams(rank=2))


def test_a_whole_that_says_other_things_of_text_is_refused(folders, monkeypatch):
    kind = transformers.Mistral3ForConditionalGeneration
    forward = kind.forward

    def capped(self, *args, **options):
        found = forward(self, *args, **options)
        found.logits = 3 * torch.tanh(found.logits / 3)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", capped)
        with pytest.raises(UserError, match="could not be shown to say what the whole says of text"):
            load_causal(folders("mistral3"), device="cpu")
    load_causal(folders("mistral3"), device="cpu")


def test_nothing_but_the_text_half_is_made(folders):
    seeing = SeeingModel.of(folders("gemma3"))
    names = PartNames.of(seeing.config)
    assert set(names.whole.state_dict()) == {names.in_whole(name) for name in names.half.state_dict()}


def test_nobodys_random_numbers_are_touched(folders, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert shrunk(load_causal(folders("gemma3"), device="cpu").module)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


AXES = {"type": "mrope", "mrope_section": [16, 24, 24]}
NARROW_AXES = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default", "mrope_section": [8, 12, 12]}
HUB: dict[str, dict] = {
    "qwen2_vl": {"rope_scaling": AXES, "rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 32768},
    "qwen2_5_vl": {
        "rope_scaling": AXES | {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
        "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 32768, "max_position_embeddings": 256,
    },
    "qwen3_vl": {"text_config": {
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "rope_theta": 5e6, "attention_bias": True, "head_dim": 64, "tie_word_embeddings": False,
    }, "tie_word_embeddings": True},
    "qwen3_vl_moe": {"text_config": {"mlp_only_layers": [0], "decoder_sparse_step": 1}},
    "glm4v": {"text_config": {"rope_parameters": NARROW_AXES}},
    "glm4v_moe": {"text_config": {"rope_parameters": NARROW_AXES, "head_dim": 128}},
    "glm_ocr": {"text_config": {"rope_parameters": NARROW_AXES | {"partial_rotary_factor": 1.0}, "head_dim": 64}},
}  # fmt: skip
"""What configs on the hub say besides sizes, flat where they are."""


@pytest.mark.parametrize("family", HUB)
def test_the_plain_model_of_a_text_half(family):
    """By transformers' own defaults for all else, proved on the small copy."""
    seeing = SeeingModel("hub", transformers.CONFIG_MAPPING[family](**HUB[family]))
    half, text = half_of(seeing.config, "hub"), seeing.config.text_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(half)
    assert not {"mrope_section", "mrope_interleaved", "type"} & set(half.rope_parameters)
    assert half.tie_word_embeddings is seeing.config.tie_word_embeddings
    ours = half.to_dict()
    own = set(text.to_dict()) - {"_name_or_path", "model_type", "rope_parameters", "tie_word_embeddings"}
    assert {key: ours[key] for key in own} == {key: text.to_dict()[key] for key in own}
    seeing.require_exact(torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "kind", "why"),
    [
        ("qwen3_vl_moe", ("qwen3_moe", {"norm_topk_prob": False}), "apart from the whole's"),
        ("qwen2_5_vl", ("llama", {}), "has other parts than its"),
        ("paddleocr_vl", ("ernie4_5", {}), "apart from the whole's"),  # which turns other pairs of numbers
    ],
)
def test_a_plain_model_that_says_other_things_is_refused(monkeypatch, family, kind, why):
    config = transformers.CONFIG_MAPPING[family](**HUB.get(family, {}))
    monkeypatch.setitem(PLAIN, config.text_config.model_type, kind)
    config.text_config.rope_parameters.setdefault("mrope_section", [16, 24, 24])
    with pytest.raises(UserError, match=why):
        SeeingModel("hub", config).require_exact(torch.device("cpu"))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "voxtral"])
def test_wholes_with_numbers_of_their_own_and_without_a_word_on_ties(family):
    """LLaVA's newline, which transformers begins anew; and a config that has no ``tie_word_embeddings``."""
    config = transformers.CONFIG_MAPPING[family]()
    config.architectures = [config.__class__.__name__.replace("Config", "ForConditionalGeneration")]
    SeeingModel("hub", config).require_exact(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["PaddleOCRVL", "Mllama"])
def test_without_a_causal_class_of_the_text_it_is_refused(tmp_path, kind):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal language model of its text half alone"):
        load_causal(tmp_path, device="cpu")
