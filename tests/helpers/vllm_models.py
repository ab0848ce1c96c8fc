"""Models small enough to start vLLM with, and a trainer's end that pushes one to an engine over gloo."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from helpers.models import make_tokenizer
from tandem.engines.vllm.engine import VLLMEngine
from tandem.sync.checksum import Sums
from tandem.sync.links import Link
from tandem.sync.plan import Plan, plan_of
from tandem.sync.source import WeightSource

VOCABULARY = 67
"""Not a multiple of 64, to which vLLM pads."""
POSITIONS = 128
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    # vLLM's attention on CPUs takes no smaller heads than 32.
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_model(architecture: str, *, seed: int, tied: bool, kv_heads: int = 1) -> Any:
    """A random causal LM whose distributions are far from uniform and whose biases and norms matter."""
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[architecture]
    torch.manual_seed(seed)
    options = _SIZE | {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
    module = transformers.AutoModelForCausalLM.from_config(config(**options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def save(module: Any, folder: Path) -> str:
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def reference_logp(module: Any, prompt: Iterable[int], token_ids: list[int], temperature: float = 1.0) -> list[float]:
    """What transformers gives the tokens after the prompt."""
    prompt = list(prompt)
    logits = module(torch.tensor([prompt + token_ids])).logits[0].float() / (temperature or 1.0)
    logp = logits.log_softmax(-1)
    return [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(token_ids)]


@dataclass
class Pusher:
    """The trainer's end, on a thread for each push."""

    engine: VLLMEngine
    source: WeightSource
    found: Seq[int | None] = ()

    @classmethod
    def connect(
        cls, engine: VLLMEngine, parameters: dict[str, Tensor], plan: Plan | None = None, *, ranks: int = 1
    ) -> Pusher:
        # A layer a bucket, so that a bucket's memory is used again before the push is over.
        plan = plan or plan_of(parameters.items(), bucket_bytes=1)
        source = WeightSource(parameters, torch.device("cpu"))
        port = source.listen(Link("gloo", "127.0.0.1", 0, 0, ranks + 1, plan, timeout_s=60), plan)
        links = [Link("gloo", "127.0.0.1", port, rank, ranks + 1, plan, timeout_s=60) for rank in range(1, ranks + 1)]
        thread = threading.Thread(target=source.connect)
        thread.start()
        engine.connect(links)
        thread.join()
        return cls(engine, source)

    def push(self, version: int) -> dict[str, Sums]:
        """Sends everything; returns the checksums of the parameters. ``found`` are the engine's."""
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self.source.send, True)
            self.found = self.engine.receive(version, check=True)
            return sending.result()

    def close(self) -> None:
        self.source.close()


def wrong_tensors(engine: VLLMEngine, sums: Sums) -> list[str]:
    """The engine's tensors that are not what the checksums say."""
    held = zip(engine.held(), engine.checksums(), strict=True)
    return [where for (part, where), found in held if found is not None and found != sums[part]]


def covered(engine: VLLMEngine) -> set[str]:
    """The pushed tensors that the engine has a checksum of."""
    held = zip(engine.held(), engine.checksums(), strict=True)
    return {part for (part, _), found in held if found is not None}
