"""Any Hugging Face causal LM, or scalar head on one, from a folder or a hub name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.arguments import checked
from tandem.errors import UserError, first_line
from tandem.kernels.products import speed_up_linears
from tandem.models.folder import located, readable_errors, with_tokenizer
from tandem.models.forward import LoadedModel
from tandem.models.lora.adapters import AdapterParams, idle_layers, merge_folder, put_adapters
from tandem.models.lora.folder import adapter_folder, base_of
from tandem.models.moe.routers import quieted
from tandem.models.proof.limits import model_config, require_language_model
from tandem.models.proof.probe import probe_forward
from tandem.models.quantized.layers import quantize_module, quantized_in
from tandem.models.recurrent.states import put_right
from tandem.models.scalar import NO_HEAD, forget_scale, scalar_class, scalar_keys, with_own_buffers
from tandem.models.seeing import SeeingModel
from tandem.models.trusted import Trusted, is_trusted
from tandem.models.weights import load_whole, require_finite
from tandem.seeds import derive_seed
from tandem.stages import stage

log = logging.getLogger("tandem")
Dtype = Literal["float32", "bfloat16"]
_STARTS = {"zero": "at 0", "random": "at random numbers drawn from the seed"}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {name!r} is none that Tandem computes on; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name}, and torch sees no GPU here; give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name}, and torch sees {torch.cuda.device_count()} GPUs here, counted from 0")
    return device


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder or hub name. Raises UserError where there is none or it has no EOS token."""
    try:
        with readable_errors(source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(with_tokenizer(source), trust_remote_code=is_trusted(source))
    except UserError as error:
        if "backend tokenizer" not in str(error):  # transformers' words where there is no file of one
            raise
        raise UserError(f"{source}: no tokenizer in it (tokenizer.json); save the model's there as well") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@checked
@stage("loading")
def load_causal(
    source: str | Path,
    *,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapters: AdapterParams | None = None,
) -> LoadedModel:
    """A causal LM with its tokenizer, and the ``adapters`` that are put on it, if any. Those of a folder of adapters
    are merged into their base, unless they are those.

    Weights are loaded in float32, or quantised as they are read (``AdapterParams.quantize``), and cast to ``dtype`` by
    the trainer, scorer or engine that takes the model over: a trainer keeps float32 masters of them. Raises UserError
    where the folder or name holds no causal LM (a reward model's holds none), or not each of its tensors, or numbers
    that are not finite.
    """
    source = Trusted(source) if trust_remote_code else source
    tokenizer = load_tokenizer(source)
    with readable_errors(source, "causal language model"):
        require_language_model(model_config(source), source)
        seeing = _seeing(source, device)
    module, _ = load_whole(
        AutoModelForCausalLM,
        base_of(source),
        what="causal language model",
        **_as_read(source, device, adapters),
    )
    model = _prepare_loaded(module, source, tokenizer, dtype, device, adapters)
    model.seeing = seeing
    return model


@checked
@stage("loading")
def load_scalar(
    source: str | Path,
    *,
    new_head: Literal["refuse", "zero", "random"],
    seed: int = 0,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapters: AdapterParams | None = None,
) -> LoadedModel:
    """A model with one scalar a token (a reward model or a critic): ``scalar_class``, 1 label.

    A causal LM's folder has no such head: ``new_head`` says what to do then. ``zero`` starts a critic at value 0,
    ``random`` draws N(0, 1 / (hidden + 1)) (Stiennon et al., arXiv:2009.01325, appendix B), ``refuse`` raises
    UserError, since a reward model without a trained head rewards nothing in particular. A new head is said in a
    line. What the config says of the scores' scale (``ScoreScale``) is left out: trained further, they have another.
    Raises UserError also where any other tensor is missing, and for numbers that are not finite.
    """
    source = Trusted(source) if trust_remote_code else source
    tokenizer = load_tokenizer(source)
    folder = adapter_folder(source)
    about = model_config(source)
    with readable_errors(source, "model"):
        _seeing(source, device)
    kind = scalar_class(about, str(source))
    try:
        module, lacking = load_whole(
            kind,
            base_of(source),
            what="model",
            new="score",
            config_changes=scalar_keys(about, tokenizer),
            **_as_read(source, device, adapters),
        )
        with_own_buffers(module)
    except AttributeError as error:
        # Base models of some kinds are not made to be a part of another.
        raise UserError(f"{source}: {kind.__name__} cannot be made: {first_line(error)}; use another model") from error
    head = getattr(module, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{source}: {type(module).__name__} has no linear head named 'score'; use a decoder model")
    # Adapters of such a model bring their head along.
    if lacking and not (folder is not None and folder.scalar):
        if new_head == "refuse":
            raise UserError(f"{source}: {NO_HEAD}")
        log.warning("%s: no 'score' head in it, so a new one starts %s", source, _STARTS[new_head])
        generator = torch.Generator().manual_seed(derive_seed(seed, "score head"))
        std = 0.0 if new_head == "zero" else (head.in_features + 1) ** -0.5
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    forget_scale(module.config)
    return _prepare_loaded(module, source, tokenizer, dtype, device, adapters)


def _seeing(source: str | Path, device: str) -> SeeingModel | None:
    """The model that also sees whose text half is to be loaded, once it is shown that this says what the whole does."""
    found = SeeingModel.of(located(base_of(source)))
    if found is not None:
        with stage("proof"):
            found.require_exact(pick_device(device))
    return found


def _merged(source: str | Path, adapters: AdapterParams | None) -> bool:
    """Whether it is a folder of adapters that become a part of their base."""
    return adapter_folder(source) is not None and (adapters is None or adapters.folder != str(source))


def _as_read(source: str | Path, device: str, adapters: AdapterParams | None) -> dict[str, Any]:
    """How weights are kept as soon as they are read. What is merged first is quantised when it has been."""
    quantize = "none" if adapters is None or _merged(source, adapters) else adapters.quantize
    return {"quantize": quantize, "device": str(pick_device(device))}


def _prepare_loaded(
    module: Any, source: str | Path, tokenizer: Any, dtype: Dtype, device: str, adapters: AdapterParams | None
) -> LoadedModel:
    # On its device, where a look at every number takes the least time, and before a probe that NaN would fail.
    module.to(pick_device(device))
    if pick_device(device).type == "cpu":
        # Else its numbers are the files', mapped, for as long as nothing is written to them: whoever saves into the
        # folder meanwhile would change them, or end this process by SIGBUS.
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    put_right(module)
    base = base_of(str(source))
    folder = adapter_folder(source)
    if folder is not None and _merged(source, adapters):
        if folder.quantized != "none" and not quantized_in(module):
            log.warning(
                "%s: its adapters were trained on a base in %s, and are added to that base in full here",
                source, folder.quantized,
            )  # fmt: skip
        module, base = merge_folder(module, str(folder.folder)), str(source)
        if adapters is not None and adapters.quantize != "none":
            quantize_module(module, adapters.quantize)
    put = None if adapters is None else put_adapters(module, adapters, base)
    require_finite(module, source)
    try:
        model = prepare_module(module, tokenizer, dtype=dtype, device=device)
    except RuntimeError as error:
        if not quantized_in(module) or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        raise UserError(
            f"lora.quantize: {type(module).__name__} does not compute with layers in few bits: it reads their weights "
            f"itself ({first_line(error)}); take the model in full"
        ) from error
    if put is not None and (idle := idle_layers(module)):
        log.warning(
            "%s: adapters on %s change nothing: its forward does not call these layers; name others in lora.targets",
            type(module).__name__, ", ".join(idle),
        )  # fmt: skip
    model.adapters = put
    return model


def prepare_module(module: Any, tokenizer: Any, *, dtype: Dtype = "float32", device: str = "cpu") -> LoadedModel:
    """Makes a transformers model ready for Tandem: on its device, on Tandem's attention, and proved on a probe.

    The module stays in eval mode for good: dropout would make trainer and sampler disagree about the same weights.
    """
    module.to(pick_device(device)).eval()
    if getattr(module.config, "rescale_every", 0):
        # In eval mode transformers' RWKV divides weights in place, lest float16 overflow: the divided ones would be
        # trained and saved.
        module.config.rescale_every = 0
    put_right(module)
    speed_up_linears(module)
    model = LoadedModel(module=module, tokenizer=tokenizer, dtype=dtype, router_logits=quieted(module.config))
    with stage("proof"):
        reason = probe_forward(model)
    if reason:
        log.warning("%s: %s", type(module).__name__, reason)
    return model
