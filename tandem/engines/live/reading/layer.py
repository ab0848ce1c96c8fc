"""A layer as a whole: which of its parts come after which, with what norms, and how they are added up.

What each part is built of is read in the files beside this.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from tandem.engines.live.layers import Attention, Experts, Injection, Joint, Latent, Layer, Streams, Unlike
from tandem.engines.live.mixers import Mixer
from tandem.engines.live.reading.attention import read_attention
from tandem.engines.live.reading.calls import Attended, Call
from tandem.engines.live.reading.comparing import near, nearest, read_norm, rounded, same
from tandem.engines.live.reading.feeds import read_beside, read_feed
from tandem.engines.live.reading.given import read_injection
from tandem.engines.live.reading.mixing import read_joint, read_mixer
from tandem.engines.live.reading.streams import read_corrected, read_streams
from tandem.engines.live.reading.watch import Watch, singles
from tandem.engines.live.stacked import is_linear
from tandem.kernels.layers import Norm


def read_layer(watch: Watch, whole: Call) -> Layer:
    """What a layer is built of, once its module has been called. Raises Unlike where it is not known."""
    streams, seen = read_streams(watch, whole) if whole.input.ndim > 3 else (None, whole)
    parts = _find_parts(watch, seen)
    mixing = _find_mixing(watch, parts)
    ending = _read_ending(watch, whole, parts, streams)
    alone = len(parts.others) == 1 and mixing.count <= 1
    read = _read_one(watch, parts, mixing, ending) if alone else _read_two(watch, parts, mixing, ending)
    if set(parts.used) != set(parts.norms):
        raise Unlike("it has norms of another place")
    if unread := read.unread(whole.module):
        raise Unlike(f"it has {unread} of unknown use")
    _prove_wide(watch, parts, read)
    return read


def _prove_wide(watch: Watch, parts: _Parts, read: Layer) -> None:
    """A residual of another type than its parts compute in is one from the first layer on, and goes through norms."""
    residual = parts.whole.output.dtype
    if watch.layers and parts.whole.input.dtype != residual:
        raise Unlike("its layers are added up in several types")
    if all(call.input.dtype == residual for call in parts.others):
        return
    two = read.attention is not None and read.feed is not None
    more = read.parallel or read.experts or read.beside or read.injection or read.streams
    if more or read.before is None or (two and read.between is None):
        raise Unlike("what takes its residual, which is of another type than its parts, are not norms alone")
    if any(call.input.dtype != call.output.dtype for call in parts.others):
        raise Unlike("its parts give another type than they are given")


@dataclass(eq=False)
class _Parts:
    """What a layer calls of its own: its norms, and the parts that they are before or after."""

    whole: Call
    multiplier: float
    """What parts may be multiplied by as they are added, by the config."""
    norms: dict[Call, Norm]
    others: list[Call]
    used: list[Call] = field(default_factory=list)
    """Norms whose place has been found."""

    def before(self, part: Call) -> Call | None:
        """The norm whose output goes into it."""
        return self.use(next((norm for norm in self.norms if rounded(part.input, norm.output)), None))

    def after(self, part: Call) -> Call | None:
        return self.use(next((norm for norm in self.norms if same(norm.input, part.output)), None))

    def use(self, norm: Call | None) -> Call | None:
        self.used.extend([norm] if norm else [])
        return norm

    def norm(self, call: Call | None) -> Norm | None:
        return None if call is None else self.norms[call]


def _find_parts(watch: Watch, whole: Call) -> _Parts:
    children = set(whole.module.children())
    # Dropout does nothing here.
    calls = [c for c in watch.inside if isinstance(c, Call) and c.module in children and not same(c.input, c.output)]
    norms = {call: norm for call in calls if (norm := read_norm(call, whole.output.dtype))}
    multiplier = getattr(watch.base.config.get_text_config(), "residual_multiplier", None) or 1.0
    return _Parts(whole, multiplier, norms, [call for call in calls if call not in norms])


@dataclass(frozen=True, eq=False)
class _Mixing:
    """What of a layer mixes tokens: attention, a part that carries a state, or both as one."""

    part: Call | None
    attended: Attended | None
    joint: Joint | None
    count: int
    """Of those that there are."""

    def read(self, watch: Watch) -> Attention | Latent | Mixer | Joint:
        assert self.part is not None
        if self.joint is not None:
            return self.joint
        return (
            read_mixer(watch, self.part) if self.attended is None else read_attention(watch, self.part, self.attended)
        )


def _find_mixing(watch: Watch, parts: _Parts) -> _Mixing:
    """Attention and a state side by side become one of the layer's parts."""
    attentions = [x for x in watch.inside if isinstance(x, Attended)]
    mixers = [call for call in parts.others if call.module in watch.carrying]
    if not attentions:
        return _Mixing(next(iter(mixers), None), None, None, len(mixers))
    attended = attentions[0]
    place = watch.inside.index(attended)
    attention = next((call for call in parts.others if watch.inside.index(call) > place), None)
    if not mixers or attention is None:
        return _Mixing(attention, attended, None, len(attentions) + len(mixers))
    rest = [call for call in parts.others if call not in (attention, *mixers)]
    joint, both = read_joint(watch, parts.whole, attention, mixers, attended, [*parts.norms, *rest])
    parts.others = [both, *rest]
    return _Mixing(both, attended, joint, len(attentions))


