"""Feed-forward parts, and what comes beside an attention: what is made of each token alone."""

from __future__ import annotations

from statistics import NormalDist

import torch

from tandem.engines.live.layers import Beside, Gated, Ungated, Unlike, Whole, above
from tandem.engines.live.reading.calls import Call, product_of
from tandem.engines.live.reading.comparing import gap, near, read_curve, read_norm, same
from tandem.engines.live.reading.watch import Watch
from tandem.engines.live.stacked import is_linear
from tandem.kernels.layers import CURVES


def read_feed(watch: Watch, whole: Call) -> Gated | Ungated | Whole:
    """Called whole where it is none of the known."""
    if whole.more:
        raise Unlike("its feed-forward part is given more than what goes through")
    parts = [x for x in watch.parts(whole) if isinstance(x, Call) and not same(x.input, x.output)]
    linears = [call for call in parts if is_linear(call.module)]
    starts = [call for call in linears if same(call.input, whole.input)]
    ends = [call for call in linears if call not in starts]
    bends = [call for call in parts if not is_linear(call.module) and not any(True for _ in call.module.parameters())]
    token_TE, truth_TE = whole.input.flatten(0, 1), whole.output.flatten(0, 1)
    made = _read_bent(watch, starts, bends[0], ends[0]) if len(bends) == len(ends) == 1 else None
    if made is not None and near(made(token_TE), truth_TE):
        return made
    called = Whole(whole.module)
    if not near(called(token_TE), truth_TE):
        raise Unlike("its feed-forward part does not give the same twice")
    return called


def _read_bent(watch: Watch, starts: list[Call], bend: Call, end: Call) -> Gated | Ungated | None:
    """``starts``: products of what goes in; ``bend``: a curve behind one of them; ``end``: the last product."""
    curve, down, cut = read_curve(bend), product_of(end), None
    gate = next((call for call in starts if same(call.output, bend.input)), None)
    if gate is None and len(starts) == 2 and (cuts := _cuts(watch, bend.input.dtype)):
        found = {(call, cut): above(call.output, cut) for call in starts for cut in cuts}
        gate, cut = min(found, key=lambda name: gap(found[name], bend.input))
    if len(starts) == 1 and gate:
        return Ungated(up=product_of(gate), curve=CURVES[curve] if curve else bend.module, down=down)
    if len(starts) == 2 and gate and curve:
        (up,) = [call for call in starts if call is not gate]
        return Gated(gate_up=product_of(gate, up), curve=curve, down=down, cut=cut)
    if len(starts) == 1 and curve and starts[0].output.shape[-1] == 2 * end.input.shape[-1]:
        # Where the gate comes second it does not compute the same, and the part is called as it is.
        return Gated(gate_up=product_of(starts[0]), curve=curve, down=down)
    return None


def _cuts(watch: Watch, dtype: torch.dtype) -> list[float]:
    """Where the config's shares of a normal distribution end, rounded as a model computes."""
    shares = getattr(watch.base.config.get_text_config(), "activation_sparsity_pattern", None) or ()
    ends = [NormalDist().inv_cdf(share) for share in sorted(set(shares)) if 0.0 < share < 1.0]
    return torch.tensor(ends).to(dtype).tolist()


def read_beside(watch: Watch, whole: Call, factor: float) -> Beside:
    """``factor``: of the sum with the residual and the attention."""
    parts = [x for x in watch.parts(whole) if isinstance(x, Call)]
    linears = [call for call in parts if is_linear(call.module)]
    norms = [norm for call in parts if (norm := read_norm(call))]
    if len(linears) == 2 and len(norms) == 1:
        down, up = map(product_of, linears)
        made = Beside(down=down, up=up, norm=norms[0], factor_1=torch.tensor([factor]).to(watch.device))
        if near(made(whole.input.flatten(0, 1)), whole.output.flatten(0, 1)):
            return made
    raise Unlike("what comes beside its attention is of another kind")
