"""Several residuals, of which a layer's parts see one."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tandem.engines.live.layers import Injection, Split, Streams, Unlike
from tandem.engines.live.reading.calls import Call, product_of
from tandem.engines.live.reading.comparing import by_token, near, read_norm, same
from tandem.engines.live.reading.watch import Watch, singles
from tandem.engines.live.stacked import is_linear


def read_streams(watch: Watch, whole: Call) -> tuple[Streams, Call]:
    """What mixes a layer's residuals; and the layer as that of the one residual which its parts see."""
    parts = [x for x in watch.parts(whole) if isinstance(x, Call)]
    linears = [call for call in parts if is_linear(call.module)]
    routers = [call for call in linears if sum(call.module is other.module for other in linears) == 2]
    if len(routers) != 2 or linears[-1] in routers or parts[0] in routers:
        raise Unlike("its residuals are not mixed as a router says")
    normed, after = (parts[parts.index(call) - 1] for call in routers)
    predict, correct = (linears[linears.index(call) + 1] for call in routers)
    norm, count = read_norm(normed), len(whole.input)
    seen = next((i for i, x in enumerate(whole.input) if same(x, normed.input)), None)
    numbers = [x for part in whole.module.modules() for _, x in singles(part)]
    scale = next((x for x in numbers if near(normed.output * x, routers[0].input)), None)
    widths = predict.output.shape[-1], correct.output.shape[-1]
    if norm is None or seen is None or scale is None or widths != (count * count, count):
        raise Unlike("its residuals are not mixed as a router says")
    streams = Streams(
        seen=seen, norm=norm, scale_1=scale, router=product_of(routers[0]),
        predict=product_of(predict), correct=product_of(correct), factor_E=None,
    )  # fmt: skip
    one_TE = streams.predicted(by_token(whole.input))[:, seen]
    behind = parts[parts.index(predict) + 1 :]
    start = next((call.input for call in behind if near(call.input[0], one_TE)), None)
    if start is None:
        raise Unlike("its parts do not start from one of its residuals")
    return streams, replace(whole, input=start, output=after.input)


def read_corrected(
    watch: Watch, whole: Call, out: Tensor, streams: Streams, injection: Injection | None, injected: Tensor | None
) -> Streams:
    """With what is done to the one residual before an injection. ``out``: what its parts have made of it."""
    made_TSE = streams.corrected(streams.predicted(by_token(whole.input)), out.flatten(0, 1))
    if injection is not None and injected is not None:
        one_TE, injected = made_TSE[:, streams.seen], injected.flatten(0, 1)
        if not near(one_TE, injected):
            rows = (x for x in whole.module.parameters() if x.shape == one_TE.shape[1:])
            streams = replace(streams, factor_E=next((x for x in rows if near(one_TE * x, injected)), None))
        made_TSE = streams.inject(made_TSE, replace(injection, place=0), watch.given[-1][:, None])
    if not near(made_TSE, by_token(whole.output)):
        raise Unlike("what leaves a layer is not its residuals, each corrected")
    return streams


def read_split(watch: Watch, embedded: Tensor) -> Split:
    """How the first layer's residuals are made of what the embedding gives, and one of the last layer's."""
    linears = [call for call in watch.outside if is_linear(call.module) and call.output.shape == embedded.shape]
    begins = [call for call in linears if same(call.input, embedded)][1 - len(watch.first) :]
    ends = [call for x in watch.last[1:] for call in linears if same(call.input, x)]
    if not len(begins) == len(ends) == len(watch.first) - 1:
        raise Unlike("its residuals do not begin and end in a product each")
    return Split(begins=product_of(*begins), ends=tuple(map(product_of, ends)))