@dataclass(frozen=True, eq=False)
class _Ending:
    """What becomes of a layer's parts once they are added to its residual."""

    injection: Injection | None
    streams: Streams | None
    injected: tuple[Tensor, Tensor] | None
    """Where there is an injection and one residual: what goes into it, and what it adds."""

    def read(self, whole: Call, sums: dict[float, Tensor]) -> tuple[float, tuple[nn.Module, str] | None]:
        """The scale by which parts are added, of those of which the sums are, and what all is multiplied by."""
        if self.injected is not None:
            before, more = self.injected
            scale = nearest(sums, before, "what a layer is given does not go through its residual")
            sums = {scale: before + more}
        ends = {(scale, name): end * factor for scale, end in sums.items() for name, factor in singles(whole.module)}
        ends |= {(scale, ""): end for scale, end in sums.items()}
        scale, name = nearest(ends, whole.output, "what leaves a layer is not a sum of its parts")
        return scale, (whole.module, name) if name else None


def _read_ending(watch: Watch, whole: Call, parts: _Parts, streams: Streams | None) -> _Ending:
    """``whole``: with all its residuals. An injection is none of the layer's parts any more."""
    injection, injected = read_injection(watch, parts.whole, parts.others), None
    if injection is not None:
        gate, up = (call for call in parts.others if is_linear(call.module))
        parts.others = parts.others[: parts.others.index(gate)]
        after = parts.after(up)
        injection = replace(injection, after=parts.norm(after))
        injected = gate.input, (after or up).output
    if streams is None:
        return _Ending(injection, None, injected)
    streams = read_corrected(watch, whole, parts.whole.output, streams, injection, injected[0] if injected else None)
    return _Ending(injection, streams, None)


def _read_one(watch: Watch, parts: _Parts, mixing: _Mixing, ending: _Ending) -> Layer:
    """A layer that is one part alone (Nemotron H)."""
    whole, (part,) = parts.whole, parts.others
    before, after = parts.before(part), parts.after(part)
    if not rounded((before or part).input, whole.input):
        raise Unlike("its parts do not start from their layer's input")
    residual = whole.input.to(whole.output.dtype)
    sums = {scale: residual + scale * (after or part).output for scale in {1.0, parts.multiplier}}
    scale, factor = ending.read(whole, sums)
    mixes = part is mixing.part
    return Layer(
        attention=mixing.read(watch) if mixes else None, feed=None if mixes else read_feed(watch, part),
        parallel=False, before=parts.norm(before), after_attention=None, between=None, after_feed=parts.norm(after),
        scale=scale, injection=ending.injection, streams=ending.streams, factor=factor,
    )  # fmt: skip


