"""The linear layers of a frozen base in 4 or 8 bits: made tensor by tensor as a folder is read, or read as they are."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tandem.errors import UserError
from tandem.kernels import bits, products, quantized
from tandem.kernels.quantized import BLOCK, Coded, Kind
from tandem.models.moe.routers import routers_of

METHOD = "tandem"
"""What transformers knows the quantisation below by."""
SCALES = {1: ("scale",), 4: ("absmax", "nested_absmax", "nested_map", "nested_offset")}
"""Names of the buffers, by how many there are."""
READ_PAST = dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("dt_proj",))
"""By model types, linear layers whose weights transformers' code multiplies by itself: what stands in a layer's place,
or beside it, would not be used."""
log = logging.getLogger("tandem")


class Quantized(nn.Linear):
    """A frozen linear layer whose weight is in few bits.

    ``weight`` are codes once it has been given a weight, and as large as that before, so that what a folder holds can
    be compared with it. Scales are buffers: they stay as they are where parameters are cast.
    """

    def __init__(self, plain: nn.Linear, kind: Kind) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.bias = plain.bias
        self.kind: Kind = kind
        self.block = BLOCK
        self.shape = (self.out_features, self.in_features)
        self.names: tuple[str, ...] = ()
        self.total: int | None = None
        """The sum of the weight's bits in float32 (``kernels.bits``); None where nobody has seen them."""
        self.finite = True
        """Whether its numbers were."""
        # What a folder lacks is an error, and not to be drawn.
        self._is_hf_initialized = True
        self.weight.requires_grad_(False)

    def take(self, weight_OI: Tensor) -> None:
        """Becomes a layer of this weight: in few bits, where it lies."""
        weight_OI = weight_OI.detach().float()
        low, high = weight_OI.aminmax()
        self.finite = bool((high - low).isfinite())
        total_1 = torch.zeros(1, dtype=torch.int32, device=weight_OI.device)
        bits.prepare([bits.Job(0, weight_OI.reshape(1, -1), torch.float32, 0)])(total_1)
        self.total = int(total_1)
        self.adopt(quantized.quantize(weight_OI, self.kind))

    def adopt(self, coded: Coded) -> None:
        """Becomes a layer of what is in few bits already."""
        self.kind, self.block, self.shape = coded.kind, coded.block, coded.shape
        self.weight = nn.Parameter(coded.codes, requires_grad=False)
        self.names = SCALES[len(coded.scales)]
        for name, scale in zip(self.names, coded.scales, strict=True):
            self.register_buffer(name, scale)

    @property
    def coded(self) -> Coded:
        """Its weight as it is kept."""
        scales = [getattr(self, name) for name in self.names]
        return Coded(self.weight, scales, self.shape, self.kind, self.block)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Its weight [O, I], whole."""
        return quantized.dequantize(self.coded, dtype)

    @property
    def bytes(self) -> int:
        """Bytes of its weight, with scales."""
        return sum(x.numel() * x.element_size() for x in (self.weight, *self.coded.scales))

    def forward(self, input: Tensor) -> Tensor:
        return quantized.linear(input, self.coded, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def quantized_in(module: nn.Module) -> dict[str, Quantized]:
    """The layers in few bits, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Quantized)}


def share_codes(owner: nn.Module, module: nn.Module) -> None:
    """Gives a copy of a model the weights in few bits of the ``owner``, layer by layer: they are in memory once."""
    theirs = quantized_in(owner)
    for name, layer in quantized_in(module).items():
        layer.adopt(theirs[name].coded)


def numbers_in(module: nn.Module) -> int:
    """How many numbers its parameters stand for."""
    total = sum(p.numel() for p in module.parameters())
    return total + sum(q.in_features * q.out_features - q.weight.numel() for q in quantized_in(module).values())


def quantize_module(module: Any, kind: Kind) -> None:
    """Makes layers in few bits of the linear ones of a transformers model, those below its head."""
    require_apart(module)
    for name, plain in _linears(module).items():
        layer = Quantized(plain, kind)
        layer.take(plain.weight)
        _put(module, name, layer)
    _say_share(module, kind)


def dequantize_module(module: nn.Module) -> None:
    """Makes plain linear layers, in float32, of those in few bits."""
    for name, layer in quantized_in(module).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.dequantized()), layer.bias
        _put(module, name, plain)


