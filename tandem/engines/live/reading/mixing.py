"""Parts that carry a state from token to token, alone or with attention beside them."""

from __future__ import annotations

from dataclasses import replace

from tandem.engines.live.layers import Joint, Unlike
from tandem.engines.live.mixers import Mixer
from tandem.engines.live.reading.attention import read_attention
from tandem.engines.live.reading.calls import Attended, Call
from tandem.engines.live.reading.comparing import near, nearest
from tandem.engines.live.reading.watch import Watch


def read_joint(
    watch: Watch, whole: Call, attention: Call, mixers: list[Call], attended: Attended, others: list[Call]
) -> tuple[Joint, Call]:
    """Attention and what carries a state, with multipliers that the config names; and both as one call.

    ``others``: the layer's other calls, of which one is given the residual with both.
    """
    mixer, config = mixers[0], watch.base.config.get_text_config()
    names = "attention_in_multiplier", "attention_out_multiplier", "ssm_out_multiplier"
    # The config's first: of a part that is near 0 both are as near.
    starts, one, two = (dict.fromkeys((getattr(config, name, None) or 1.0, 1.0)) for name in names)
    start = nearest({s: mixer.input * s for s in starts}, attention.input, "its attention has another input")
    outs = {(a, m): m * mixer.output + a * attention.output for a in one for m in two}
    sums = {scales: whole.input + out for scales, out in outs.items()}
    behind = [call.input for call in others if any(near(x, call.input) for x in sums.values())]
    if len(mixers) > 1 or not behind:
        raise Unlike("its layers have attention and a state side by side, and not their sum")
    # In 16 bits several may be near.
    attention_scale, mixer_scale = scales = nearest(sums, behind[0], "")
    joint = Joint(
        attention=read_attention(watch, attention, attended), mixer=read_mixer(watch, mixer), start=start,
        attention_scale=attention_scale, mixer_scale=mixer_scale,
    )  # fmt: skip
    return joint, replace(mixer, output=outs[scales])


def read_mixer(watch: Watch, call: Call) -> Mixer:
    """With a step of our own where it computes the same."""
    mixer, delta = watch.carrying[call.module], watch.deltas[call.module]
    if delta is not None and near(delta.of_all(call.input[0]), call.output[0]):
        mixer.delta = delta
    return mixer