def _read_two(watch: Watch, parts: _Parts, mixing: _Mixing, ending: _Ending) -> Layer:
    """A layer of attention, or what there is in its place, and a feed-forward part."""
    whole, attention = parts.whole, mixing.part
    if mixing.count != 1:
        raise Unlike("it has layers without attention, or with several")
    rest = [call for call in parts.others if call is not attention]
    aside = rest.pop(0) if attention and len(rest) == 2 and same(rest[0].input, attention.input) else None
    if attention is None or len(rest) not in (1, 3):
        raise Unlike("a layer is not one attention and one feed-forward part")
    feed, *routing = rest
    before, after_attention, after_feed = parts.before(attention), parts.after(attention), parts.after(feed)
    if not rounded((before or attention).input, whole.input):
        raise Unlike("its attention does not start from the layer's input")
    between = None if same(feed.input, attention.input) else parts.before(feed)
    start = (between or feed).input
    parallel = same(feed.input, attention.input) or rounded(start, whole.input)
    attention_out, feed_out = (after_attention or attention).output, (after_feed or feed).output
    experts: Experts | None = None
    if routing:
        experts, feed_out = _read_experts(parts, routing, start, feed_out, after_feed)
        after_feed = _norm_of_sum(parts, feed_out)
        feed_out = after_feed.output if after_feed else feed_out
    residual = whole.input.to(whole.output.dtype)
    sums = {
        scale: residual + scale * (attention_out + feed_out)
        if parallel
        else (start if start.dtype == residual.dtype else residual + scale * attention_out) + scale * feed_out
        for scale in {1.0, parts.multiplier}
    }
    scale, factor = ending.read(whole, sums)
    if parallel and (after_attention or after_feed or experts):
        raise Unlike("its parallel parts have norms after them")
    total, beside = residual + scale * attention_out, None
    if aside is not None:
        scaled = {times: (total + aside.output) * times for times in (1.0, 0.5**0.5)}
        times = nearest(scaled, start, "its feed-forward part does not start from the sum")
        beside, total = read_beside(watch, aside, times), scaled[times]
    if not parallel and not near(total, start):
        raise Unlike("its feed-forward part does not start from the sum")
    return Layer(
        attention=mixing.read(watch), feed=read_feed(watch, feed), parallel=parallel,
        before=parts.norm(before), after_attention=parts.norm(after_attention),
        between=parts.norm(between), after_feed=parts.norm(after_feed), scale=scale, experts=experts,
        beside=beside, injection=ending.injection, streams=ending.streams, factor=factor,
    )  # fmt: skip


def _read_experts(
    parts: _Parts, routing: list[Call], start: Tensor, feed_out: Tensor, after_feed: Call | None
) -> tuple[Experts, Tensor]:
    """Those beside the feed-forward part, of the residual that it starts from; and what both give together."""
    router, routed = routing
    before, after = parts.before(routed), parts.after(routed)
    picks = [next((i for i, x in enumerate(router.made) if x is other), -1) for other in routed.args[1:]]
    starts = router.input, (before or routed).input
    if not all(same(x, start) for x in starts) or router.more or routed.kwargs or -1 in picks:
        raise Unlike("a layer is not one attention and one feed-forward part")
    experts = Experts(
        router=router.module, experts=routed.module, picks=tuple(picks),
        before=parts.norm(before), after=parts.norm(after), after_feed=parts.norm(after_feed),
    )  # fmt: skip
    return experts, feed_out + (after or routed).output.view_as(feed_out)


def _norm_of_sum(parts: _Parts, total: Tensor) -> Call | None:
    """The norm, of those without a place so far, that such a sum goes through."""
    return parts.use(next((norm for norm in parts.norms if norm not in parts.used and near(norm.input, total)), None))
