"""Two ways from tokens to logits on a layout: the module's own forward, and a leaner one of what was read of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tandem.engines.live.layers import Attention, Joint, Latent, Layer, Unlike, queries_and_gates
from tandem.engines.live.mixers import Mixer
from tandem.engines.live.pages import CacheShape, PagedDecode, PagedPrefill
from tandem.engines.live.reading.decoder import read_decoder
from tandem.engines.live.stacked import Additions
from tandem.kernels import layers as kernels
from tandem.kernels import products
from tandem.kernels.layers import Norm
from tandem.kernels.logprob import HeadShape
from tandem.models.attention import Layout, no_mask
from tandem.models.recurrent.states import Held


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
            attention_mask=no_mask(token_BQ.device),
            use_cache=False,
            layout=layout,
            **arguments,
        ).logits
        return logits if keep is None or self.keeps else logits[:, keep]


class LeanForward:
    """The forward of a decoder that has been read (``reading.decoder``), with few and fused operations.

    Whether it computes what the module computes is for the caller to prove; the constructor raises Unlike where it
    surely does not.
    """

    def __init__(self, module: Any, *, positions: int | None, head_shape: HeadShape | None) -> None:
        """``positions``: most tokens of a sequence. ``head_shape``: what is done to the head's product, if known."""
        if head_shape is None:
            raise Unlike("its logits are more than a product of its head and its last hidden state")
        self.module = module
        self.head_shape = head_shape
        self.decoder = read_decoder(module, positions)
        attentions = [layer.attention for layer in self.decoder.layers]
        self.shared = {x.shares for x in attentions if isinstance(x, Attention)} - {None}
        """The numbers of attentions whose keys and values others are given."""
        latents = [x for x in attentions if isinstance(x, Latent) and x.keeps_states]
        kinds = {(x.heads, x.width, x.shared) for x in latents}
        self.latent = kinds.pop() if len(kinds) == 1 and len(latents) == len(attentions) else None
        """Heads of queries, width of a state, and of what keys share, where tokens are kept as their states."""
        head = module.get_output_embeddings()
        self.added = Additions([head]) if hasattr(head, "lora_A") else None
        """What adapters add to the head's product."""
        self.stack()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def shape_of(self, shape: CacheShape) -> CacheShape:
        """What it keeps of tokens, of which the module's own forward keeps ``shape``."""
        if self.latent is None:
            return shape
        heads, width, shared = self.latent
        return replace(shape, kept=((1, shared + width),) * len(shape.kept), latent=(heads, width))

    def stack(self) -> None:
        """Stacks parameters again where they were taken apart (moved, cast, or given back from parking)."""
        for product in self.decoder.products():
            product.stack()
        if self.added is not None:
            self.added.stack()

    def __call__(
        self,
        token_BQ: Tensor,
        position_BQ: Tensor,
        layout: Layout | None,
        keep: Tensor | None = None,
        held: Held | None = None,
    ) -> Tensor:
        """Logits [B, Q, V], of the positions ``keep`` only if given (B is 1 then).

        ``held``: the states of layers that carry one, for one token of each sequence (Q is 1 then). ``layout``: of the
        attention layers, if there are any.
        """
        rows, columns = token_BQ.shape
        decoder = self.decoder
        position_T = position_BQ.reshape(-1)
        token_T = token_BQ.reshape(-1)
        residual_TE = decoder.embedding(token_T)
        given_TLP = residual_TE if decoder.given is None else decoder.given(token_T, residual_TE)
        if decoder.embedding_scale != 1.0:
            residual_TE = residual_TE * decoder.embedding_scale
        if decoder.places is not None:
            residual_TE = residual_TE + decoder.places(position_T)
        step = _Step(position_T, given_TLP, layout, held, rows)
        if decoder.split is None:
            first = decoder.layers[0].before
            hidden_TE = residual_TE if first is None else kernels.norm(residual_TE, first)
            if decoder.residual is not None:
                residual_TE = residual_TE.to(decoder.residual)
            afters = [*(layer.before for layer in decoder.layers[1:]), decoder.norm]
            for layer, after in zip(decoder.layers, afters, strict=True):
                hidden_TE, residual_TE = self._through(layer, hidden_TE, residual_TE, after, step)
        else:
            streams_TSE = decoder.split.begin(residual_TE)
            for layer in decoder.layers:
                streams_TSE = self._through_streams(layer, streams_TSE, step)
            hidden_TE = decoder.split.end(streams_TSE)
            hidden_TE = hidden_TE if decoder.norm is None else kernels.norm(hidden_TE, decoder.norm)
        if keep is not None:
            hidden_TE, rows, columns = hidden_TE[keep], 1, len(keep)
        head = self.module.get_output_embeddings()
        logits_TV = products.linear(hidden_TE, head.weight, head.bias)
        if self.added is not None:
            self.added.add_(logits_TV, hidden_TE)
        return self.head_shape.of(logits_TV, in_place=True).view(rows, columns, -1)

    def _through(
        self, layer: Layer, hidden_TE: Tensor, residual_TE: Tensor, after: Norm | None, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """One layer, of the norm of the residual and that. Gives both for what comes ``after`` it."""
        out_TE = hidden_TE if layer.attention is None else self._mix(hidden_TE, layer.attention, step)
        if layer.feed is None or layer.attention is None:
            out_TE = out_TE if layer.feed is None else layer.feed(hidden_TE)
        elif layer.parallel:
            beside_TE = hidden_TE if layer.between is None else kernels.norm(residual_TE, layer.between)
            out_TE = out_TE + layer.feed(beside_TE)
        else:
            norm, scale, factor_1 = layer.after_attention, layer.scale, None
            if layer.beside is not None:
                _, residual_TE = kernels.add_norm(out_TE, residual_TE, None, first=norm, scale=scale)
                norm, scale, factor_1 = None, 1.0, layer.beside.factor_1
                out_TE = layer.beside(hidden_TE)
            hidden_TE, residual_TE = kernels.add_norm(
                out_TE, residual_TE, layer.between, first=norm, scale=scale, factor_1=factor_1
            )
            out_TE = layer.feed(hidden_TE)
            if layer.experts is not None:
                out_TE = layer.experts.add(out_TE, residual_TE)
        norm, scale = layer.after_feed, layer.scale
        if layer.injection is not None and layer.streams is None:
            _, residual_TE = kernels.add_norm(out_TE, residual_TE, None, first=norm, scale=scale)
            norm, scale = layer.injection.after, 1.0
            out_TE = layer.injection(residual_TE, step.given_TLP)
        return kernels.add_norm(out_TE, residual_TE, after, first=norm, scale=scale, factor_1=layer.factor_1)

    def _through_streams(self, layer: Layer, streams_TSE: Tensor, step: _Step) -> Tensor:
        """One layer of those that have several residuals, [T, S, E]."""
        streams = layer.streams
        assert streams is not None
        predicted_TSE = streams.predicted(streams_TSE)
        residual_TE = predicted_TSE[:, streams.seen].contiguous()
        hidden_TE = residual_TE if layer.before is None else kernels.norm(residual_TE, layer.before)
        out_TE, _ = self._through(layer, hidden_TE, residual_TE, None, step)
        streams_TSE = streams.corrected(predicted_TSE, out_TE)
        return streams_TSE if layer.injection is None else streams.inject(streams_TSE, layer.injection, step.given_TLP)

    def _mix(self, hidden_TE: Tensor, part: Attention | Latent | Mixer | Joint, step: _Step) -> Tensor:
        """What goes from token to token in one layer, [T, E]."""
        if isinstance(part, Joint):
            start_TE = hidden_TE if part.start == 1.0 else hidden_TE * part.start
            attended_TE = self._mix(start_TE, part.attention, step)
            carried_TE = self._mix(hidden_TE, part.mixer, step)
            if part.mixer_scale != 1.0:
                carried_TE = carried_TE * part.mixer_scale
            return torch.add(carried_TE, attended_TE, alpha=part.attention_scale)
        if isinstance(part, Mixer):
            assert step.held is not None
            return part(hidden_TE, step.held)
        return self._attend(hidden_TE, part, step)

    def _attend(self, hidden_TE: Tensor, attention: Attention | Latent, step: _Step) -> Tensor:
        """Attention of one layer, [T, E]."""
        layout, position_T, rows = step.layout, step.position_T, step.rows
        assert layout is not None
        if isinstance(attention, Latent):
            return attention.output(self._attend_latent(hidden_TE, position_T, layout, attention, rows).flatten(1))
        qkv_TO = attention.qkv(hidden_TE)
        parts = attention.parts(qkv_TO)
        if attention.query_scale_P is not None:
            # Before they are turned, which is the same.
            parts[0].mul_(attention.query_scale_P[position_T, None, None])
        if attention.key_scale != 1.0:
            parts[1].mul_(attention.key_scale)
        if isinstance(layout, PagedDecode) and attention.late_norms is None:
            # A token's position is its sequence's length, so that one kernel can do it all.
            out = layout.attend_heads(*parts, attention.ask, attention.rotation, attention.value_norm)
        else:
            apart = attention.by_head or attention.gated
            qkv_THD = (torch.cat(parts, dim=1) if apart else qkv_TO).view(len(qkv_TO), -1, attention.size)
            counts = [attention.heads, attention.kv_heads]
            value = qkv_THD[:, qkv_THD.shape[1] - attention.kv_heads :]
            if attention.value_norm is not None:
                value = kernels.norm(value.flatten(0, 1), attention.value_norm).view_as(value)
            elif attention.tied:
                value = value.clone()
            kernels.rotate_(qkv_THD, position_T, attention.rotation, *counts)
            query, key = qkv_THD[:, : sum(counts)].split(counts, dim=1)
            if attention.late_norms is not None:
                query, key = (
                    kernels.norm(x.flatten(0, 1), by).view_as(x)
                    for x, by in zip((query, key), attention.late_norms, strict=True)
                )
            query, key, value = (_heads_first(x, rows) for x in (query, key, value))
            if attention.shares is not None:
                key, value = step.passed[attention.shares]
            elif attention.ask.layer in self.shared:
                step.passed[attention.ask.layer] = key, value
            out = layout.attend(query, key, value, attention.ask)
        out_THD = out.reshape(len(hidden_TE), attention.heads, -1)
        if attention.gated:
            out_THD = out_THD * queries_and_gates(qkv_TO, attention.heads, attention.size)[1].sigmoid()
        return attention.output(out_THD.flatten(1))

    def _attend_latent(
        self, hidden_TE: Tensor, position_T: Tensor, layout: Layout, attention: Latent, rows: int
    ) -> Tensor:
        """[T, H, V]"""
        if self.latent is not None and isinstance(layout, PagedDecode):
            query_THD, latent_T1D = attention.narrow_parts(hidden_TE, position_T)
            return attention.widened(layout.attend_heads(query_THD, latent_T1D, None, attention.ask))
        *parts, latent_T1D = attention.parts(hidden_TE, position_T)
        query, key, value = (_heads_first(x, rows) for x in parts)
        kept = (latent_T1D,) if self.latent is not None and isinstance(layout, PagedPrefill) else ()
        out = layout.attend(query, key, value, attention.ask, *kept)
        return out.reshape(len(hidden_TE), attention.heads, -1)


@dataclass(frozen=True)
class _Step:
    """What all layers of a forward have in common."""

    position_T: Tensor
    given_TLP: Tensor
    layout: Layout | None
    held: Held | None
    rows: int
    passed: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of attentions that others are given."""


def _heads_first(x_THD: Tensor, rows: int) -> Tensor:
    """[T, H, D] → [rows, H, T / rows, D]."""
    return x_THD.unflatten(0, (rows, -1)).transpose(1, 2)
