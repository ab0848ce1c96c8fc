"""LoRA adapters on the linear layers of a transformers model, through peft: put on, read, written, merged.

The module stays the unmodified transformers class with the names of its other parts; only linear layers are replaced by
peft's, each with its frozen ``base_layer``. Modules stay in eval mode: dropout of adapters would make the trainer and
the sampler disagree, so there is none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tandem.errors import UserError, first_line
from tandem.kernels import bits
from tandem.lazy import extra
from tandem.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder
from tandem.models.quantized import quantized_in
from tandem.seeds import derive_seed

NAME = "default"
"""What peft knows the adapters by: there is one set on a model."""
PREFIX = "base_model.model."
"""Before every name in peft's files."""
ALL_LINEAR = "all-linear"
HEADS = ("score",)
"""A scalar head, which is trained whole, and saved with the adapters."""
log = logging.getLogger("tandem")


@dataclass(frozen=True, kw_only=True)
class AdapterParams:
    """Adapters that are to be put on a model: ``y = W x + s B A x``, W frozen, B at 0 (arXiv:2106.09685, equation 3).

    The scale s is ``alpha / rank``, with ``rslora`` ``alpha / sqrt(rank)`` (arXiv:2312.03732). ``dora`` trains each
    row's length apart from its direction (arXiv:2402.09353, equation 5).
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Last parts of the names of linear layers; ``all-linear``: all but the head."""
    dora: bool = False
    rslora: bool = False
    folder: str | None = None
    """A folder of adapters to begin with, whose config counts instead of all above."""
    quantize: Literal["none", "nf4", "fp8"] = "none"
    """How the linear layers of the base are kept (QLoRA, arXiv:2305.14314)."""
    seed: int = 0
    """The numbers that A starts with are drawn from it."""


@dataclass(kw_only=True)
class Adapters:
    """The adapters on a module: its trained parameters are theirs, and those of a scalar head."""

    module: Any
    config: Any
    """peft's."""
    base: str
    """Folder or hub name of the model that they are on."""
    base_sum: str
    """What its frozen parameters are known by (``sum_of``)."""
    fresh: bool
    """Whether they change nothing yet."""
    quantized: str
    """How the linear layers of the base are kept: ``none``, ``nf4``, ``fp4``, ``fp8``."""

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @contextmanager
    def off(self) -> Iterator[None]:
        """With the base alone."""
        layers = adapted(self.module)
        for layer in layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers.values():
                layer._disable_adapters = False

    @property
    def saved(self) -> dict[str, str]:
        """What a checkpoint says of them: ``config`` as JSON, ``base`` and ``base_sum``, and ``quantized``."""
        return {
            "config": json.dumps(_as_json(self.config)),
            "base": self.base,
            "base_sum": self.base_sum,
            "quantized": self.quantized,
        }

    def require_base(self, saved: Mapping[str, str]) -> None:
        """Raises UserError where saved adapters (``saved``) are of another base than this one."""
        if saved["base_sum"] != self.base_sum:
            raise UserError(
                f"the checkpoint's adapters were trained on another base ({saved['base']}, weights "
                f"{saved['base_sum']}) than {self.base} (weights {self.base_sum}); give the model that the run began "
                "with"
            )

    def require_quantized(self, saved: Mapping[str, str]) -> None:
        """Raises UserError where saved adapters were trained on a base that was kept in another way."""
        if (theirs := saved.get("quantized", "none")) != self.quantized:
            raise UserError(
                f"lora.quantize: the checkpoint's adapters were trained on a base that is kept as {theirs}, and this "
                f"one is kept as {self.quantized}; give the same"
            )

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes what peft reads, and the base's config: ``state`` has what is trained, whole, by its names here."""
        from safetensors.torch import save_file

        named = {peft_name(name): state[name].detach().contiguous() for name in self.trained}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(_as_json(self.config), indent=2, sort_keys=True) + "\n")
        self.module.config.architectures = [type(self.module).__name__]
        self.module.config.save_pretrained(folder)


def put_adapters(module: Any, params: AdapterParams, base: str) -> Adapters:
    """Puts adapters on the module, whose own parameters are frozen, but for a scalar head.

    Raises UserError where peft is missing, where no layer has the name of a target, and for a folder of adapters that
    are not of this model.
    """
    peft = require_peft()
    if params.folder is None:
        config = peft.LoraConfig(
            r=params.rank,
            lora_alpha=params.alpha,
            target_modules=sorted(_targets(module, params.targets)),
            use_dora=params.dora,
            use_rslora=params.rslora,
        )
    else:
        config = _config_of(peft, params.folder)
    adapters = _put(peft, module, config, base, fresh=params.folder is None)
    if params.folder is None:
        _start(module, params.seed)
    else:
        _fill(module, params.folder)
    return adapters


