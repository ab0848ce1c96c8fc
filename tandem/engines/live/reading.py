"""A decoder read from the module: what is watched while a few tokens go through it becomes a description.

Names say nothing here but where a norm's epsilon and a config's multipliers are. What feeds what is seen by where
tensors lie; what a norm, an activation or a rotation computes is found by computing it. Whether the whole then computes
what the module computes is for the caller to prove.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tandem.engines.live.deltas import read_delta
from tandem.engines.live.layers import (
    Attention,
    Beside,
    Decoder,
    Experts,
    Gated,
    Given,
    Injection,
    Joint,
    Latent,
    Layer,
    Product,
    Split,
    Streams,
    Ungated,
    Unlike,
    Whole,
    above,
    queries_and_gates,
)
from tandem.engines.live.mixers import Mixer
from tandem.engines.live.stacked import is_linear
from tandem.kernels import layers as kernels
from tandem.kernels.layers import CURVES, Curve, Norm, Rotation
from tandem.models.attention import Ask, PackedLayout, UnsupportedAttention, no_mask
from tandem.models.limits import turning_point
from tandem.models.states import Mixers, cache_argument, kept_in_modules, takes_list

POSITIONS = (0, 1, 2, 3, 5, 9, 17, 33)
"""Of the tokens that are watched, and the last that there is."""

LEAST, LEAST_LOW = 1e-3, 0.03
"""A difference of norms, over the truth's, that is more than rounding: in float32, and in 16 bits."""
Name = TypeVar("Name")


