"""What a decoder is built of, part by part, as the fused forward runs it (``reading`` makes it of a module)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.engines.live.mixers import Mixer
from tandem.engines.live.stacked import Additions, stack, weight_of
from tandem.kernels import layers as kernels
from tandem.kernels import products
from tandem.kernels.layers import Curve, Norm, Rotation
from tandem.models.attention import Ask
from tandem.models.quantized.layers import Quantized


class Unlike(Exception):
    """The model is not built of what is known here; the message says where."""


class Product:
    """Linear layers of one input as one matrix product: their parameters are laid one behind the other in memory.

    They stay the module's own, so that an optimizer step is seen at once. Adapters are added behind it. Those in few
    bits are multiplied one by one, each as it is in training.
    """

    def __init__(self, linears: Seq[nn.Linear]) -> None:
        self.linears = linears
        if len({linear.bias is None for linear in linears}) > 1:
            raise Unlike("some of the layers that could be one product have biases")
        self.added = Additions(linears) if any(hasattr(linear, "lora_A") for linear in linears) else None
        bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self.apart = bases if any(isinstance(base, Quantized) for base in bases) else []
        if len(bases) > 1 and any(isinstance(base, Conv1D) for base in bases):
            raise Unlike("parameters of layers that could be one product are transposed")
        self.stack()

    def stack(self) -> None:
        """Again where they were taken apart (moved, cast, or given back from parking)."""
        if not self.apart:
            self.weight = stack([weight_of(linear) for linear in self.linears])
            biases = [linear.bias for linear in self.linears]
            self.bias = None if biases[0] is None else stack(biases)
        if self.added is not None:
            self.added.stack()

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(self.apart) == 1:
            out_TO = self.apart[0](x_TI)
        elif self.apart:
            out_TO = torch.cat([linear(x_TI) for linear in self.apart], dim=1)
        else:
            out_TO = products.linear(x_TI, self.weight, self.bias)
        return out_TO if self.added is None else self.added.add_(out_TO, x_TI)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """From what goes into a layer's attention to what comes out of it."""

    ask: Ask
    heads: int
    kv_heads: int
    """Of keys and values of its own: 0 where it ``shares`` another's."""
    size: int
    shares: int | None
    """The number of the attention before it whose keys and values it is given (Gemma 3n and 4)."""
    qkv: Product
    tied: bool
    """Whether its values are its keys as they are projected (Gemma 4)."""
    by_head: bool
    """Whether the product has queries, key and value of one key-value head after the other (GPT-NeoX)."""
    gated: bool
    """Whether it has a gate behind each query, whose sigmoid scales what comes of the query (Qwen 3.5)."""
    wide_norms: tuple[Norm, Norm] | None
    """Of all queries, and of all keys (OLMo 2)."""
    rotation: Rotation
    late_norms: tuple[Norm, Norm] | None
    """Of each query and of each key, once they are turned (Hunyuan)."""
    query_scale_P: Tensor | None
    """What a query at each position is multiplied by; None: nothing (Ministral 3)."""
    key_scale: float
    """What each key is multiplied by (Falcon H1)."""
    value_norm: Norm | None
    """Of each value (Gemma 4)."""
    output: Product

    def products(self) -> tuple[Product, ...]:
        """All that are stacked."""
        return self.qkv, self.output

    def norms(self) -> tuple[Norm, ...]:
        pairs = (*(self.wide_norms or ()), *(self.late_norms or ()), *(self.rotation.norms or ()))
        return pairs if self.value_norm is None else (*pairs, self.value_norm)

    def parts(self, qkv_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], keys and values [T, Hkv, D] of the product, normed over all heads."""
        counts = [self.heads, self.kv_heads, 0 if self.tied else self.kv_heads]
        if self.by_head:
            shared = self.heads // self.kv_heads
            by_head = qkv_TO.view(len(qkv_TO), self.kv_heads, shared + 2, self.size)
            query, key, value = by_head.split([shared, 1, 1], dim=2)
            return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)
        if self.gated:
            query, _ = queries_and_gates(qkv_TO, self.heads, self.size)
            key, value = qkv_TO[:, 2 * self.heads * self.size :].view(len(qkv_TO), -1, self.size).chunk(2, dim=1)
            return query, key, value
        for part_TO, by in zip(
            qkv_TO.split([n * self.size for n in counts], dim=1), self.wide_norms or (), strict=False
        ):
            kernels.norm_(part_TO, by)
        query, key, value = qkv_TO.view(len(qkv_TO), -1, self.size).split(counts, dim=1)
        return query, key, key if self.tied else value


def queries_and_gates(qkv_TO: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """[T, H, D] each, of a product in which every query has its gate behind it."""
    query, gate = qkv_TO[:, : 2 * heads * size].view(len(qkv_TO), heads, 2 * size).chunk(2, dim=2)
    return query, gate


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Attention whose keys and values come from a narrow state of each token (latent attention, arXiv:2405.04434).

    The dimensions that turn are a head's last, and one key has them for all heads. Here they come first, with queries
    as with keys, so that their products are the same.
    """

    ask: Ask
    heads: int
    shared: int
    """Dimensions of a key that all heads share, those that turn among them."""
    narrow: Product
    """Queries, or the state that they come from; then the state of keys and values, and what keys share."""
    query: tuple[Norm, Product] | None
    """From their state; None: they have none."""
    key_value: tuple[Norm, Product]
    """From their state: for each head the rest of its key, and its value."""
    rotation: Rotation
    query_scale_P: Tensor | None
    output: Product

    def products(self) -> tuple[Product, ...]:
        """All that are stacked."""
        return self.narrow, *(product for _, product in self._from_states()), self.output

    def norms(self) -> tuple[Norm, ...]:
        return tuple(norm for norm, _ in self._from_states())

    def _from_states(self) -> tuple[tuple[Norm, Product], ...]:
        return (self.key_value,) if self.query is None else (self.query, self.key_value)

    @property
    def width(self) -> int:
        """Of the state of keys and values."""
        return self.key_value[1].linears[0].in_features

    @property
    def keeps_states(self) -> bool:
        """Whether tokens can be kept as their states: all that makes keys and values of them is a plain product."""
        product, ask = self.key_value[1], self.ask
        plain = not product.apart and product.linears[0].bias is None
        return plain and ask.plain and ask.sliding_window is None and ask.scaling is not None

    def parts(self, hidden_TE: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys [T, H, D], turned, and values [T, H, V]; and what tokens can be kept as, [T, 1, R + W].

        That is what their keys share, turned, and their state.
        """
        query_THD, key_TR, state_TW = self._projected(hidden_TE)
        own = query_THD.shape[2] - self.shared
        rest_THD = self.key_value[1](state_TW).view(len(hidden_TE), self.heads, -1)
        query_THD, key_TR = self._turned(query_THD, query_THD[..., :own], key_TR, position_T)
        key_THD = torch.cat((key_TR[:, None].expand(-1, self.heads, -1), rest_THD[..., :own]), dim=2)
        return query_THD, key_THD, rest_THD[..., own:], torch.cat((key_TR, state_TW), dim=1)[:, None]

    def narrow_parts(self, hidden_TE: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of such tokens [T, H, R + W], and those themselves [T, 1, R + W].

        A key is a product with a state, ``q . (A s) = (A' q) . s``: queries go through it instead (section 2.1.2).
        """
        query_THD, key_TR, state_TW = self._projected(hidden_TE)
        own_HTD = query_THD[..., : -self.shared].transpose(0, 1)
        narrow_HTW = torch.bmm(own_HTD, self._by_head(self.key_value[1].weight)[0])
        for down_RW, up_OR, scale in self._adapters():
            narrow_HTW = narrow_HTW + scale * (torch.bmm(own_HTD, self._by_head(up_OR)[0]) @ down_RW)
        query_THD, key_TR = self._turned(query_THD, narrow_HTW.transpose(0, 1), key_TR, position_T)
        return query_THD, torch.cat((key_TR, state_TW), dim=1)[:, None]

    def widened(self, out_THW: Tensor) -> Tensor:
        """Values [T, H, V] of the states that attention gives."""
        out_HTW = out_THW.transpose(0, 1)
        wide_HTV = torch.bmm(out_HTW, self._by_head(self.key_value[1].weight)[1].transpose(1, 2))
        for down_RW, up_OR, scale in self._adapters():
            up_HVR = self._by_head(up_OR)[1]
            wide_HTV = wide_HTV + scale * torch.bmm(out_HTW @ down_RW.T, up_HVR.transpose(1, 2))
        return wide_HTV.transpose(0, 1)

    def _by_head(self, weight_OW: Tensor) -> tuple[Tensor, Tensor]:
        """What makes the rest of keys [H, D, W], and values [H, V, W]: views."""
        weight_HOW = weight_OW.view(self.heads, -1, weight_OW.shape[1])
        own = self.query_size - self.shared
        return weight_HOW[:, :own], weight_HOW[:, own:]

    def _adapters(self) -> list[tuple[Tensor, Tensor, float]]:
        """A, B and scale of what is added to the product of the states."""
        added = self.key_value[1].added
        return [] if added is None else [(added.down_RI, up_OR, scale) for _, _, up_OR, scale in added.ups]

    @property
    def query_size(self) -> int:
        """Of a head."""
        product = self.narrow.linears[0] if self.query is None else self.query[1].linears[0]
        return product.out_features // self.heads

    def _projected(self, hidden_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D] whose last dimensions turn, what keys share [T, R], and the normed state [T, W]."""
        norm, _ = self.key_value
        narrow_TO = self.narrow(hidden_TE)
        query_TO, state_TW, key_TR = narrow_TO.split(
            [narrow_TO.shape[1] - self.width - self.shared, self.width, self.shared], dim=1
        )
        state_TW = kernels.norm(state_TW, norm)
        if self.query is not None:
            norm, product = self.query
            query_TO = product(kernels.norm(query_TO, norm))
        return query_TO.reshape(len(hidden_TE), self.heads, -1), key_TR, state_TW

    def _turned(self, query_THD: Tensor, rest_THD: Tensor, key_TR: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries what turns, turned, with ``rest`` behind it, and what keys share, turned."""
        shared = self.shared
        # One head more than there are queries: what all keys share turns once.
        both = query_THD.new_empty(len(query_THD), self.heads + 1, shared + rest_THD.shape[2])
        both[:, :-1, :shared], both[:, :-1, shared:] = query_THD[..., -shared:], rest_THD
        both[:, -1, :shared] = key_TR
        kernels.rotate_(both, position_T, self.rotation, self.heads, 1)
        query_THD = both[:, :-1]
        if self.query_scale_P is not None:
            query_THD = query_THD * self.query_scale_P[position_T, None, None]
        return query_THD, both[:, -1, :shared]


@dataclass(frozen=True, kw_only=True)
class Joint:
    """``attention_scale * attention(start * x) + mixer_scale * mixer(x)``: attention beside a state (Falcon H1)."""

    attention: Attention | Latent
    mixer: Mixer
    start: float
    attention_scale: float
    mixer_scale: float

    def products(self) -> tuple[Product, ...]:
        """All that are stacked."""
        return *self.attention.products(), *self.mixer.products()

    def norms(self) -> tuple[Norm, ...]:
        return *self.attention.norms(), *self.mixer.norms()


@dataclass(frozen=True, kw_only=True)
class Gated:
    """``down(curve(gate) * up)``."""

    gate_up: Product
    curve: Curve
    down: Product
    cut: float | None = None
    """Standard deviations: gates are what they are ``above`` their token's mean and so many of them (Gemma 3n)."""

    def __call__(self, x_TE: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up(x_TE).chunk(2, dim=-1)
        if self.cut is not None:
            gate_TI = above(gate_TI, self.cut)
        return self.down(kernels.gated(gate_TI, up_TI, self.curve))


def above(gate_TI: Tensor, cut: float) -> Tensor:
    """By how much each is more than its token's mean and so many standard deviations; 0 where it is not."""
    spread_T1, mean_T1 = torch.std_mean(gate_TI, dim=-1, correction=0, keepdim=True)
    return torch.relu(gate_TI - (mean_T1 + spread_T1 * cut))


@dataclass(frozen=True, kw_only=True)
class Ungated:
    """``down(curve(up))``."""

    up: Product
    curve: Callable[[Tensor], Tensor]
    down: Product

    def __call__(self, x_TE: Tensor) -> Tensor:
        return self.down(self.curve(self.up(x_TE)))


@dataclass(frozen=True)
class Whole:
    """Whatever else: the module's own part, such as experts with their router."""

    module: nn.Module

    def __call__(self, x_TE: Tensor) -> Tensor:
        out = self.module(x_TE[None])
        out_TE: Tensor = (out if isinstance(out, Tensor) else out[0]).view(x_TE.shape)
        return out_TE


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts beside a layer's feed-forward part: of the same residual, with norms of their own (Gemma 4)."""

    router: nn.Module
    """It is given the residual as it is."""
    before: Norm | None
    experts: nn.Module
    picks: tuple[int, ...]
    """Which of what the router gives they are given, after what goes through."""
    after: Norm | None
    after_feed: Norm | None
    """Of the feed-forward part, before both are added."""

    def norms(self) -> tuple[Norm | None, ...]:
        return self.before, self.after, self.after_feed

    def add(self, feed_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """What both give together."""
        routed = self.router(residual_TE)
        hidden_TE = residual_TE if self.before is None else kernels.norm(residual_TE, self.before)
        out_TE = self.experts(hidden_TE, *(routed[pick] for pick in self.picks))
        if self.after is not None:
            out_TE = kernels.norm(out_TE, self.after)
        return kernels.add_norm(feed_TE, out_TE, None, first=self.after_feed)[0]


@dataclass(frozen=True, kw_only=True)
class Injection:
    """The last part of a layer: ``up(curve(gate) * given)``, of its residual and what it is given of a token."""

    place: int
    """Among those that are given something."""
    gate: Product
    curve: Curve
    up: Product
    after: Norm | None

    def __call__(self, x_TE: Tensor, given_TLP: Tensor) -> Tensor:
        return self.up(kernels.gated(self.gate(x_TE), given_TLP[:, self.place], self.curve))


@dataclass(frozen=True, kw_only=True)
class Given:
    """What layers are given of a token beside what goes through: ``scale * (embedding + norm(projection))``.

    Of its id, and of what goes into the first layer (Gemma 3n and 4).
    """

    embedding: nn.Module
    projection: Product
    norm: Norm
    scale: float
    size: int

    def __call__(self, token_T: Tensor, embedded_TE: Tensor) -> Tensor:
        """[T, layers, size]"""
        own_SP = self.embedding(token_T).view(-1, self.size)
        projected_SP = self.projection(embedded_TE).view(-1, self.size)
        both_SP, _ = kernels.add_norm(projected_SP, own_SP, None, first=self.norm)
        return (both_SP * self.scale).view(len(token_T), -1, self.size)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What comes beside an attention, of the same input: ``x + norm(up(down(x)))``.

    A learned augmented residual (LAuReL, arXiv:2411.07501).
    """

    down: Product
    up: Product
    norm: Norm
    factor_1: Tensor
    """What the sum of the residual and both is multiplied by."""

    def __call__(self, x_TE: Tensor) -> Tensor:
        return kernels.add_norm(self.up(self.down(x_TE)), x_TE, None, first=self.norm)[0]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Several residuals, of which a layer's parts see one (alternating updates, AltUp, arXiv:2301.13310).

    Before them each is predicted of all, after them each is corrected by what has become of the one; by how much a
    router says, of the one.
    """

    seen: int
    norm: Norm
    """Of what the router is given."""
    scale_1: Tensor
    router: Product
    predict: Product
    correct: Product
    factor_E: Tensor | None
    """What the one is multiplied by before an injection, which is added to all but the first."""

    def _route(self, x_TE: Tensor) -> Tensor:
        return torch.tanh(self.router(kernels.norm(x_TE, self.norm) * self.scale_1))

    def predicted(self, x_TSE: Tensor) -> Tensor:
        streams = x_TSE.shape[1]
        weight_TSS = self.predict(self._route(x_TSE[:, self.seen])).view(-1, streams, streams)
        # Not in one operation: in 16 bits it is rounded in between, as the module does.
        return x_TSE + weight_TSS @ x_TSE

    def corrected(self, predicted_TSE: Tensor, out_TE: Tensor) -> Tensor:
        share_TS1 = self.correct(self._route(out_TE))[..., None] + 1
        return predicted_TSE + (out_TE - predicted_TSE[:, self.seen])[:, None] * share_TS1

    def inject(self, corrected_TSE: Tensor, injection: Injection, given_TLP: Tensor) -> Tensor:
        one_TE = corrected_TSE[:, self.seen]
        more_TE = injection(one_TE if self.factor_E is None else one_TE * self.factor_E, given_TLP)
        if injection.after is not None:
            more_TE = kernels.norm(more_TE, injection.after)
        corrected_TSE[:, 1:] += more_TE[:, None]
        return corrected_TSE


@dataclass(frozen=True, kw_only=True)
class Split:
    """How streams are made of what goes into the first layer, and how the last ones become one: their mean.

    All but the first go through a product of their own, and are made as large as the first.
    """

    begins: Product
    ends: tuple[Product, ...]

    def begin(self, x_TE: Tensor) -> Tensor:
        """[T, S, E]"""
        return _as_large_as_first([x_TE, *self.begins(x_TE).chunk(len(self.ends), dim=1)])

    def end(self, x_TSE: Tensor) -> Tensor:
        first_TE, *others = x_TSE.unbind(1)
        return _as_large_as_first([first_TE, *(to(x) for to, x in zip(self.ends, others, strict=True))]).mean(1)


def _as_large_as_first(streams: Seq[Tensor]) -> Tensor:
    """[T, S, E]: streams [T, E], of the first one's root mean square."""
    all_TSE = torch.stack(list(streams), dim=1)
    square_TS1 = all_TSE.square().mean(-1, keepdim=True)
    # That number no module names.
    size_TS1 = square_TS1[:, 1:].clamp(min=1e-5).sqrt()
    return torch.cat((all_TSE[:, :1], all_TSE[:, 1:] * square_TS1[:, :1].sqrt() / size_TS1), dim=1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attention and a feed-forward part, each added to the residual ``scale`` times, with norms before and after."""

    attention: Attention | Latent | Mixer | Joint | None
    feed: Gated | Ungated | Whole | None
    """One of both is None where a layer is the other alone (Nemotron H), with ``after_feed`` behind it."""
    parallel: bool
    """Whether both start from the layer's input (Cohere, GPT-NeoX)."""
    before: Norm | None
    after_attention: Norm | None
    between: Norm | None
    """Before the feed-forward part; None where there is none, or in a parallel layer where it takes the attention's."""
    after_feed: Norm | None
    scale: float
    experts: Experts | None = None
    beside: Beside | None = None
    injection: Injection | None = None
    streams: Streams | None = None
    factor: tuple[nn.Module, str] | None = None
    """The module and the name of the number that all is multiplied by in the end (Gemma 4)."""

    def products(self) -> Iterator[Product]:
        """All that are stacked."""
        yield from self.attention.products() if self.attention else ()
        for part in (self.feed, self.beside, self.injection, self.streams):
            yield from (x for x in vars(part).values() if isinstance(x, Product)) if part is not None else ()

    @property
    def factor_1(self) -> Tensor | None:
        return None if self.factor is None else getattr(*self.factor)

    def unread(self, module: nn.Module) -> str:
        """The first tensor of the module's layer that is not in here: it may do nothing yet, and something later."""
        linears = [linear for product in self.products() for linear in product.linears]
        known = {id(x) for linear in linears for x in (*linear.parameters(), *linear.buffers())}
        norms = [self.before, self.after_attention, self.between, self.after_feed]
        norms += self.attention.norms() if self.attention else ()
        norms += self.experts.norms() if self.experts else ()
        norms += (self.injection.after,) if self.injection else ()
        norms += [part.norm for part in (self.beside, self.streams) if part]
        known |= {id(x) for norm in norms if norm for x in (norm.weight, norm.bias)}
        known |= {id(self.factor_1), *((id(self.streams.scale_1), id(self.streams.factor_E)) if self.streams else ())}
        both = (self.attention.attention, self.attention.mixer) if isinstance(self.attention, Joint) else ()
        parts = self.attention, *both, self.feed
        known |= {id(part.ask.sinks) for part in parts if isinstance(part, Attention | Latent)}
        wholes = [part.module for part in parts if isinstance(part, Mixer | Whole)]
        wholes += [self.experts.router, self.experts.experts] if self.experts else []
        known |= {id(x) for whole in wholes for x in (*whole.parameters(), *whole.buffers())}
        tensors = (*module.named_parameters(), *module.named_buffers())
        return next((name for name, tensor in tensors if id(tensor) not in known), "")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """From tokens to the last hidden state."""

    embedding: nn.Module
    embedding_scale: float
    places: nn.Module | None
    """What is added to the embedding at each position (GPT-2)."""
    given: Given | None
    split: Split | None
    """Where layers have several residuals."""
    layers: list[Layer]
    norm: Norm | None
    residual: torch.dtype | None
    """In which layers are added up, where it is not the type that they compute in (Mamba); None: it is."""

    def products(self) -> Iterator[Product]:
        """All that are stacked."""
        if self.given is not None:
            yield self.given.projection
        if self.split is not None:
            yield from (self.split.begins, *self.split.ends)
        for layer in self.layers:
            yield from layer.products()
