"""A matrix of transformers' classes, windows and rotary kinds: what Tandem computes against one sequence at a time.

Every case is a small random model of trained size whose limits have 40 tokens, so that a short probe on the model does
not reach them, and sequences of up to 90. Log-probs and gradients of the packed or padded forward, and samples of the
live engine, are compared with the module's own forward in float64. A model that is refused says so::

    python bench/matrix.py                 # every class that transformers has, and the cases named here
    python bench/matrix.py --only llama phi3-longrope
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.models.attention import leave_sdpa
from tandem.models.forward import LoadedModel, forward
from tandem.models.loading import prepare_module
from tandem.models.proof.shrunk import shrunken_config, trained_size
from tandem.types import Request, SamplingParams, Sequence

LIMIT = 40
LENGTHS = (90, 7, 33, 61)
PROMPTS = (50, 3, 31)
NEW_TOKENS = 20


@dataclass(frozen=True)
class Case:
    """A class of transformers by its ``model_type``, and what its config has beside the defaults."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    narrow: int = 1
    """``shrunken_config``'s, as is ``each``."""
    each: int = 1
    initial: bool = False
    """Whether it is loaded with initial weights, and gets those of trained size later."""


_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
_LONG |= {"short_factor": [1.0] * 48, "long_factor": [1.0 + 0.5 * i for i in range(48)]}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
_WINDOW = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
CASES = {
    "qwen2-window": Case("qwen2", _WINDOW),
    "qwen2_moe-window": Case("qwen2_moe", _WINDOW),
    "qwen3_moe-window": Case("qwen3_moe", _WINDOW),
    "phimoe-window": Case("phimoe", {"sliding_window": 4096}),
    "phi3-longrope": Case(
        "phi3", {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_parameters": _LONG}
    ),
    "llama-yarn": Case("llama", {"max_position_embeddings": 16384, "rope_parameters": _YARN}),
    "llama-dynamic": Case("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-linear": Case("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-llama3": Case(
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama4_text": Case("llama4_text", {"num_hidden_layers": 4}),
    "llama4_text-initial": Case("llama4_text", {"num_hidden_layers": 4}, initial=True),
    "lfm2": Case("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2_moe-initial": Case(
        "lfm2_moe",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
        initial=True,
    ),
    "minimax_m3_vl_text-sparse": Case(
        "minimax_m3_vl_text", {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]}
    ),
    "minimax": Case("minimax", {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}),
    "xlstm": Case("xlstm", narrow=2),
    "zamba": Case("zamba", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}, each=2),
    "gpt_neo": Case("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
}


@dataclass
class Row:
    """What was found of one case. Gaps in nats, of the gradient as a share of its norm."""

    name: str
    layout: str = ""
    engine: str = ""
    logp_gap: float | None = None
    gradient_gap: float | None = None
    sampler_gap: float | None = None
    greedy: str = ""
    refused: str = ""
    slower: str = ""
    """Why its own forward is used where the fused one could be."""
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether everything that was computed is right."""
        gaps = ((self.logp_gap, 5e-4), (self.gradient_gap, 2e-3), (self.sampler_gap, 5e-4))
        return not self.error and self.greedy in ("", "same") and all(gap is None or gap < most for gap, most in gaps)


def cases() -> dict[str, Case]:
    """The named ones, and every causal LM of transformers with its default config."""
    return {kind: Case(kind) for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} | CASES


def make(case: Case) -> Any:
    """A small module of the case, with initial weights. Raises what transformers does where its default has holes."""
    config = CONFIG_MAPPING[case.kind](**case.config)
    config = shrunken_config(config, narrow=case.narrow, each=case.each, limit=LIMIT, turning=LIMIT)
    torch.manual_seed(0)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.kind])
    return kind._from_config(config, dtype=torch.float32).eval()


def look(name: str, case: Case, tokenizer: Any, way: Literal["auto", "captured"] = "auto") -> Row:
    """Compares everything of one case."""
    module = make(case)
    if not case.initial:
        trained_size(module)
    return compare(name, module, tokenizer, way)


def compare(name: str, module: Any, tokenizer: Any, way: Literal["auto", "captured"] = "auto") -> Row:
    """Compares everything of one module, which gets weights of trained size when it has been loaded."""
    row = Row(name)
    own = module.config._attn_implementation
    try:
        model = prepare_module(module, tokenizer)
        engine = LiveEngine(module, tokenizer, way=way)
    except UserError as error:
        row.refused = str(error)
        return row
    trained_size(module)
    truth = copy.deepcopy(module)
    truth.set_attn_implementation(own)
    # transformers' SDPA would leave soft caps out.
    leave_sdpa(truth)
    truth.double()
    if hasattr(truth, "set_experts_implementation"):
        # The grouped products of others know no float64.
        truth.set_experts_implementation("eager")
    row.layout = "packed" if model.packed else "one length" if model.equal_lengths else "padded"
    row.engine = engine.way + {"all": "", "length": ", one length", "none": ", one by one"}[engine.together]
    if engine.fitting is not None:
        row.slower = engine.fitting.own_because
        row.engine += ", own forward" if engine.fitting.own_because else ", fused"
    longest = _longest(engine)
    row.logp_gap, row.gradient_gap = _forward_gaps(model, truth, longest)
    row.sampler_gap, row.greedy = _sampling_gap(engine, truth, longest)
    return row


def _longest(engine: LiveEngine) -> int:
    return engine._limit()[0] or 1000


def _forward_gaps(model: LoadedModel, truth: Any, longest: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(1)
    lengths = LENGTHS if model.turning is not None else [min(n, longest) for n in LENGTHS]
    rows = [torch.randint(2, 60, (n,), generator=generator).tolist() for n in lengths]
    batch = stamp_weights(
        pack([Sequence(token_ids=r, trainable=[False] + [True] * (len(r) - 1)) for r in rows]), "token"
    )
    logp_T = forward(model, batch).logp_T
    assert logp_T is not None
    (-logp_T * batch.weight_T).sum().backward()
    expected = torch.cat([torch.cat([torch.zeros(1), _logp(truth, row)]) for row in rows])
    (-expected * batch.weight_T).sum().backward()
    pairs = [
        (a.grad.double(), b.grad)
        for a, b in zip(model.module.parameters(), truth.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    far = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    return float((logp_T - expected).detach().abs().max()), far**0.5


def _logp(truth: Any, ids: list[int], temperature: float = 1.0) -> Tensor:
    """float64 [len - 1]: of each token after the first."""
    logits = truth(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@torch.no_grad()
def _sampling_gap(engine: LiveEngine, truth: Any, longest: int) -> tuple[float, str]:
    generator = torch.Generator().manual_seed(2)
    gap, same = 0.0, True
    asked = []
    for temperature in (1.0, 0.0):
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature)
        for n in PROMPTS:
            prompt = torch.randint(2, 60, (min(n, longest - NEW_TOKENS),), generator=generator).tolist()
            asked.append(Request(prompt_ids=tuple(prompt), seeds=(0, 1) if temperature else (0,), sampling=sampling))
    for request, completions in zip(asked, engine.generate(asked), strict=True):
        start = len(request.prompt_ids)
        for completion in completions:
            ids = [*request.prompt_ids, *completion.token_ids]
            if request.sampling.temperature:
                found = torch.tensor(completion.untruncated_logp, dtype=torch.float64)
                gap = max(gap, float((found - _logp(truth, ids)[start - 1 :]).abs().max()))
            else:
                logits = truth(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
                # A tie within rounding may go either way.
                chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
                same &= bool((logits.max(-1).values - chosen < 1e-3).all())
    return gap, "same" if same else "differs"


def main() -> None:
    """Prints a line for each case; ends with 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cases")
    parser.add_argument("--way", choices=("auto", "captured"), default="auto", help="of the live engine")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for name, case in cases().items():
        if options.only and name not in options.only:
            continue
        try:
            row = look(name, case, characters(), options.way)
        except Exception as error:
            row = Row(name, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if options.only:
                traceback.print_exc()
        rows.append(row)
        print(
            "   " if row.holds else "XX ",
            *(
                f"{k}={v:.2g}" if isinstance(v, float) else f"{k}={v}" if k != "name" else v
                for k, v in asdict(row).items()
                if v not in ("", None)
            ),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(not all(row.holds for row in rows))


def characters() -> Any:
    """A tokenizer of 96 printable characters."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<pad>": 0, "<eos>": 1} | {chr(32 + i): i + 2 for i in range(94)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


if __name__ == "__main__":
    main()
