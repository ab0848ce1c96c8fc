"""How every family of models is sampled and trained, which is the table of docs/models.md, and how fast.

    python bench/families.py --write                  # the table, from tiny models on a CPU, each of them proved
    python bench/families.py --size 0.5b --device cuda --json bench/results/families_0.5b.json   # then --write again

Method. Every family is a random model of its transformers class at the same shapes: layers, widths, heads, vocabulary;
experts are 8 of half the width each, of which a token takes 2. Without --size they are tiny, with windows of 6 tokens
and other limits as short, and Tandem's log-probs, gradients and samples are compared with the module's own forward of
one sequence at a time, in float64 (bench/matrix.py).

With --size, --samples samples of --new-tokens tokens are drawn from prompts of random tokens, after a warm-up; then,
with --train, packed SFT steps of --train-tokens tokens in sequences of 512 are timed, after two that compile. "of
qwen2" is a rate over that of the first family. "reads" is what a decoding step has to read of weights, keys, values
and states (these it writes as well), in the middle of its samples, over what the first family's has to read.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matrix
import torch
import transformers
from common import Record, Row, arguments, measure, peak_gb, print_table, resolve_device, seconds_of, timed
from models import SIZES, byte_tokenizer, config_of
from training import batch_of, step
from transformers import AutoModelForCausalLM

from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.pages import PAGE as PAGE_SIZE
from tandem.methods.sft import SFT
from tandem.models.loading import Dtype, prepare_module
from tandem.models.proof.shrunk import trained_size
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
RATES = Path(__file__).parent / "results" / "families_0.5b.json"
MARKS = "<!-- families: written by bench/families.py -->\n", "<!-- families end -->\n"
Shape = dict[str, Any]
WITHOUT = ...
"""In place of an option: the config's own default."""
TINY: Shape = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """Models of one transformers class: its config at a shape."""

    name: str
    models: str
    kind: str
    options: Callable[[Shape], Shape]
    slower: str = ""
    """What the table says of it where the engine's own words are not enough."""

    def module(self, shape: Shape) -> Any:
        """A random model, with initial weights."""
        options = {key: x for key, x in (shape | IDS | self.options(shape)).items() if x is not WITHOUT}
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(**options)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _of(*parts: Callable[[Shape], Shape], **options: Any) -> Callable[[Shape], Shape]:
    """Options, and those that depend on the shape."""
    return lambda shape: {key: x for part in parts for key, x in part(shape).items()} | options


def _small(shape: Shape) -> bool:
    return shape["hidden_size"] < 100


def _sized(**options: tuple[Any, Any]) -> Callable[[Shape], Shape]:
    """Options of a tiny model, and of one of true size."""
    return lambda shape: {name: two[not _small(shape)] for name, two in options.items()}


def _window(shape: Shape) -> Shape:
    return {"sliding_window": 6 if _small(shape) else 512}


def _deltas(shape: Shape) -> Shape:
    """Heads of a linear attention: of true size twice as wide together as the model, as Qwen 3.5's are."""
    if _small(shape):
        return {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4}  # fmt: skip
    heads = shape["hidden_size"] // 64
    return {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": heads,
            "linear_num_value_heads": heads}  # fmt: skip