def adopt_bitsandbytes(module: Any) -> None:
    """Makes layers of ours of bitsandbytes' in 4 bits: the same bits."""
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    bnb = quantized.require_bitsandbytes()
    for name, part in list(module.named_modules()):
        if isinstance(part, bnb.nn.Linear4bit):
            state = part.weight.quant_state
            layer = Quantized(part, "nf4")
            if state is not None:
                shape = (state.shape[0], state.shape[1])
                codes = part.weight.data.view(torch.uint8).reshape(-1, 1)
                layer.adopt(Coded(codes, quantized.scales_of(state), shape, state.quant_type, state.blocksize))
            _put(module, name, layer)
    if (theirs := getattr(module, "hf_quantizer", None)) is not None:
        theirs.remove_quantization_config(module)
        # Whoever saves what has been made whole again must not go that way back.
        conversions = getattr(module, "_weight_conversions", None) or []
        module._weight_conversions = [
            x for x in conversions if not any(isinstance(y, Bnb4bitDeserialize) for y in getattr(x, "operations", ()))
        ]


class QuantizationConfig(QuantizationConfigMixin):
    """Has transformers quantise each weight as soon as it has read it, on ``device``."""

    def __init__(self, kind: Kind, device: str) -> None:
        self.quant_method = METHOD
        self.kind: Kind = kind
        self.device = device


class Quantizer(HfQuantizer):
    """What transformers asks while it reads a folder."""

    is_trainable = False

    def __init__(self, quantization_config: QuantizationConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.config = quantization_config

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        for name, plain in _linears(model).items():
            _put(model, name, Quantized(plain, self.config.kind))

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        self.remove_quantization_config(model)
        _say_share(model, self.config.kind)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        name, _, part = param_name.rpartition(".")
        return part == "weight" and isinstance(model.get_submodule(name), Quantized)

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self.config.device)

    def is_serializable(self) -> bool:
        return False


class _Take(ConversionOps):
    """Gives weights to their layers."""

    def __init__(self, device: str) -> None:
        self.device = device

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, Quantized) and name.endswith(".weight") and weight.shape == layer.weight.shape:
                layer.take(weight.to(self.device))
                weight = layer.weight
            found[name] = weight
        return found


register_quantization_config(METHOD)(QuantizationConfig)
register_quantizer(METHOD)(Quantizer)


def _linears(module: Any) -> dict[str, nn.Linear]:
    """The plain linear layers of a transformers model below its head, by name: no routers of experts, and none that its
    class keeps in float32, as those are that choose what DeepSeek V3.2 and GLM 5 attend to."""
    base = {id(part) for part in module.base_model.modules()}
    apart = {id(module.get_output_embeddings()), *map(id, routers_of(module))}
    past = READ_PAST.get(module.config.model_type, ())
    kept = {*(module._keep_in_fp32_modules or ()), *(module._keep_in_fp32_modules_strict or ())}
    return {
        name: part
        for name, part in module.named_modules()
        if is_plain_linear(part) and id(part) in base and id(part) not in apart and name.rpartition(".")[2] not in past
        if not any(f".{one}." in f".{name}." for one in kept)
    }


def require_apart(module: Any) -> None:
    """Raises UserError where linear layers that would be in few bits have one weight (Zamba's shared blocks)."""
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    tied = (name for name, part in _linears(module).items() if owners[id(part.weight)] > 1)
    if (name := next(tied, None)) is not None:
        raise UserError(
            f"lora.quantize: the weight of {name} in {type(module).__name__} is that of other layers, too; take the "
            "model in full"
        )


def is_plain_linear(part: Any) -> bool:
    """Whether it is a matrix product and nothing else, of a weight that is whole: another subclass computes more."""
    return type(part) is nn.Linear or type(part) is products.Linear


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


def _say_share(module: Any, kind: Kind) -> None:
    """Warns where much of a model is no linear layer. Raises UserError where none is one."""
    layers = quantized_in(module)
    apart = {id(x.weight) for x in (module.get_input_embeddings(), module.get_output_embeddings()) if x is not None}
    few = sum(layer.in_features * layer.out_features for layer in layers.values())
    whole = sum(p.numel() for p in module.parameters() if id(p) not in apart)
    whole -= sum(layer.weight.numel() for layer in layers.values())
    if not few:
        raise UserError(
            f"lora.quantize: {type(module).__name__} has no linear layers (torch.nn.Linear) below its head; "
            "leave it out"
        )
    if whole > few / 9:
        log.warning(
            "%s: %.0f%% of its numbers below the head are linear layers and in %s; the others (stacked experts, say) "
            "stay as they are",
            type(module).__name__, 100 * few / (few + whole), kind,
        )  # fmt: skip