@torch.no_grad()
def read_decoder(module: Any, positions: int | None) -> Decoder:
    """What a causal LM is built of. ``positions``: most tokens of a sequence. Raises Unlike where it is not known."""
    if positions is None:
        raise Unlike("its sequences may have any length")
    base = module.base_model
    if takes_list(module) or kept_in_modules(module):
        raise Unlike("it keeps its states " + ("in a list" if takes_list(module) else "in its modules"))
    lists = (x for x in base.children() if isinstance(x, nn.ModuleList))
    blocks = max(lists, key=lambda one: sum(x.numel() for x in one.parameters()), default=None)
    if base is module or blocks is None:
        raise Unlike("it has no list of layers")
    watch = _Watch(base, blocks, positions, Mixers.of(module) or Mixers([]))
    watch.run()
    embedding = module.get_input_embeddings()
    embedded = next((call.output for call in watch.outside if call.module is embedding), torch.empty(0))
    multiplier = getattr(module.config.get_text_config(), "embedding_multiplier", None) or 1.0
    numbers = [call for call in watch.outside if not call.input.is_floating_point()]
    placed = next((call for call in numbers if torch.equal(call.input.flatten(), watch.position_T)), None)
    starts = {scale: embedded * scale + (placed.output if placed else 0.0) for scale in (1.0, multiplier)}
    split = watch.read_split(embedded) if watch.first.ndim > 3 else None
    if split is not None:
        starts = {scale: split.begin(start.flatten(0, 1)) for scale, start in starts.items()}
    first = watch.first if split is None else _by_token(watch.first)
    scale = _nearest(starts, first, "what goes into its first layer is not its embedding")
    ended = watch.last if split is None else split.end(_by_token(watch.last))
    last = [call for call in watch.outside if same(call.input, ended) or (split and near(call.input[0], ended))]
    norms = [norm for call in last if (norm := read_norm(call))]
    if len(norms) > 1 or (not norms and not same(ended, watch.result)):
        raise Unlike("what follows its last layer is not one norm")
    if norms and not any(same(call.output, watch.result) for call in last):
        raise Unlike("something follows its last norm")
    return Decoder(
        embedding=embedding, embedding_scale=scale, places=placed.module if placed else None,
        given=watch.read_given(embedded) if watch.given else None,
        split=split, layers=watch.layers, norm=norms[0] if norms else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Call:
    """A module that was called: the first tensor that went in, and the first that came out."""

    module: nn.Module
    input: Tensor
    output: Tensor
    more: bool
    """Whether more than the one tensor went in."""
    args: tuple[Any, ...] = ()
    kwargs: tuple[Any, ...] = ()
    """What went in by a name."""
    made: tuple[Any, ...] = ()
    """All that came out."""


@dataclass(frozen=True, eq=False)
class _Attended:
    """What a layer asked of its attention: query [1, H, T, D], key and value [1, Hkv, T, D], and what it got."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    ask: Ask


@dataclass(frozen=True)
class _Table:
    """Angles [P, R / 2] as a rotary embedding gives them, or none."""

    cos: Tensor
    sin: Tensor

    def rotation(self, pairs: bool) -> Rotation:
        cos, sin = (
            (x.repeat_interleave(2, dim=-1) if pairs else torch.cat((x, x), dim=-1)).contiguous()
            for x in (self.cos, self.sin)
        )
        return Rotation(cos, sin, pairs=pairs)


class _Watch(PackedLayout):
    """Writes down the calls that a few tokens make, and reads each layer when it has been called."""

    def __init__(self, base: Any, blocks: nn.ModuleList, positions: int, mixers: Mixers) -> None:
        self.base, self.blocks, self.mixers = base, blocks, mixers
        self.carrying = {part: Mixer(part, cache_argument(part)) for part in mixers.parts}
        self.deltas = {part: read_delta(part) for part in mixers.parts}
        self.device = base.get_input_embeddings().weight.device
        self.positions = positions
        places = [p for p in POSITIONS if p < positions - 1] + [positions - 1]
        self.position_T = torch.tensor(places).to(self.device)
        super().__init__(torch.tensor([0, len(places)]), self.device)
        self.outside: list[_Call] = []
        self.inside: list[_Call | _Attended] = []
        self.layers: list[Layer] = []
        self.attended: list[_Attended] = []
        """So far: layers without attention keep no keys and values, and have no number among those that do."""
        self.given: list[Tensor] = []
        """What layers were given beside what goes through, [T, P] each."""
        self.tables: list[_Table] = []
        self.rotations: dict[tuple[int, bool], Rotation] = {}
        self.query_scale_P = query_scale(base.config, positions, self.device)
        self.first = self.last = self.result = torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        out = super().attend(query, key, value, ask)
        self.attended.append(_Attended(query, key, value, out, ask._replace(layer=len(self.attended))))
        self.inside.append(self.attended[-1])
        return out

    def run(self) -> None:
        within = {part for block in self.blocks for part in block.modules()}
        # A layer with adapters is one product.
        adapted = [part for part in self.base.modules() if hasattr(part, "lora_A")]
        hidden = {inner for part in adapted for inner in part.modules()} - set(adapted)
        with ExitStack() as hooks, self.mixers.apart(self), _told_apart(self.blocks):
            for part in (x for x in self.base.modules() if x not in hidden):
                if part in within:
                    hook = self._layer if part in set(self.blocks) else self._inner
                    if not isinstance(part, nn.ModuleList):
                        hooks.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
                elif part in adapted or not any(True for _ in part.children()):
                    hooks.callback(part.register_forward_hook(self._outer, with_kwargs=True).remove)
            generator = torch.Generator().manual_seed(0)
            vocabulary = self.base.get_input_embeddings().weight.shape[0]
            token_T = torch.randint(vocabulary, self.position_T.shape, generator=generator)
            try:
                result = self.base(
                    input_ids=token_T[None].to(self.device), position_ids=self.position_T[None],
                    attention_mask=no_mask(self.device), use_cache=False, layout=self,
                )  # fmt: skip
            except UnsupportedAttention as error:
                raise Unlike(f"its attention needs what pages lack ({error})") from error
        self.result = result["last_hidden_state"]
        if len(self.layers) != len(self.blocks):
            raise Unlike("some of its layers were not called")

    def _outer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pair = isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)
        if pair or (isinstance(output, Tensor) and output.is_complex()):
            self._tabulate(module, args, kwargs)
        elif (call := _call(module, args, kwargs, output)) is not None:
            self.outside.append(call)

    def _inner(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (call := _call(module, args, kwargs, output)) is not None:
            self.inside.append(call)

    def _layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = _call(module, args, kwargs, output)
        assert call is not None
        if not self.layers:
            self.first = call.input
        elif not same(call.input, self.last):
            raise Unlike("something comes between its layers")
        self.last = call.output
        self.layers.append(self._read(call))
        self.inside.clear()

    def _tabulate(self, module: Any, args: Any, kwargs: Any) -> None:
        """The angles of all positions, from a module that was asked for some."""
        turning = turning_point(self.base.config)
        if turning is not None and self.positions > turning:
            raise Unlike(f"its rotary embedding turns all tokens otherwise beyond {turning}")
        every = torch.arange(self.positions, device=self.device)[None]

        def swapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # Models that also see have positions of three kinds, equal where there is only text.
            return x.reshape(-1)[:1].view(1, 1, 1) if x.is_floating_point() else every.expand(*x.shape[:-2], 1, -1)

        angles = module.forward(*map(swapped, args), **{k: swapped(v) for k, v in kwargs.items()})
        if isinstance(angles, Tensor):
            # As complex numbers, one for each two dimensions (DeepSeek V2).
            self.tables.append(_Table(angles[0].real.contiguous(), angles[0].imag.contiguous()))
            return
        cos, sin = (x[0] for x in angles)
        half = cos.shape[-1] // 2
        for columns, again in ((slice(0, half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
            if torch.equal(cos[:, columns], cos[:, again]):
                cos, sin = cos[:, columns], sin[:, columns]
                break
        for dtype in dict.fromkeys((cos.dtype, torch.float32)):
            self.tables.append(_Table(cos.to(dtype), sin.to(dtype)))

    def _read(self, whole: _Call) -> Layer:
        all_of, streams = whole, None
        if whole.input.ndim > 3:
            streams, whole = self._read_streams(whole)
        children = set(whole.module.children())
        # Dropout does nothing here.
        calls = [
            c for c in self.inside if isinstance(c, _Call) and c.module in children and not same(c.input, c.output)
        ]
        norms = {call: norm for call in calls if (norm := read_norm(call))}
        others = [call for call in calls if call not in norms]
        attentions = [x for x in self.inside if isinstance(x, _Attended)]
        mixers = [call for call in others if call.module in self.carrying]
        attended, attention = next(iter(attentions), None), next(iter(mixers), None)
        joint: Joint | None = None
        if attended is not None:
            place = self.inside.index(attended)
            attention = next((call for call in others if self.inside.index(call) > place), None)
            if mixers and attention is not None:
                rest = [call for call in others if call not in (attention, *mixers)]
                joint, attention = self._read_joint(whole, attention, mixers, attended, rest, norms)
                others, mixers = [attention, *rest], []
        used: list[_Call] = []

        def feeding(call: _Call) -> _Call | None:
            """The norm whose output goes into it."""
            found = next((n for n in norms if same(n.output, call.input)), None)
            used.extend([found] if found else [])
            return found

        def following(call: _Call) -> _Call | None:
            found = next((n for n in norms if same(n.input, call.output)), None)
            used.extend([found] if found else [])
            return found

        multiplier = getattr(self.base.config.get_text_config(), "residual_multiplier", None) or 1.0

        def read_mixing(call: _Call) -> Attention | Latent | Mixer | Joint:
            if joint is not None:
                return joint
            return self._read_mixer(call) if attended is None else self._read_attention(call, attended)

        injection = self._read_injection(whole, others)
        if injection is not None:
            gate, up = (call for call in others if is_linear(call.module))
            others = others[: others.index(gate)]
            after_up = following(up)
            injection = replace(injection, after=norms[after_up] if after_up else None)
        if streams is not None:
            streams = self._read_corrected(all_of, whole.output, streams, injection, gate.input if injection else None)

        def read_end(sums: dict[float, Tensor]) -> tuple[float, tuple[nn.Module, str] | None]:
            """The scale by which parts are added, of those of which the sums are, and what all is multiplied by."""
            if injection is not None and streams is None:
                scale = _nearest(sums, gate.input, "what a layer is given does not go through its residual")
                sums = {scale: gate.input + (after_up or up).output}
            ends = {
                (scale, name): end * factor for scale, end in sums.items() for name, factor in _singles(whole.module)
            }
            ends |= {(scale, ""): end for scale, end in sums.items()}
            scale, name = _nearest(ends, whole.output, "what leaves a layer is not a sum of its parts")
            return scale, (whole.module, name) if name else None

        def checked(layer: Layer) -> Layer:
            if set(used) != set(norms):
                raise Unlike("it has norms of another place")
            if unread := layer.unread(whole.module):
                raise Unlike(f"it has {unread} of unknown use")
            return layer

        if len(others) == 1 and len(attentions) + len(mixers) <= 1:
            (part,) = others
            before, after = feeding(part), following(part)
            if not same((before or part).input, whole.input):
                raise Unlike("its parts do not start from their layer's input")
            scale, factor = read_end({s: whole.input + s * (after or part).output for s in {1.0, multiplier}})
            return checked(
                Layer(
                    attention=read_mixing(part) if part is attention else None,
                    feed=None if part is attention else self._read_feed(part),
                    parallel=False,
                    before=norms[before] if before else None,
                    after_attention=None,
                    between=None,
                    after_feed=norms[after] if after else None,
                    scale=scale,
                    injection=injection,
                    streams=streams,
                    factor=factor,
                )
            )
        if len(attentions) + len(mixers) != 1:
            raise Unlike("it has layers without attention, or with several")
        rest = [call for call in others if call is not attention]
        aside = rest.pop(0) if attention and len(rest) == 2 and same(rest[0].input, attention.input) else None
        if attention is None or len(rest) not in (1, 3):
            raise Unlike("a layer is not one attention and one feed-forward part")
        feed = rest[0]
        before, after_attention, after_feed = feeding(attention), following(attention), following(feed)
        if not same((before or attention).input, whole.input):
            raise Unlike("its attention does not start from the layer's input")
        between = None if same(feed.input, attention.input) else feeding(feed)
        start = (between or feed).input
        parallel = same(feed.input, attention.input) or same(start, whole.input)
        attention_out, feed_out = (after_attention or attention).output, (after_feed or feed).output
        experts: Experts | None = None
        if len(rest) == 3:
            router, routed = rest[1:]
            before_routed, after_routed = feeding(routed), following(routed)
            picks = [next((i for i, x in enumerate(router.made) if x is other), -1) for other in routed.args[1:]]
            starts = router.input, (before_routed or routed).input
            if not all(same(x, start) for x in starts) or router.more or routed.kwargs or -1 in picks:
                raise Unlike("a layer is not one attention and one feed-forward part")
            experts = Experts(
                router=router.module, experts=routed.module, picks=tuple(picks),
                before=norms[before_routed] if before_routed else None,
                after=norms[after_routed] if after_routed else None,
                after_feed=norms[after_feed] if after_feed else None,
            )  # fmt: skip
            feed_out = feed_out + (after_routed or routed).output.view_as(feed_out)
            after_feed = next((n for n in norms if n not in used and near(n.input, feed_out)), None)
            if after_feed is not None:
                used.append(after_feed)
                feed_out = after_feed.output
        scale, factor = read_end(
            {
                scale: whole.input + scale * (attention_out + feed_out) if parallel else start + scale * feed_out
                for scale in {1.0, multiplier}
            }
        )
        if parallel and (after_attention or after_feed or experts):
            raise Unlike("its parallel parts have norms after them")
        total = whole.input + scale * attention_out
        beside: Beside | None = None
        if aside is not None:
            sums = {factor: (total + aside.output) * factor for factor in (1.0, 0.5**0.5)}
            factor_of = _nearest(sums, start, "its feed-forward part does not start from the sum")
            beside, total = self._read_beside(aside, factor_of), sums[factor_of]
        if not parallel and not near(start, total):
            raise Unlike("its feed-forward part does not start from the sum")
        return checked(
            Layer(
                attention=read_mixing(attention),
                feed=self._read_feed(feed),
                parallel=parallel,
                before=norms[before] if before else None,
                after_attention=norms[after_attention] if after_attention else None,
                between=norms[between] if between else None,
                after_feed=norms[after_feed] if after_feed else None,
                scale=scale,
                experts=experts,
                beside=beside,
                injection=injection,
                streams=streams,
                factor=factor,
            )
        )

    def _read_joint(
        self,
        whole: _Call,
        attention: _Call,
        mixers: list[_Call],
        attended: _Attended,
        rest: list[_Call],
        norms: Collection[_Call],
    ) -> tuple[Joint, _Call]:
        """Attention and what carries a state, with multipliers that the config names; and both as one call."""
        mixer, config = mixers[0], self.base.config.get_text_config()
        names = "attention_in_multiplier", "attention_out_multiplier", "ssm_out_multiplier"
        starts, one, two = ({1.0, getattr(config, name, None) or 1.0} for name in names)
        start = _nearest({s: mixer.input * s for s in starts}, attention.input, "its attention has another input")
        outs = {(a, m): m * mixer.output + a * attention.output for a in one for m in two}
        found = {
            scales: out for scales, out in outs.items()
            if any(near(whole.input + out, call.input) for call in (*norms, *rest))
        }  # fmt: skip
        if len(mixers) > 1 or not found:
            raise Unlike("its layers have attention and a state side by side, and not their sum")
        (attention_scale, mixer_scale), out = next(iter(found.items()))
        joint = Joint(
            attention=self._read_attention(attention, attended), mixer=self._read_mixer(mixer), start=start,
            attention_scale=attention_scale, mixer_scale=mixer_scale,
        )  # fmt: skip
        return joint, replace(mixer, output=out)

    def _read_mixer(self, call: _Call) -> Mixer:
        mixer, delta = self.carrying[call.module], self.deltas[call.module]
        if delta is not None and near(delta.of_all(call.input[0]), call.output[0]):
            mixer.delta = delta
        return mixer

    def _read_streams(self, whole: _Call) -> tuple[Streams, _Call]:
        """What mixes a layer's residuals; and the layer as that of the one residual which its parts see."""
        parts = [x for x in self._parts(whole) if isinstance(x, _Call)]
        linears = [call for call in parts if is_linear(call.module)]
        routers = [call for call in linears if sum(call.module is other.module for other in linears) == 2]
        if len(routers) != 2 or linears[-1] in routers or parts[0] in routers:
            raise Unlike("its residuals are not mixed as a router says")
        normed, after = (parts[parts.index(call) - 1] for call in routers)
        predict, correct = (linears[linears.index(call) + 1] for call in routers)
        norm, count = read_norm(normed), len(whole.input)
        seen = next((i for i, x in enumerate(whole.input) if same(x, normed.input)), None)
        numbers = [x for part in whole.module.modules() for _, x in _singles(part)]
        scale = next((x for x in numbers if near(normed.output * x, routers[0].input)), None)
        widths = predict.output.shape[-1], correct.output.shape[-1]
        if norm is None or seen is None or scale is None or widths != (count * count, count):
            raise Unlike("its residuals are not mixed as a router says")
        streams = Streams(
            seen=seen, norm=norm, scale_1=scale, router=Product([routers[0].module]),  # type: ignore[list-item]
            predict=Product([predict.module]), correct=Product([correct.module]), factor_E=None,  # type: ignore[list-item]
        )  # fmt: skip
        one_TE = streams.predicted(_by_token(whole.input))[:, seen]
        behind = parts[parts.index(predict) + 1 :]
        start = next((call.input for call in behind if near(call.input[0], one_TE)), None)
        if start is None:
            raise Unlike("its parts do not start from one of its residuals")
        return streams, replace(whole, input=start, output=after.input)

    def _read_corrected(
        self, whole: _Call, out: Tensor, streams: Streams, injection: Injection | None, injected: Tensor | None
    ) -> Streams:
        """With what is done to the one residual before an injection. ``out``: what its parts have made of it."""
        made_TSE = streams.corrected(streams.predicted(_by_token(whole.input)), out.flatten(0, 1))
        if injection is not None and injected is not None:
            one_TE, injected = made_TSE[:, streams.seen], injected.flatten(0, 1)
            if not near(one_TE, injected):
                rows = (x for x in whole.module.parameters() if x.shape == one_TE.shape[1:])
                streams = replace(streams, factor_E=next((x for x in rows if near(one_TE * x, injected)), None))
            made_TSE = streams.inject(made_TSE, replace(injection, place=0), self.given[-1][:, None])
        if not near(made_TSE, _by_token(whole.output)):
            raise Unlike("what leaves a layer is not its residuals, each corrected")
        return streams

    def read_split(self, embedded: Tensor) -> Split:
        """How the first layer's residuals are made of what the embedding gives, and one of the last layer's."""
        linears = [call for call in self.outside if is_linear(call.module) and call.output.shape == embedded.shape]
        begins = [call.module for call in linears if same(call.input, embedded)][1 - len(self.first) :]
        ends = [call.module for x in self.last[1:] for call in linears if same(call.input, x)]
        if not len(begins) == len(ends) == len(self.first) - 1:
            raise Unlike("its residuals do not begin and end in a product each")
        return Split(begins=Product(begins), ends=tuple(Product([end]) for end in ends))  # type: ignore[arg-type,list-item]

    def _read_beside(self, whole: _Call, factor: float) -> Beside:
        parts = [x for x in self._parts(whole) if isinstance(x, _Call)]
        linears = [call.module for call in parts if is_linear(call.module)]
        norms = [norm for call in parts if (norm := read_norm(call))]
        if len(linears) == 2 and len(norms) == 1:
            down, up = (Product([linear]) for linear in linears)  # type: ignore[list-item]
            made = Beside(down=down, up=up, norm=norms[0], factor_1=torch.tensor([factor]).to(self.device))
            if near(made(whole.input.flatten(0, 1)), whole.output.flatten(0, 1)):
                return made
        raise Unlike("what comes beside its attention is of another kind")

    def _read_injection(self, whole: _Call, others: list[_Call]) -> Injection | None:
        """That of a layer whose own two products have a curve between them, and what it is given beside."""
        linears = [call for call in others if is_linear(call.module)]
        bends = [call for call in others if linears and same(call.input, linears[0].output)]
        if len(linears) != 2 or len(bends) != 1:
            return None
        (gate, up), (bend,) = linears, bends
        curve, bent = read_curve(bend), bend.output
        given = [
            x for x in (*whole.args, *whole.kwargs)
            if isinstance(x, Tensor) and x.shape == bent.shape and near(bent * x, up.input)
        ]  # fmt: skip
        if not given or curve is None or others[others.index(gate) :] != [gate, bend, up]:
            return None
        self.given.append(given[0].flatten(0, 1))
        return Injection(
            place=len(self.given) - 1, curve=curve, after=None,
            gate=Product([gate.module]), up=Product([up.module]),  # type: ignore[list-item]
        )  # fmt: skip

    def read_given(self, embedded: Tensor) -> Given:
        """What makes what the layers were given, of what the embedding gives."""
        given = torch.stack(self.given, dim=1)
        tokens, layers, size = given.shape
        products = [call for call in self.outside if is_linear(call.module) and same(call.input, embedded)]
        norms = [(call, norm) for call in self.outside if call.input.shape[-1] == size and (norm := read_norm(call))]
        tables = [call for call in self.outside if not call.input.is_floating_point()]
        for product, (normed, norm), own in itertools.product(products, norms, tables):
            # Not what came out: it may have been changed since (Gemma 3n).
            inner = _times(product.module(product.input), normed.input)
            if not inner or own.output.numel() != normed.output.numel():
                continue
            both = (normed.output.flatten() + own.output.flatten()).view(tokens, -1, size)
            if scale := _times(both[:, :layers], given):
                return Given(
                    embedding=own.module,
                    projection=Product([product.module]),  # type: ignore[list-item]
                    # Of what is not multiplied before it.
                    norm=replace(norm, eps=norm.eps / inner**2),
                    scale=scale,
                    size=size,
                )
        raise Unlike("what its layers are given is not made of an embedding and a product")

    def _parts(self, whole: _Call) -> list[_Call | _Attended]:
        """Calls of modules inside, and of no others."""
        modules = set(whole.module.modules()) - {whole.module}
        return [x for x in self.inside if isinstance(x, _Attended) or x.module in modules]

    def _read_attention(self, whole: _Call, attended: _Attended) -> Attention | Latent:
        parts = self._parts(whole)
        place = parts.index(attended)
        before = [x for x in parts[:place] if isinstance(x, _Call)]
        after = [x for x in parts[place + 1 :] if isinstance(x, _Call) and not same(x.input, x.output)]
        projections = [call for call in before if is_linear(call.module)]
        inner = [call for call in projections if not same(call.input, whole.input)]
        if inner and len(projections) - len(inner) == 2:
            return self._read_latent(before, after, attended, projections, inner)
        if not projections or not all(same(call.input, whole.input) for call in projections):
            raise Unlike("its queries, keys and values are not a product of its input each")
        tokens = len(self.position_T)
        query, key, value = (x[0].transpose(0, 1) for x in (attended.query, attended.key, attended.value))
        if self.query_scale_P is not None:
            query = query / self.query_scale_P[self.position_T, None, None].to(query.dtype)
        key_scale = getattr(self.base.config.get_text_config(), "key_multiplier", None) or 1.0
        alike = (x for x in self.attended if same(x.key, attended.key) and same(x.value, attended.value))
        shares = None if (first := next(alike)) is attended else first.ask.layer
        heads, size, kv_heads = query.shape[1], query.shape[2], key.shape[1] if shares is None else 0
        if value.shape != key.shape or size % 2:
            raise Unlike(f"its heads have {size} dimensions, and its values {value.shape[-1]}")
        out = torch.cat([call.output.reshape(tokens, -1) for call in projections], dim=-1)
        width = out.shape[1] // size
        tied = shares is None and width == heads + kv_heads
        gated = shares is None and width == 2 * (heads + kv_heads)
        if out.shape[1] % size or not (gated or tied or width == heads + 2 * kv_heads):
            raise Unlike("its queries, keys and values are not a product of its input each")
        normed = {call: norm for call in before if call not in projections and (norm := read_norm(call))}
        value_norm: Norm | None = None
        for call in [call for call in normed if shares is None and _storage(call.output) == _storage(attended.value)]:
            if call.input.shape[-1] != size:
                raise Unlike("its values are not normed one by one")
            value_norm, value = normed.pop(call), call.input.reshape(tokens, kv_heads, size)
        norms = list(normed.values())
        if len(norms) not in (0, 2 if shares is None else 1):
            raise Unlike("it has norms in its attention that are not a query's and a key's")
        sizes = {norm.weight.shape for norm in norms if norm.weight is not None and norm.bias is None}
        kinds = {(norm.eps, norm.offset, norm.centered, norm.wide) for norm in norms}
        pair = (norms[0], norms[-1]) if norms else None
        wide = pair if sizes == {(heads * size,), (kv_heads * size,)} else None
        by_size = pair if sizes == {(size,)} and len(kinds) == 1 and not wide and not norms[0].centered else None
        if norms and not wide and not by_size:
            raise Unlike("its query and key norms are neither one a head nor one over all heads")
        # Where a layer turns nothing, what is projected is normed and attended to.
        late = by_size is not None and not {_storage(c.input) for c in normed} & {
            _storage(c.output) for c in projections
        }
        if late and [c.output.data_ptr() for c in normed] != [x.data_ptr() for x in (attended.query, attended.key)]:
            raise Unlike("its queries and keys are normed between other things")
        if by_size and self.query_scale_P is not None:
            raise Unlike("its queries are normed and then scaled by their position")
        attended_THD = attended.out[0]
        if gated:
            attended_THD = attended_THD * queries_and_gates(out, heads, size)[1].sigmoid()
        if key_scale != 1.0 and (norms or tied or shares is not None):
            raise Unlike("its keys are multiplied by a number, and more is done to them")
        read = Attention(
            ask=attended.ask, heads=heads, kv_heads=kv_heads, size=size, shares=shares, tied=tied,
            qkv=Product([call.module for call in projections]),  # type: ignore[misc]
            by_head=kv_heads > 0 and not gated and not near(out[:, -kv_heads * size :], value.flatten(1)),
            gated=gated,
            wide_norms=wide,
            rotation=Rotation(out[:, :0], out[:, :0]),
            late_norms=by_size if late else None,
            query_scale_P=None if self.query_scale_P is None else self.query_scale_P.to(query.dtype),
            key_scale=key_scale,
            value_norm=value_norm,
            output=self._read_output(after, attended_THD),
        )  # fmt: skip
        parts_THD = read.parts(out.clone())
        if shares is None and not near(parts_THD[2].flatten(1), value.flatten(1)):
            raise Unlike("its values are not a product of its input")
        if late:
            query, key = (call.input[0].transpose(0, 1) for call in normed)
        turned = torch.cat((query, key / key_scale), dim=1) if shares is None else query
        rotation = self._read_rotation(torch.cat(parts_THD, dim=1), turned, None if late else by_size)
        return replace(read, rotation=rotation)

    def _read_latent(
        self, before: list[_Call], after: list[_Call], attended: _Attended, starts: list[_Call], ends: list[_Call]
    ) -> Latent:
        """``starts``: the products of what goes in; ``ends``: those of what comes of them, normed."""
        if self.mixers.parts:
            raise Unlike("its cache may keep what its keys and values come from")
        norms = {call: norm for call in before if call not in (*starts, *ends) and (norm := read_norm(call))}
        from_whole: list[tuple[_Call, _Call, _Call]] = []
        from_part: list[tuple[_Call, _Call, _Call]] = []
        for end in ends:
            state = next((call for call in norms if same(call.output, end.input)), None)
            start = next((call for call in starts if state and state.input.data_ptr() == call.output.data_ptr()), None)
            if state and start:
                (from_whole if same(state.input, start.output) else from_part).append((start, state, end))
        if len(from_part) != 1 or not len(from_part + from_whole) == len(ends) == len(norms):
            raise Unlike("its queries, keys and values come from states of another kind")
        ((start, state, end),) = from_part
        first = next(call for call in starts if call is not start)
        last = from_whole[0][2] if from_whole else first
        query, key, value = (x[0].transpose(0, 1) for x in (attended.query, attended.key, attended.value))
        read = Latent(
            ask=attended.ask, heads=query.shape[1], shared=start.output.shape[-1] - state.input.shape[-1],
            narrow=Product([first.module, start.module]),  # type: ignore[list-item]
            query=(norms[from_whole[0][1]], Product([last.module])) if from_whole else None,  # type: ignore[list-item]
            key_value=(norms[state], Product([end.module])),  # type: ignore[list-item]
            rotation=Rotation(query[:, 0, :0], query[:, 0, :0]),
            query_scale_P=None if self.query_scale_P is None else self.query_scale_P.to(query.dtype),
            output=self._read_output(after, attended.out[0]),
        )  # fmt: skip
        size, own = query.shape[2], query.shape[2] - read.shared
        widths = last.output.shape[-1], end.output.shape[-1]
        if key.shape != query.shape or widths != (read.heads * size, read.heads * (own + value.shape[2])):
            raise Unlike("its queries, keys and values come from states of another kind")
        scale_P = None if read.query_scale_P is None else read.query_scale_P[self.position_T]
        place_T = torch.arange(len(query), device=query.device)
        found = {}
        for name, some in self._some_rotations(read.shared):
            mine = replace(read, rotation=some, query_scale_P=scale_P).parts(starts[0].input.flatten(0, 1), place_T)
            # In whatever order a head's dimensions are.
            found[name] = torch.cat(
                (mine[0].transpose(0, 1) @ mine[1].permute(1, 2, 0), mine[2].transpose(0, 1)), dim=2
            )
        truth = torch.cat((query.transpose(0, 1) @ key.permute(1, 2, 0), value.transpose(0, 1)), dim=2)
        name = _nearest(found, truth, "its queries and keys are turned in another way")
        return replace(read, rotation=self._rotation(name, None))

    def _read_output(self, after: list[_Call], attended_THD: Tensor) -> Product:
        outputs = [call for call in after if is_linear(call.module)]
        if len(outputs) != 1 or not near(outputs[0].input.flatten(0, 1), attended_THD.flatten(1)):
            raise Unlike("what attention gives does not go through one product")
        return Product([outputs[0].module])  # type: ignore[list-item]

    def _read_rotation(self, qkv_THD: Tensor, turned_THD: Tensor, norms: tuple[Norm, Norm] | None) -> Rotation:
        """The rotation that makes of queries and keys what attention was given."""
        count, size = turned_THD.shape[1], turned_THD.shape[2]
        heads = count - (qkv_THD.shape[1] - count)
        found: dict[tuple[int, bool], Tensor] = {}
        for name, some in self._some_rotations(size):
            mine = qkv_THD.clone()
            place_T = torch.arange(len(mine), device=mine.device)
            kernels.rotate_(mine, place_T, replace(some, norms=norms), heads, count - heads)
            found[name] = mine[:, :count].flatten(1)
        name = _nearest(found, turned_THD.flatten(1), "its queries and keys are turned in another way")
        return self._rotation(name, norms)

    def _some_rotations(self, size: int) -> Iterator[tuple[tuple[int, bool], Rotation]]:
        """Those that there may be of up to so many dimensions, of the watched tokens alone; their names."""
        for number, pairs in [(i, pairs) for i in range(len(self.tables)) for pairs in (False, True)] + [(-1, False)]:
            table = self._table(number)
            if 2 * table.cos.shape[1] <= size:
                some = _Table(table.cos[self.position_T], table.sin[self.position_T])
                yield (number, pairs), some.rotation(pairs)

    def _rotation(self, name: tuple[int, bool], norms: tuple[Norm, Norm] | None) -> Rotation:
        """The one of that name, of all positions."""
        if name not in self.rotations:
            self.rotations[name] = self._table(name[0]).rotation(name[1])
        return replace(self.rotations[name], norms=norms)

    def _table(self, number: int) -> _Table:
        """-1: no dimension turns."""
        nothing = torch.empty(self.positions, 0, device=self.device)
        return _Table(nothing, nothing) if number < 0 else self.tables[number]

    def _cuts(self, dtype: torch.dtype) -> list[float]:
        """Where the config's shares of a normal distribution end, rounded as a model computes."""
        shares = getattr(self.base.config.get_text_config(), "activation_sparsity_pattern", None) or ()
        ends = [NormalDist().inv_cdf(share) for share in sorted(set(shares)) if 0.0 < share < 1.0]
        return torch.tensor(ends).to(dtype).tolist()

    def _read_feed(self, whole: _Call) -> Gated | Ungated | Whole:
        if whole.more:
            raise Unlike("its feed-forward part is given more than what goes through")
        parts = [x for x in self._parts(whole) if isinstance(x, _Call) and not same(x.input, x.output)]
        linears = [call for call in parts if is_linear(call.module)]
        starts = [call for call in linears if same(call.input, whole.input)]
        ends = [call for call in linears if call not in starts]
        bends = [
            call for call in parts if not is_linear(call.module) and not any(True for _ in call.module.parameters())
        ]
        found: Gated | Ungated | Whole = Whole(whole.module)
        if len(ends) == 1 and len(bends) == 1:
            (bend,) = bends
            down = Product([ends[0].module])  # type: ignore[list-item]
            made: Gated | Ungated | None = None
            curve = read_curve(bend)
            width = ends[0].input.shape[-1]
            gate, cut = [call for call in starts if same(call.output, bend.input)], None
            cuts = self._cuts(bend.input.dtype)
            if not gate and cuts and len(starts) == 2:
                found_of = {(i, c): above(call.output, c) for i, call in enumerate(starts) for c in cuts}
                place, cut = min(found_of, key=lambda n: _gap(found_of[n], bend.input))
                gate = [starts[place]]
            if len(starts) == 1 and gate:
                bent = CURVES[curve] if curve else bend.module
                made = Ungated(up=Product([starts[0].module]), curve=bent, down=down)  # type: ignore[list-item]
            elif len(starts) == 2 and gate and curve:
                (up,) = [call for call in starts if call not in gate]
                gate_up = Product([gate[0].module, up.module])  # type: ignore[list-item]
                made = Gated(gate_up=gate_up, curve=curve, down=down, cut=cut)
            elif len(starts) == 1 and curve and starts[0].output.shape[-1] == 2 * width:
                # Where the gate comes second it does not compute the same, and the part is called as it is.
                made = Gated(gate_up=Product([starts[0].module]), curve=curve, down=down)  # type: ignore[list-item]
            tokens = whole.input.flatten(0, 1)
            if made is not None and near(made(tokens), whole.output.flatten(0, 1)):
                return made
        if not near(found(whole.input.flatten(0, 1)), whole.output.flatten(0, 1)):
            raise Unlike("its feed-forward part does not give the same twice")
        return found


def _call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> _Call | None:
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    made = (output,) if isinstance(output, Tensor) else tuple(output) if isinstance(output, (tuple, list)) else ()
    if not given or not made or not isinstance(made[0], Tensor):
        return None
    return _Call(module, given[0], made[0], len(args) + len(kwargs) > 1, args, tuple(kwargs.values()), made)


def _singles(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own tensors of one number."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(name, x) for name, x in own if x.numel() == 1 and x.is_floating_point()]


@contextmanager
def _told_apart(blocks: nn.ModuleList) -> Iterator[None]:
    """Meanwhile such numbers are a half, a third...: while they are 1, as they may be at first, they do nothing."""
    found = [(place, x.data) for block in blocks for place, (_, x) in enumerate(_singles(block))]
    kept = [x.clone() for _, x in found]
    try:
        for place, x in found:
            x.fill_(1 / (place + 2))
        yield
    finally:
        for (_, x), before in zip(found, kept, strict=True):
            x.copy_(before)


def query_scale(config: Any, positions: int, device: torch.device) -> Tensor | None:
    """What queries at each position are multiplied by, float32 [P]: ``1 + beta log(1 + floor(position / original))``.

    None where the config has no beta, or ends before the first position that it counts at. (Llama 4 and Ministral 3.)
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    beta, original = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not beta or not original or positions <= original:
        return None
    scale_P: Tensor = 1 + beta * torch.log1p(torch.arange(positions, device=device) // original)
    return scale_P


def read_norm(call: _Call) -> Norm | None:
    """The norm that a called module is; None where it is none of those known."""
    module, size = call.module, call.input.shape[-1]
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    own = [e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(module, name, None), float)]
    odd = set(parameters) - {"weight", "bias"} or {p.shape for p in parameters.values()} - {(size,)}
    if odd or call.input.shape != call.output.shape or is_linear(module) or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, size, generator=generator) + 0.5
    # From magnitudes at which the epsilon counts.
    x = (x * torch.logspace(-4, 1, 6)[:, None]).to(call.input.device, call.input.dtype)
    kinds = [
        Norm(weight, bias, eps, offset, centered, wide)
        for eps in own[:1] or (1e-5, 1e-6)
        for centered in (False, True)
        for offset in ((False, True) if weight is not None else (False,))
        # In float32 both are the same, and the first is taken: 1 + w would lose its digits in 16 bits.
        for wide in ((True, False) if offset else (False, True))
    ]
    found = {number: kernels.norm(x, kind) for number, kind in enumerate(kinds)}
    try:
        return kinds[_nearest(found, module(x), "")]
    except Unlike:
        return None


def read_curve(call: _Call) -> Curve | None:
    """The curve that a called module without parameters computes; None where it is none of those known."""
    x = torch.linspace(-12, 12, 401).to(call.input.device, call.input.dtype)
    try:
        return _nearest({name: curve(x) for name, curve in CURVES.items()}, call.module(x), "")
    except Unlike:
        return None


def same(one: Tensor, two: Tensor) -> bool:
    """Whether they are the same numbers in memory."""
    return one.data_ptr() == two.data_ptr() and one.numel() == two.numel()


def _times(found: Tensor, truth: Tensor) -> float:
    """The number that makes one of the other; 0 where none does."""
    if found.numel() != truth.numel():
        return 0.0
    one, other = (x.flatten().double() for x in (found, truth))
    times = float(one @ other / (one @ one).clamp(min=1e-12))
    return times if near((times * one).to(truth.dtype), truth.flatten()) else 0.0


def _by_token(x: Tensor) -> Tensor:
    """[S, 1, T, E] → [T, S, E]."""
    return x[:, 0].transpose(0, 1).contiguous()


def _storage(x: Tensor) -> int:
    """The memory that it is a view of."""
    return x.untyped_storage().data_ptr()


def near(found: Tensor, truth: Tensor) -> bool:
    """Whether they differ by rounding."""
    return found.shape == truth.shape and _gap(found, truth) <= (LEAST if truth.dtype.itemsize >= 4 else LEAST_LOW)


def _gap(found: Tensor, truth: Tensor) -> float:
    truth = truth.float()
    return float((found.float() - truth).norm() / truth.norm().clamp(min=1e-12))


def _nearest(found: dict[Name, Tensor], truth: Tensor, otherwise: str) -> Name:
    """The one that is nearest to the truth. Raises Unlike where none is near."""
    fitting = [name for name in found if found[name].shape == truth.shape]
    name = min(fitting, key=lambda n: _gap(found[n], truth), default=None)
    if name is None or not near(found[name], truth):
        raise Unlike(otherwise)
    return name