def _spaces(heads: str, state: str, chunk: str) -> Callable[[Shape], Shape]:
    """Heads of a state space (Mamba 2), together twice as wide as the model."""
    return lambda shape: (
        {heads: 8, state: 8, chunk: 8} if _small(shape) else {heads: shape["hidden_size"] // 32, state: 128, chunk: 256}
    )


def _turns(one: str, other: str = "full_attention") -> Callable[[Shape], Shape]:
    """Two kinds of layers by turns."""
    return lambda shape: {"layer_types": [(one, other)[i % 2] for i in range(shape["num_hidden_layers"])]}


def _twice(shape: Shape) -> Shape:
    """Half of the layers are given the keys and values of the others: of a tiny model, as many layers again."""
    layers = shape["num_hidden_layers"] * (2 if _small(shape) else 1)
    turns = _turns("sliding_attention")({"num_hidden_layers": layers})
    return turns | {"num_hidden_layers": layers, "num_kv_shared_layers": layers // 2}


def _thinned(shape: Shape) -> Shape:
    """In the first layers most of a feed-forward part's gates are 0."""
    layers = _twice(shape)["num_hidden_layers"]
    return {"activation_sparsity_pattern": [0.95 if i < layers // 3 else 0.0 for i in range(layers)]}


def _experts(count: str = "num_experts", each: str = "moe_intermediate_size") -> Callable[[Shape], Shape]:
    return lambda shape: {each: shape["intermediate_size"] // 2, count: 8, "num_experts_per_tok": 2}


def _named(**names: str) -> Callable[[Shape], Shape]:
    """A shape's numbers under other names."""
    return lambda shape: {name: shape[key] for name, key in names.items()}


def _long_half(shape: Shape) -> Shape:
    """LongRoPE over half of each head."""
    positions, pairs = shape["max_position_embeddings"], shape["head_dim"] // 4
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": positions * 3 // 4,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + i for i in range(pairs)],
    }
    return {"rope_parameters": rope}  # fmt: skip


_LATENT = _of(
    _experts("n_routed_experts"), _named(num_key_value_heads="num_attention_heads", qk_nope_head_dim="head_dim"),
    _sized(qk_rope_head_dim=(4, 32), v_head_dim=(6, 64), q_lora_rank=(16, 384), kv_lora_rank=(12, 256)),
    head_dim=WITHOUT, first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
_SPARSE = _of(_sized(index_head_dim=(8, 64), index_topk=(6, 128)), index_n_heads=16)
_LOCAL = _experts("num_local_experts", "intermediate_size")
_BY_TURNS = _of(_window, _turns("sliding_attention"))
_GEMMA4 = _of(
    _BY_TURNS, lambda shape: {"global_head_dim": 2 * shape["head_dim"]}, num_global_key_value_heads=1,
    attention_k_eq_v=True, hidden_size_per_layer_input=0, final_logit_softcapping=3.0,
)  # fmt: skip
_PER_LAYER = _of(_named(vocab_size_per_layer_input="vocab_size"), _sized(hidden_size_per_layer_input=(8, 128)))
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_OWN_ATTENTION = "transformers' class has an attention of its own"
_CHOOSES = "its attention chooses the keys that a token sees"
_SMALL_PARTS = "latent attention, a shared expert and a router of groups: more and smaller operations"
FAMILIES = (
    Family("qwen2", "Qwen 2, Qwen 2.5", "Qwen2", _of()),
    Family("qwen3", "Qwen 3", "Qwen3", _of()),
    Family("llama", "Llama 2 and 3", "Llama", _of(rope_parameters=_LLAMA3)),
    Family("mistral", "Mistral", "Mistral", _window),
    Family("ministral", "Ministral", "Ministral", _BY_TURNS),
    Family("ministral3", "Ministral 3", "Ministral3", _of(rope_parameters=_YARN | {"llama_4_scaling_beta": 0.5})),
    Family("gemma", "Gemma", "Gemma", _of(hidden_activation="gelu_pytorch_tanh")),
    Family("gemma2", "Gemma 2", "Gemma2",
           _of(_BY_TURNS, _named(query_pre_attn_scalar="head_dim"), attn_logit_softcapping=2.0,
               final_logit_softcapping=3.0),
           "soft caps of scores and logits"),
    Family("gemma3", "Gemma 3", "Gemma3Text", _of(_BY_TURNS, _named(query_pre_attn_scalar="head_dim"))),
    Family("gemma3n", "Gemma 3n", "Gemma3nText",
           _of(_twice, _window, _PER_LAYER, _sized(laurel_rank=(4, 64), altup_num_inputs=(3, 4)), _thinned,
               final_logit_softcapping=3.0)),
    Family("gemma4-e", "Gemma 4 E2B and E4B", "Gemma4Text",
           _of(_GEMMA4, _twice, _PER_LAYER, num_key_value_heads=1, attention_k_eq_v=False,
               use_double_wide_mlp=True),
           "each layer has an input of its own of every token: half as many operations again"),
    Family("gemma4", "Gemma 4 31B", "Gemma4Text", _GEMMA4),
    Family("gemma4-moe", "Gemma 4 26B-A4B", "Gemma4Text",
           _of(_GEMMA4, _experts(), num_experts_per_tok=WITHOUT, enable_moe_block=True, top_k_experts=2)),
    Family("llama4", "Llama 4", "Llama4Text",
           _of(_LOCAL, _turns("chunked_attention"), _sized(attention_chunk_size=(6, 512)),
               _named(intermediate_size_mlp="intermediate_size"), no_rope_layer_interval=2, floor_scale=16,
               attn_scale=0.5),
           "it attends by chunks, as only its mask says"),
    Family("phi", "Phi 2", "Phi", _of()),
    Family("phi3", "Phi 3, Phi 4", "Phi3", _window),
    Family("phi4-mini", "Phi 4 mini", "Phi3", _long_half),
    Family("olmo", "OLMo", "Olmo", _of()),
    Family("olmo2", "OLMo 2", "Olmo2", _of()),
    Family("olmo3", "OLMo 3", "Olmo3", _BY_TURNS),
    Family("granite", "Granite 3", "Granite",
           _of(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5)),
    Family("smollm3", "SmolLM 3", "SmolLM3", _of(no_rope_layer_interval=2)),
    Family("glm", "GLM 4 of 2024", "Glm", _of(attention_bias=True)),
    Family("glm4", "GLM 4", "Glm4", _of(attention_bias=True)),
    Family("starcoder2", "StarCoder 2", "Starcoder2", _of(_window, use_bias=True)),
    Family("cohere", "Command R", "Cohere", _of(logit_scale=0.3)),
    Family("cohere2", "Command R7B, Command A", "Cohere2", _of(_BY_TURNS, logit_scale=0.3)),
    Family("exaone4", "EXAONE 4", "Exaone4", _BY_TURNS),
    Family("ernie4.5", "ERNIE 4.5", "Ernie4_5", _of()),
    Family("seed-oss", "Seed-OSS", "SeedOss", _of()),
    Family("hunyuan", "Hunyuan", "HunYuanDenseV1", _of()),
    Family("apertus", "Apertus", "Apertus", _of()),
    Family("arcee", "Arcee AFM", "Arcee", _of()),
    Family("helium", "Helium", "Helium", _of()),
    Family("nemotron", "Nemotron 4, Minitron", "Nemotron", _of(), _OWN_ATTENTION),
    Family("stablelm", "StableLM 2", "StableLm", _of(), _OWN_ATTENTION),
    Family("gpt-neox", "Pythia, GPT-NeoX", "GPTNeoX",
           _of(num_key_value_heads=WITHOUT, head_dim=WITHOUT, rotary_pct=0.5)),
    Family("gpt2", "GPT-2", "GPT2", _of(num_key_value_heads=WITHOUT, head_dim=WITHOUT)),
    Family("opt", "OPT", "OPT", _named(ffn_dim="intermediate_size", word_embed_proj_dim="hidden_size")),
    Family("bloom", "BLOOM", "Bloom", _named(n_layer="num_hidden_layers", n_head="num_attention_heads"),
           _OWN_ATTENTION),
    Family("mixtral", "Mixtral", "Mixtral", _of(_LOCAL, _window)),
    Family("qwen2-moe", "Qwen 1.5 MoE, Qwen 2 MoE", "Qwen2Moe",
           _of(_experts(), _named(shared_expert_intermediate_size="intermediate_size"))),
    Family("ernie4.5-moe", "ERNIE 4.5 MoE", "Ernie4_5_Moe",
           _of(_experts("moe_num_experts"), moe_k=2, num_experts_per_tok=WITHOUT, moe_num_shared_experts=1)),
    Family("hunyuan-moe", "Hunyuan MoE", "HunYuanMoEV1",
           _of(_experts(each="intermediate_size"), moe_topk=2, num_experts_per_tok=WITHOUT)),
    Family("minimax-m2", "MiniMax M2", "MiniMaxM2", _of(_LOCAL, _sized(rotary_dim=(4, 32)))),
    Family("dots1", "dots.llm1", "Dots1", _of(_experts("n_routed_experts"), n_shared_experts=1)),
    Family("exaone-moe", "K-EXAONE", "ExaoneMoe", _of(_experts(), _BY_TURNS)),
    Family("qwen3-moe", "Qwen 3 MoE", "Qwen3Moe", _experts()),
    Family("olmoe", "OLMoE", "Olmoe", _experts(each="intermediate_size")),
    Family("gpt-oss", "gpt-oss", "GptOss", _of(_LOCAL, _BY_TURNS, rope_parameters=_YARN)),
    Family("granitemoe", "Granite 3 MoE", "GraniteMoe", _of(_LOCAL, logits_scaling=2.0)),
    Family("phimoe", "Phi 3.5 MoE", "Phimoe",
           _of(_LOCAL, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    Family("glm4-moe", "GLM 4.5", "Glm4Moe",
           _of(_experts("n_routed_experts"), first_k_dense_replace=1, n_group=1, topk_group=1)),
    Family("deepseek-v2", "DeepSeek V2", "DeepseekV2", _of(_LATENT, q_lora_rank=None)),
    Family("deepseek-v3", "DeepSeek V3, Kimi K2", "DeepseekV3", _of(_LATENT, rope_parameters=_YARN), _SMALL_PARTS),
    Family("deepseek-v3.2", "DeepSeek V3.2", "DeepseekV32", _of(_LATENT, _SPARSE), _CHOOSES),
    Family("glm5", "GLM 5", "GlmMoeDsa", _of(_LATENT, _SPARSE), _CHOOSES),
    Family("glm4-moe-lite", "GLM 4.7 Flash", "Glm4MoeLite", _LATENT, _SMALL_PARTS),
    Family("minicpm3", "MiniCPM 3", "MiniCPM3", _of(_LATENT),
           "it scales its residuals by a factor that its config does not name"),
    Family("qwen3-next", "Qwen 3 Next", "Qwen3Next",
           _of(_experts(), _turns("linear_attention"), _named(shared_expert_intermediate_size="intermediate_size"),
               _deltas)),
    Family("qwen3.5", "Qwen 3.5", "Qwen3_5Text",
           _of(_turns("linear_attention"), _deltas)),
    Family("qwen3.5-moe", "Qwen 3.5 MoE", "Qwen3_5MoeText",
           _of(_experts(), _turns("linear_attention"), _named(shared_expert_intermediate_size="intermediate_size"),
               _deltas)),
    Family("kimi-linear", "Kimi Linear", "KimiLinear",
           _of(_LATENT, _experts(), _turns("linear_attention"), _sized(linear_head_dim=(8, 128)),
               lambda shape: {"linear_num_heads": 4 if _small(shape) else shape["hidden_size"] // 64},
               q_lora_rank=None)),
    Family("olmo-hybrid", "OLMo Hybrid", "OlmoHybrid",
           _of(_turns("linear_attention"), _sized(linear_key_head_dim=(8, 48), linear_value_head_dim=(8, 96)),
               _named(linear_num_key_heads="num_attention_heads", linear_num_value_heads="num_attention_heads"))),
    Family("nemotron-h", "Nemotron H, Nemotron 3", "NemotronH",
           _of(_experts("n_routed_experts"), _spaces("mamba_num_heads", "ssm_state_size", "chunk_size"),
               lambda shape: {"moe_shared_expert_intermediate_size": shape["intermediate_size"] // 2},
               lambda shape: {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"]
                                             * max(1, shape["num_hidden_layers"] // 4)},
               _named(mamba_head_dim="head_dim"), n_groups=2)),
    Family("falcon-h1", "Falcon H1", "FalconH1",
           _of(_named(mamba_d_ssm="hidden_size", mamba_n_heads="num_attention_heads"),
               _sized(mamba_d_state=(8, 128), mamba_chunk_size=(8, 256)), mamba_d_head=WITHOUT,
               lm_head_multiplier=0.5)),
    Family("lfm2", "LFM 2", "Lfm2", _of(_turns("conv"), _sized(block_multiple_of=(8, 256)))),
    Family("lfm2-moe", "LFM 2 MoE", "Lfm2Moe", _of(_experts(), _turns("conv"), num_dense_layers=1)),
    Family("granite4", "Granite 4", "GraniteMoeHybrid",
           _of(_turns("mamba", "attention"), _named(shared_intermediate_size="intermediate_size"),
               _spaces("mamba_n_heads", "mamba_d_state", "mamba_chunk_size"), mamba_d_head=WITHOUT,
               num_local_experts=0, num_experts_per_tok=0)),
    Family("jamba", "Jamba", "Jamba",
           _of(_LOCAL, _sized(mamba_d_state=(8, 16)), attn_layer_period=2, attn_layer_offset=1, head_dim=WITHOUT)),
    Family("bamba", "Bamba", "Bamba",
           _of(_spaces("mamba_n_heads", "mamba_d_state", "mamba_chunk_size"),
               lambda shape: {"attn_layer_indices": [*range(1, shape["num_hidden_layers"], 2)]}, head_dim=WITHOUT)),
    Family("zamba", "Zamba", "Zamba",
           _of(_named(num_key_value_heads="num_attention_heads"),
               _sized(num_hidden_layers=(5, 24), mamba_d_state=(8, 16)), attn_layer_period=2, attn_layer_offset=1,
               head_dim=WITHOUT, tie_word_embeddings=True)),
    Family("mamba2", "Mamba 2", "Mamba2",
           _of(_spaces("num_heads", "state_size", "chunk_size"), n_groups=1)),
    Family("mamba", "Mamba", "Mamba", _sized(state_size=(8, 16))),
    Family("falcon-mamba", "Falcon Mamba", "FalconMamba", _sized(state_size=(8, 16))),
    Family("recurrent-gemma", "RecurrentGemma", "RecurrentGemma",
           _of(_named(lru_width="hidden_size"), _sized(attention_window_size=(6, 512), num_hidden_layers=(3, 24)))),
    Family("rwkv", "RWKV 4", "Rwkv",
           _named(attention_hidden_size="hidden_size", context_length="max_position_embeddings")),
)  # fmt: skip
NAMES = {family.name: family for family in FAMILIES}
LAYOUTS = {"packed": "packed", "padded": "padded", "one length": "by length"}
ENGINES = {
    "captured, fused": "fused",
    "captured, own forward": "own forward",
    "slots": "step by step",
    "padded": "padded",
    "padded, one length": "by length",
    "padded, one by one": "one by one",
}


def look(family: Family) -> matrix.Row:
    """What is found of its tiny model, sampled as on a GPU."""
    found = matrix.compare(family.name, _tiny(family), matrix.characters(), "captured")
    if not found.refused:
        return found
    reason = found.refused.removeprefix("way captured: ")
    found = matrix.compare(family.name, _tiny(family), matrix.characters())
    found.slower = found.slower or reason
    return found


def _tiny(family: Family) -> Any:
    module = family.module(TINY)
    trained_size(module)
    return module


def rates() -> dict[str, dict[str, str]]:
    """Of each family that was timed, by its column: its rates over those of the first, and what its steps read."""
    rows = json.loads(RATES.read_text())["rows"]
    columns = {"of_qwen2": "{:.0%}", "trained_of_qwen2": "{:.0%}", "reads": "{:.1f}"}
    return {row["system"]: {key: form.format(row[key]) for key, form in columns.items() if key in row} for row in rows}


def line_of(family: Family, found: matrix.Row) -> str:
    """Its line of the table."""
    timed = rates().get(family.name, {})
    sampled, trained, reads = (timed.get(key, "") for key in ("of_qwen2", "trained_of_qwen2", "reads"))
    how = f"{ENGINES[found.engine]} | {sampled} | {reads} | {LAYOUTS[found.layout]} | {trained}"
    return f"| {family.models} | {family.kind} | {how} | {family.slower or found.slower} |\n"


def table_of(page: str) -> str:
    """The lines of the families in the page."""
    return page.split(MARKS[0])[1].split(MARKS[1])[0]


HEADING = (
    "| models | class | sampled | rate | reads | trained | rate | why it is slower |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def write_table() -> None:
    """Looks at families one by one and writes the table. Raises ValueError where one does not hold."""
    rows = [(family, look(family)) for family in FAMILIES]
    for _, row in rows:
        print(row)
    if wrong := [family.name for family, row in rows if not row.holds]:
        raise ValueError(f"not what one sequence at a time gives: {', '.join(wrong)}")
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    lines = "".join(line_of(family, row) for family, row in rows)
    PAGE.write_text(before + MARKS[0] + HEADING + lines + MARKS[1] + rest.partition(MARKS[1])[2])


def rate(options: argparse.Namespace, record: Record, name: str) -> None:
    """Adds the family's rate."""
    config = config_of(options.size)
    shape = {key: getattr(config, key) for key in TINY if key != "head_dim"}
    shape["head_dim"] = config.hidden_size // config.num_attention_heads
    with torch.device(options.device):
        module = NAMES[name].module(shape)
    tokenizer = byte_tokenizer(config.vocab_size, eos=False)
    # Proved in float32, as what is loaded is.
    dtype: Dtype = "bfloat16" if options.device != "cpu" else "float32"
    model = prepare_module(module, tokenizer, dtype=dtype, device=options.device)
    model.compute_in(model.torch_dtype)
    row: Row = {"system": name, "trained": "packed" if model.packed else "padded"}
    row |= _sampling(options, model, tokenizer)
    if options.train:
        try:
            row |= _training(options, model)
        except torch.OutOfMemoryError as error:
            row["trained_error"] = str(error).splitlines()[0]
    record.add(row)


def _sampling(options: argparse.Namespace, model: Any, tokenizer: Any) -> Row:
    """How it is sampled from, and how fast."""
    module = model.module
    engine = LiveEngine(module, tokenizer, max_slots=options.samples)
    generator = torch.Generator().manual_seed(0)
    vocabulary = config_of(options.size).vocab_size
    prompt_SP = torch.randint(2, vocabulary, (options.samples, options.prompt_tokens), generator=generator)
    sampling = SamplingParams(max_new_tokens=options.new_tokens)
    asked = [Request(prompt_ids=tuple(p), seeds=(i,), sampling=sampling) for i, p in enumerate(prompt_SP.tolist())]
    times, out = timed(partial(engine.generate, asked), options.device, options.repeats)
    tokens = sum(len(sample.token_ids) for completions in out for sample in completions)
    fitting = engine.fitting
    row: Row = {
        "way": engine.way, "fused": fitting is not None and not fitting.own_because, "why": engine.slower_because,
        "parameters_m": sum(p.numel() for p in module.parameters()) / 1e6, "tokens": tokens,
        "tokens_per_second": tokens / times["seconds"], "peak_gb": peak_gb(options.device), **times,
    }  # fmt: skip
    if fitting is not None:
        held = options.samples * (options.prompt_tokens + options.new_tokens / 2) * fitting.shape.page_bytes / PAGE_SIZE
        states = 2 * options.samples * fitting.shape.state_bytes
        row["step_gb"] = (_weight_bytes(module) + held + states) / 1e9
    return row


def _weight_bytes(module: Any) -> int:
    """Of the weights that a step reads whole: all but embeddings that are no heads."""
    tied = getattr(module.get_output_embeddings(), "weight", None)
    tables = [part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    return 2 * sum(p.numel() for p in module.parameters() if p is tied or not any(p is table for table in tables))


def _training(options: argparse.Namespace, model: Any) -> Row:
    """How it is trained, and how fast."""
    optim = OptimParams(learning_rate=1e-6, total_steps=100)
    trainer = LocalTrainer(model, SFT().loss, optim, token_budget=options.train_tokens, compile="auto")
    rng, vocabulary = random.Random(0), config_of(options.size).vocab_size
    count = max(1, options.train_tokens // 512)
    batch = batch_of(
        [[rng.randrange(2, vocabulary) for _ in range(options.train_tokens // count)] for _ in range(count)]
    )
    first = [seconds_of(partial(step, trainer, batch), options.device) for _ in range(2)]
    times = [seconds_of(partial(step, trainer, batch), options.device) for _ in range(options.repeats)]
    return {
        "trained_tokens_per_second": batch.tokens / statistics.median(times), "trained_seconds": times,
        "trained_first_step": first[0], "trained_peak_gb": peak_gb(options.device),
    }  # fmt: skip


def _clean(device: str) -> None:
    """What one family has left is not the next one's."""
    gc.collect()
    peak_gb(device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    torch.compiler.reset()


RATIOS = {
    "tokens_per_second": "of_qwen2", "step_gb": "reads", "trained_tokens_per_second": "trained_of_qwen2",
}  # fmt: skip
"""What is measured, and its name over that of the first family."""


def main() -> None:
    """Writes the table, or measures rates."""
    parser = arguments(__doc__, list(NAMES), SIZES, "tiny")
    parser.set_defaults(size=None)
    parser.add_argument("--write", action="store_true", help="look at all and write the table of docs/models.md")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--train", action="store_true", help="time training as well")
    parser.add_argument("--train-tokens", type=int, default=16384, help="of a step")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.write:
        write_table()
        return
    options.size = options.size or "tiny"
    options.device = resolve_device(options.device)
    record = Record(options)
    for name in options.only or NAMES:
        # In one process: imports and kernels are most of what a family takes otherwise.
        measure(argparse.Namespace(**vars(options) | {"only": [name]}), record, {name: partial(rate, name=name)})
        _clean(options.device)
    first = next((row for row in record.rows if row["system"] == FAMILIES[0].name), {})
    for row in record.rows:
        for key, ratio in RATIOS.items():
            if key in row and key in first:
                row[ratio] = row[key] / first[key]
    record.write()
    columns = {"system": "family", "way": "way", "fused": "fused", "trained": "trained", "parameters_m": "M param.",
               "tokens_per_second": "tokens / s", "of_qwen2": "of qwen2", "reads": "reads", "peak_gb": "GB",
               "trained_tokens_per_second": "trained", "trained_of_qwen2": "of qwen2", "trained_peak_gb": "GB",
               "why": "why"}  # fmt: skip
    print_table(f"Sampling, {options.size}", columns, record.rows)


if __name__ == "__main__":
    main()
