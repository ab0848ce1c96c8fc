"""Any Hugging Face causal LM, or scalar head on one, from a folder or a hub name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tandem.errors import UserError, first_line
from tandem.kernels.products import speed_up_linears
from tandem.models.forward import LoadedModel, quiet_transformers
from tandem.models.probe import probe_forward
from tandem.seeds import derive_seed

log = logging.getLogger("tandem")
Dtype = Literal["float32", "bfloat16"]


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu")
    return device


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name. Raises UserError where there is none or it has no EOS token."""
    with _readable_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal(
    source: str | Path, *, dtype: Dtype = "float32", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """A causal LM with its tokenizer.

    Weights are loaded in float32, and cast to ``dtype`` by the trainer, scorer or engine that takes the model over: a
    trainer keeps float32 masters of them. Raises UserError where the folder or name holds no causal LM.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with _readable_errors(source, "causal language model"):
        module = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return prepare_module(module, tokenizer, dtype=dtype, device=device)


def load_scalar(
    source: str | Path,
    *,
    new_head: Literal["refuse", "zero", "random"],
    seed: int = 0,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model with one scalar a token (a reward model or a critic): ``AutoModelForSequenceClassification``, 1 label.

    A causal LM's folder has no such head: ``new_head`` says what to do then. ``zero`` starts a critic at value 0,
    ``random`` draws N(0, 1 / (hidden + 1)) (Stiennon et al., arXiv:2009.01325, appendix B), ``refuse`` raises
    UserError, since a reward model without a trained head rewards nothing in particular.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with _readable_errors(source, "model"):
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
        config.num_labels = 1
        config.pad_token_id = tokenizer.pad_token_id
        module, info = AutoModelForSequenceClassification.from_pretrained(
            str(source),
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    head = getattr(module, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{source}: {type(module).__name__} has no linear head named 'score'; use a decoder model")
    if any(name.startswith("score.") for name in info["missing_keys"]):
        if new_head == "refuse":
            raise UserError(f"{source}: no trained 'score' head in it; give a reward model (make one with tandem rm)")
        generator = torch.Generator().manual_seed(derive_seed(seed, "score head"))
        std = 0.0 if new_head == "zero" else (head.in_features + 1) ** -0.5
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    return prepare_module(module, tokenizer, dtype=dtype, device=device)


def prepare_module(module: Any, tokenizer: Any, *, dtype: Dtype = "float32", device: str = "cpu") -> LoadedModel:
    """Makes a transformers model ready for Tandem: on its device, on Tandem's attention, and proved on a probe.

    The module stays in eval mode for good: dropout would make trainer and sampler disagree about the same weights.
    """
    module.to(pick_device(device)).eval()
    speed_up_linears(module)
    model = LoadedModel(module=module, tokenizer=tokenizer, dtype=dtype)
    if reason := probe_forward(model):
        log.warning("%s: %s", type(module).__name__, reason)
    return model


@contextmanager
def _readable_errors(source: str | Path, what: str) -> Iterator[None]:
    """One line instead of the several screens that transformers prints for a wrong name."""
    path = Path(source)
    looks_local = path.is_absolute() or str(source).startswith((".", "~")) or path.exists()
    if looks_local and not path.is_dir():
        raise UserError(f"no model folder {source}")
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"{source}: no config.json in it, so it is no Hugging Face model folder")
    try:
        # "Some weights were newly initialized" is said by load_scalar in its own way, or is an error there.
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        where = "in that folder" if looks_local else "no folder of that name here, and not on the hub"
        raise UserError(f"{source}: cannot load a {what} ({where}): {first_line(error)}") from error
