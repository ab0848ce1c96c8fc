"""Two ways from tokens to logits on a layout: the module's own forward, and a leaner one for the likes of Llama."""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.engines.live.pages import PagedDecode
from tandem.kernels import layers as kernels
from tandem.kernels import products
from tandem.models.attention import NO_MASK, Ask, Layout


class OwnForward:
    """The module's own forward on a layout, returning logits."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.keeps = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def __call__(self, token_BQ: Tensor, position_BQ: Tensor, layout: Layout, keep: Tensor | None = None) -> Tensor:
        """Logits [B, Q, V], of the positions ``keep`` only if given."""
        arguments: dict[str, Any] = {"logits_to_keep": keep} if self.keeps and keep is not None else {}
        logits = self.module(
            input_ids=token_BQ,
            position_ids=position_BQ,
            attention_mask=NO_MASK,
            use_cache=False,
            layout=layout,
            **arguments,
        ).logits
        return logits if keep is None or self.keeps else logits[:, keep]


class Unlike(Exception):
    """The model is not built like Llama; the message says where."""


class LeanForward:
    """The forward of Llama, Qwen, Mistral and all built like them, with few and fused operations.

    Queries, keys and values are one matrix product, as are gate and up: their parameters are laid one behind the other
    in memory (``stack``) and stay the module's own, so that an optimizer step is seen at once. Whether it computes
    what the module computes is for the caller to prove; the constructor raises Unlike where it surely does not.
    """

    def __init__(self, module: Any, *, positions: int | None, attention: list[Ask]) -> None:
        """``positions``: most tokens of a sequence. ``attention``: what each layer asks of it."""
        if positions is None:
            raise Unlike("its sequences may have any length")
        self.module = module
        base = module.base_model
        rope = getattr(base, "rotary_emb", None)
        if not isinstance(getattr(base, "layers", None), nn.ModuleList) or rope is None:
            raise Unlike("it has no list of layers with one rotary embedding")
        if getattr(rope, "rope_type", "default") in ("dynamic", "longrope"):
            raise Unlike("its rotary embedding depends on the length")
        self.norm = _norm(base, "norm")
        self.layers = [_Layer(layer, ask) for layer, ask in zip(base.layers, attention, strict=True)]
        weight = module.get_input_embeddings().weight
        self.cos_PD, self.sin_PD = (
            x[0].contiguous()
            for x in rope(weight.new_empty(1, 1, 1), torch.arange(positions, device=weight.device)[None])
        )
        if self.cos_PD.shape[-1] != self.layers[0].size:
            raise Unlike("it rotates a part of each head")

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def stack(self) -> None:
        """Stacks parameters again where they were taken apart (moved, cast, or given back from parking)."""
        for layer in self.layers:
            layer.stack()

    def __call__(self, token_BQ: Tensor, position_BQ: Tensor, layout: Layout, keep: Tensor | None = None) -> Tensor:
        """Logits [B, Q, V], of the positions ``keep`` only if given (B is 1 then)."""
        rows, columns = token_BQ.shape
        position_T = position_BQ.reshape(-1)
        residual_TE = F.embedding(token_BQ.reshape(-1), self.module.get_input_embeddings().weight)
        hidden_TE = kernels.rms_norm(residual_TE, *self.layers[0].before)
        afters = [*(layer.before for layer in self.layers[1:]), self.norm]
        for layer, after in zip(self.layers, afters, strict=True):
            qkv_THD = products.linear(hidden_TE, layer.qkv, layer.qkv_bias).view(len(hidden_TE), -1, layer.size)
            out = self._attend(qkv_THD, position_T, layout, layer, rows)
            out_TE = products.linear(out.reshape(len(hidden_TE), -1), layer.output.weight, layer.output.bias)
            hidden_TE, residual_TE = kernels.add_rms_norm(out_TE, residual_TE, *layer.between)
            gated_TI = kernels.gated_silu(products.linear(hidden_TE, layer.gate_up))
            down_TE = products.linear(gated_TI, layer.down.weight)
            hidden_TE, residual_TE = kernels.add_rms_norm(down_TE, residual_TE, *after)
        if keep is not None:
            hidden_TE, rows, columns = hidden_TE[keep], 1, len(keep)
        head = self.module.get_output_embeddings()
        return products.linear(hidden_TE, head.weight, head.bias).view(rows, columns, -1)

    def _attend(self, qkv_THD: Tensor, position_T: Tensor, layout: Layout, layer: _Layer, rows: int) -> Tensor:
        """Attention of one layer over tokens as they were projected, [T, H, D] in effect."""
        heads = [layer.heads, layer.kv_heads, layer.kv_heads]
        rotation = kernels.Rotation(self.cos_PD, self.sin_PD, layer.head_norms)
        if isinstance(layout, PagedDecode):
            # A token's position is its sequence's length, so that one kernel can do it all.
            query, key, value = qkv_THD.split(heads, dim=1)
            return layout.attend_heads(query, key, value, layer.ask, rotation)
        kernels.rotate_(qkv_THD, position_T, rotation, layer.heads, layer.kv_heads)
        query, key, value = (
            x.view(rows, len(qkv_THD) // rows, -1, layer.size).transpose(1, 2) for x in qkv_THD.split(heads, dim=1)
        )
        return layout.attend(query, key, value, layer.ask)


class _Layer:
    """The parameters of one decoder layer, where LeanForward reads them."""

    def __init__(self, layer: Any, ask: Ask) -> None:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        self.projections = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.output, self.down = _linear(attention, "o_proj"), _linear(mlp, "down_proj")
        self.gates = [_linear(mlp, "gate_proj"), _linear(mlp, "up_proj")]
        if any(linear.bias is not None for linear in (*self.gates, self.down)):
            raise Unlike("its gated layers have biases")
        if len({linear.bias is None for linear in self.projections}) > 1:
            raise Unlike("some of its projections have biases")
        if "silu" not in type(getattr(mlp, "act_fn", None)).__name__.lower():
            raise Unlike("its gate is not SiLU")
        self.size: int = getattr(attention, "head_dim", 0)
        if self.size < 2 or self.size % 2:
            raise Unlike(f"its heads have {self.size} dimensions")
        self.heads, self.kv_heads = (linear.out_features // self.size for linear in self.projections[:2])
        self.ask = ask
        self.before, self.between = _norm(layer, "input_layernorm"), _norm(layer, "post_attention_layernorm")
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention, "q_norm"), _norm(attention, "k_norm")
            if query[0].shape != (self.size,):
                raise Unlike("its query norm spans all heads")
            self.head_norms = (query[0], key[0], query[1])
        self.stack()

    def stack(self) -> None:
        """Lays what is multiplied together behind one another."""
        self.qkv = stack([linear.weight for linear in self.projections])
        self.gate_up = stack([linear.weight for linear in self.gates])
        biases = [linear.bias for linear in self.projections]
        self.qkv_bias = None if biases[0] is None else stack(biases)


@torch.no_grad()
def stack(parameters: Seq[Tensor]) -> Tensor:
    """One tensor of all their rows, which they become views of. Costs a copy the first time only."""
    first = parameters[0]
    sizes = [len(p) for p in parameters]
    shape = (sum(sizes), *first.shape[1:])
    expected = first.data_ptr()
    apart = False
    for p in parameters:
        apart |= p.data_ptr() != expected or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        expected += p.numel() * p.element_size()
    if not apart:
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    stacked = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, stacked.split(sizes), strict=True):
        p.data = part
    return stacked


def _linear(parent: Any, name: str) -> nn.Linear:
    found = getattr(parent, name, None)
    # Another subclass (quantized, with an adapter) computes something else.
    if not (type(found) is nn.Linear or type(found) is products.Linear):
        raise Unlike(f"its {name} is {type(found).__name__}" if found is not None else f"it has no {name}")
    return found


def _norm(parent: Any, name: str) -> tuple[Tensor, float]:
    found = getattr(parent, name, None)
    eps = getattr(found, "variance_epsilon", getattr(found, "eps", None))
    if found is None or "rmsnorm" not in type(found).__name__.lower() or eps is None:
        raise Unlike(f"its {name} is no RMS norm")
    return found.weight, float(eps)