def put_saved(module: Any, saved: Mapping[str, str], base: str, state: Mapping[str, Tensor]) -> Adapters:
    """Puts those of a checkpoint on the module: what they are (``Adapters.saved``), and their values by name.

    Raises UserError where they are of another base than the module.
    """
    peft = require_peft()
    config = peft.LoraConfig.from_peft_type(**json.loads(saved["config"]) | {"inference_mode": False})
    adapters = _put(peft, module, config, base, fresh=False)
    adapters.require_base(saved)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    return adapters


def _put(peft: Any, module: Any, config: Any, base: str, *, fresh: bool) -> Adapters:
    scalar = _is_scalar(module)
    # Its path may be read from another folder later.
    named = str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base
    base_sum, layers = sum_of(module), quantized_in(module)
    # Heads are trained in their places here, and not in copies of peft's.
    config.base_model_name_or_path, config.modules_to_save = named, None
    config.task_type = "SEQ_CLS" if scalar else "CAUSAL_LM"
    try:
        peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    except ValueError as error:
        raise UserError(f"lora.targets: {first_line(error)}") from None
    _require_plain(module, base)
    if scalar:
        config.modules_to_save = [*HEADS]
        for head in HEADS:
            getattr(module, head).requires_grad_(True)
    module.eval()
    quantized = next((layer.kind for layer in layers.values()), "none")
    return Adapters(module=module, config=config, base=named, base_sum=base_sum, fresh=fresh, quantized=quantized)


def _require_plain(module: Any, base: str) -> None:
    """Raises UserError, naming a layer, for adapters that compute other things than ``put_adapters`` says.

    The head's would not be in log-probs, and what folds or fuses them knows of no others.
    """
    heads = {id(module.get_output_embeddings())} | {id(getattr(module, head, None)) for head in HEADS}
    for name, layer in adapted(module).items():
        variant = getattr(layer, "lora_variant", {}).get(NAME)
        linear = isinstance(layer.get_base_layer(), nn.Linear) and id(layer) not in heads
        known = variant is None or type(variant).__name__ == "DoraLinearVariant"
        if not (linear and known and NAME in layer.lora_A and layer.lora_B[NAME].bias is None):
            raise UserError(
                f"adapters on {base}: those of {name} are more than a pair of matrices on a linear layer below the "
                "head (lora_bias, aLoRA, an embedding, a head or a Conv1D), which Tandem does not train on; merge them "
                "into their base with peft, and put new ones on that"
            )


def _is_scalar(module: Any) -> bool:
    return any(hasattr(module, head) for head in HEADS)


def merge_folder(module: Any, folder: str) -> Any:
    """The module with the adapters of a folder added to its weights. Raises UserError where they are not its own."""
    peft = require_peft()
    try:
        config = peft.LoraConfig.from_pretrained(folder)
        if _is_scalar(module) and config.task_type == "CAUSAL_LM":
            # A critic begins with a policy's, and peft asks what they are for for what a language model has.
            config.task_type = None
        with warnings.catch_warnings():
            # Those that the folder lacks would add nothing.
            warnings.filterwarnings("error", "Found missing adapter keys")
            found = peft.PeftModel.from_pretrained(module, folder, config=config).merge_and_unload(safe_merge=True)
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, UserWarning) as error:
        raise UserError(f"{folder}: its adapters are not of its base: {first_line(error)}") from None
    return found.eval()


def adapted(module: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, length_O: Tensor | None = None) -> Tensor:
    """``W + s B A`` in float32, [O, I]; with DoRA's lengths, each row scaled to its own.

    arXiv:2106.09685, equation 3; arXiv:2402.09353, equation 5.
    """
    whole_OI = torch.addmm(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scale)
    return whole_OI if length_O is None else whole_OI * (length_O.float() / whole_OI.norm(dim=1))[:, None]


def peft_name(name: str) -> str:
    """What a parameter is called in peft's files."""
    if name.endswith(f"lora_magnitude_vector.{NAME}.weight"):
        return PREFIX + name.removesuffix(f".{NAME}.weight")
    return PREFIX + name.replace(f".{NAME}.", ".")


def plain_name(name: str) -> str:
    """What a parameter of a model with adapters is called in the model without."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def sum_of(module: nn.Module) -> str:
    """What a module's parameters are known by: their names, types, and every bit of them. A scalar head's are not
    among them.

    A layer that is ``Quantized`` counts with the weight that it was made of, so that the sum is that of the folder,
    wherever and however it was read; of weights that were in few bits in their folder with these.
    """
    found = hashlib.blake2b(digest_size=16)
    layers = {f"{name}.weight": layer for name, layer in quantized_in(module).items() if layer.total is not None}
    scales = {f"{n}.{s}": getattr(x, s) for n, x in quantized_in(module).items() if x.total is None for s in x.names}
    parameters = {name: p for name, p in module.named_parameters() if name.partition(".")[0] not in HEADS} | scales
    totals: dict[str, int] = {name: layer.total for name, layer in layers.items() if layer.total is not None}
    for device in dict.fromkeys(p.device for p in parameters.values()):
        here = {name: p for name, p in parameters.items() if p.device == device and name not in totals}
        total_N = torch.zeros(len(here), dtype=torch.int32, device=device)
        jobs = [bits.Job(i, p.detach().reshape(1, -1), p.dtype, 0) for i, p in enumerate(here.values())]
        bits.prepare(jobs)(total_N)
        totals |= dict(zip(here, total_N.tolist(), strict=True))
    for name, p in parameters.items():
        shape, dtype = (layers[name].shape, torch.float32) if name in layers else (tuple(p.shape), p.dtype)
        found.update(f"{name} {shape} {dtype} {totals[name]}\n".encode())
    return found.hexdigest()


def require_peft() -> Any:
    """Raises UserError where peft is not installed."""
    return extra("peft", "lora: adapters are those", "lora")


def _targets(module: Any, wanted: Seq[str]) -> set[str]:
    """The names of the linear layers that get adapters. Raises UserError for names that no layer has."""
    apart = {id(module.get_output_embeddings()), id(module.get_input_embeddings())}
    apart |= {id(getattr(module, head, None)) for head in HEADS}
    linear = {
        name.rpartition(".")[2] for name, p in module.named_modules() if isinstance(p, nn.Linear) and id(p) not in apart
    }
    heads = {name.rpartition(".")[2] for name, p in module.named_modules() if id(p) in apart}
    if not linear:
        raise UserError(f"lora: {type(module).__name__} has no linear layers (torch.nn.Linear) to put adapters on")
    for name in wanted:
        if name in heads:
            raise UserError(
                f"lora.targets: {name}: embeddings and heads stay frozen: log-probs are computed from the head's "
                "weight itself, a few tokens at a time, and would pass an adapter over; leave it out"
            )
        if name == "experts" or (name != ALL_LINEAR and name not in linear):
            raise UserError(
                f"lora.targets: {type(module).__name__} has no linear layer {name}; those it has: "
                f"{', '.join(sorted(linear))}" + ("; stacked experts are none" if "expert" in name else "")
            )
    return linear if ALL_LINEAR in wanted else set(wanted)


def _start(module: nn.Module, seed: int) -> None:
    """A as peft draws it, U(-1, 1) / sqrt(inputs), from numbers that depend on the seed and the layer's name alone."""
    for name, layer in adapted(module).items():
        weight_RI = layer.lora_A[NAME].weight
        generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
        drawn_RI = torch.rand(weight_RI.shape, generator=generator) * 2 - 1
        with torch.no_grad():
            weight_RI.copy_(drawn_RI * weight_RI.shape[1] ** -0.5)


def _config_of(peft: Any, folder: str) -> Any:
    """peft's config of a folder of adapters that are to be trained on."""
    found = adapter_folder(folder)
    if found is None:
        raise UserError(f"lora.adapter: {folder}: no {ADAPTER_CONFIG} in it, so it is no folder of adapters")
    config = peft.LoraConfig.from_pretrained(found.folder)
    others = [name for name in config.modules_to_save or () if name not in HEADS]
    refused = {
        "modules_to_save": others,
        "bias": config.bias != "none",
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
    }
    if wrong := [name for name, there in refused.items() if there]:
        raise UserError(
            f"{folder}: its adapters train {', '.join(wrong)} besides linear layers, which Tandem does not train on; "
            "merge them into their base with peft, and put new ones on that"
        )
    if config.lora_dropout:
        log.warning(
            "%s: its dropout of %g is left out: sampler and trainer would disagree", folder, config.lora_dropout
        )
    config.inference_mode, config.lora_dropout = False, 0.0
    return config


def _fill(module: Any, folder: str) -> None:
    """Reads the trained parameters from a folder; a head that it lacks stays as it is.

    Raises UserError where they are others than the module's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder).expanduser() / ADAPTER_WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    wanted = {peft_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in wanted.items() if name in found or "lora_" in name}
    shapes = {name: tuple(p.shape) for name, p in wanted.items()}
    if differing := sorted(n for n in {*shapes, *found} if n not in found or shapes.get(n) != tuple(found[n].shape)):
        name = differing[0]
        there = tuple(found[name].shape) if name in found else "not there"
        raise UserError(
            f"{path}: not adapters of this model: {name} is {there} in it, and here {shapes.get(name, 'not there')}; "
            "give the base that they were trained on as --model"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _as_json(config: Any) -> dict[str, Any]:
    """peft's config as its own files have it, ready to be loaded for use."""
    found = {**config.to_dict(), "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}
