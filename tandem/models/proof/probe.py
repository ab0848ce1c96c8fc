"""Which way a model can be run is found out on a probe, not assumed from its name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tandem.batch import Batch
from tandem.data.packing import pack
from tandem.errors import UserError, first_line
from tandem.kernels.logprob import PLAIN, HeadShape
from tandem.models.attention import IMPLEMENTATION, UnsupportedAttention, leave_sdpa
from tandem.models.forward import LoadedModel, hidden_states, native_logits
from tandem.models.moe.experts import group_experts
from tandem.models.moe.routers import has_experts
from tandem.models.moe.routes import Routes
from tandem.models.proof.limits import READS_AHEAD, turning_point
from tandem.models.proof.shrunk import TURNING, named_limits, shrunk
from tandem.models.recurrent.states import Mixers
from tandem.types import Sequence

log = logging.getLogger("tandem")

TOLERANCE = 2e-3
"""Largest relative difference in float32, far above rounding and far below a wrong mask or a missing scale."""
LOW_PRECISION_TOLERANCE = 0.1
"""In bfloat16, of which some dozen layers make a few hundredths."""
ROUNDINGS, COARSER = 16, 3.0
"""Of 40 right copies with adapters folded in, 11 were beyond the bound of their log-probs; less what 16 runs show that
round 3 times as coarsely, all were within a hundredth of it (8 runs: within 0.6)."""
MARGIN = 1.5
"""Times what rounding makes of a model in one draw that it may make of it in another."""
MOST_ROUNDING = 0.5
"""What is wrong by so much is wrong, however many layers there are."""
WORST_ROUNDING = 0.8
"""The same of a single row among others of which most are not."""
LENGTHS = (24, 7, 20)
SHARED = 10
"""Tokens that the first and the last of them begin with."""
FAR_LENGTHS = (TURNING + 7, 7, TURNING - 4)
"""Of the shrunken copy: beyond its limits, before them, and between the two kinds of them."""


@torch.no_grad()
def probe_forward(model: LoadedModel) -> str:
    """Sets how batches go through the model, in ``packed``, ``equal_lengths``, ``split_head``: the fastest true way.

    True is what reproduces the module's own forward of one sequence at a time: on the model itself, and on a shrunken
    copy, whose limits the sequences go beyond. Returns why sequences must be padded, or nothing where packing works.
    Raises UserError for a model that reads ahead, and for one that does not compute in its dtype.
    """
    leave_sdpa(model.module)
    model.turning = turning_point(model.module.config)
    model.mixers = Mixers.of(model.module)
    small = shrunk(model.module)
    trials = [_Trial(model, LENGTHS, beside=small is not None)]
    if not trials[0].causal():
        raise UserError(f"{type(model.module).__name__}: {READS_AHEAD}")
    unproved = ""
    if small is not None:
        copied = replace(model, module=small, turning=turning_point(small.config), mixers=Mixers.of(small))
        trials.append(_Trial(copied, FAR_LENGTHS))
    elif limits := named_limits(model.module.config):
        unproved = f"what it does beyond its limits ({', '.join(limits)}) could not be tried out on a small copy"

    def why_not() -> str:
        return next((why for trial in trials if (why := trial.why_not(packed=True))), "")

    reason = unproved or why_not()
    told = [trial.model.mixers for trial in trials if trial.model.mixers and any(trial.model.mixers.arguments)]
    if told and reason and not unproved:
        # More than we know of goes from token to token in parts that call what we know.
        for mixers in told:
            mixers.take_rows()
        reason = why_not()
        if not reason:
            name = type(model.module).__name__
            log.warning("%s: packed sequences go side by side through its layers with a state (slower)", name)
    model.packed = not reason
    if reason and (unproved or any(trial.why_not(packed=False) for trial in trials)):
        model.equal_lengths = True
        reason += ", and padding would change it"
    if reason:
        reason += (
            ", so its sequences are " + ("run by their lengths" if model.equal_lengths else "padded") + " (slower)"
        )
    else:
        _replace(model.module)
    if not model.scalar:
        if model.equal_lengths:
            for trial in trials:
                trial.run(packed=False, equal_lengths=True)
        shapes = [trial.shape for trial in trials]
        model.split_head, model.head_shape = None not in shapes, shapes[0] or PLAIN
    if small is not None and model.dtype != "float32":
        _require_low_precision(small, type(model.module).__name__)
    return reason


def _require_low_precision(small: Any, name: str) -> None:
    """Raises UserError where the copy, which is spoilt by it, multiplies its parameters in bfloat16 by float32."""
    for parameter in small.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    try:
        device = small.get_input_embeddings().weight.device
        small.base_model(input_ids=torch.arange(2, 20, device=device)[None], use_cache=False)
    except RuntimeError as error:
        if "dtype" in str(error):
            raise UserError(
                f"{name}: it does not compute in bfloat16 ({first_line(error)}); take dtype float32"
            ) from error
        raise


@contextmanager
def rounded(module: Any, seed: int = 0, times: float = 1.0) -> Iterator[None]:
    """What each part without parts of its own gives in 16 bits is moved at random meanwhile: as often by a unit of its
    last place as two roundings of one number are a unit apart, once in 6 times; ``times`` as far as for that."""
    generators: dict[torch.device, torch.Generator] = {}

    def moved(part: Any, arguments: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.dtype.itemsize >= 4:
            return None
        if out.device not in generators:
            generators[out.device] = torch.Generator(out.device).manual_seed(seed)
        share = 0.8 * times * (torch.rand(out.shape, generator=generators[out.device], device=out.device) - 0.5)
        return (out.float() * (1 + torch.finfo(out.dtype).eps * share)).to(out.dtype)

    with ExitStack() as hooks:
        for part in module.modules():
            if not any(True for _ in part.children()):
                hooks.callback(part.register_forward_hook(moved).remove)
        yield


def rounding_by_token(module: Any, logprobs: Callable[[], list[list[float]]]) -> list[list[float]]:
    """How far, in nats, rounding may move each number that ``logprobs`` gives of a model with experts in 16 bits.

    Where two experts are almost equal for a token, rounding decides which one it takes, and the log-prob jumps. That
    is tried out: the most that it moves in ``ROUNDINGS`` runs whose parts round ``COARSER`` times as coarsely.
    """
    truth = logprobs()
    most = [[0.0] * len(row) for row in truth]
    for seed in range(ROUNDINGS):
        with rounded(module, seed, COARSER):
            found = logprobs()
        most = [
            [max(abs(a - b), far) for a, b, far in zip(*rows, strict=True)]
            for rows in zip(truth, found, most, strict=True)
        ]
    return most


class _Rounding(NamedTuple):
    """What rounding makes of tokens that take the same experts."""

    most: float
    """Of the median row."""
    worst: float
    """Of the worst row."""
    routers: float
    """Of a router's weights for the median token: some are between two experts."""


class Truth:
    """What a module's own forward gives for some tokens, [T, D], and how far from it another way to the same may be.

    ``run`` gives it. ``beside``: whether a small copy in float32 is tried beside the module: only then may all that
    is wrong in 16 bits be rounding.
    """

    def __init__(self, module: Any, run: Callable[[], Tensor], *, beside: bool) -> None:
        self.module, self.run = module, run
        self.dtype = module.get_input_embeddings().weight.dtype
        self.low = self.dtype.itemsize < 4
        self.beside = beside
        # In 16 bits rounding decides now and then which expert a token takes, and with it all that follows of it.
        self.by_chance = self.low and has_experts(module)
        self.routes = Routes(module) if self.by_chance and beside else None
        with self.routes.written() if self.routes else nullcontext():
            self.value_TD = run()

    def why_not(self, run: Callable[[], Tensor]) -> str:
        """How far what ``run`` gives is from it, where that is more than rounding; else nothing.

        ``run`` has each token once. Tokens that take experts take the same ones as here, with the same weights: what
        routers make of them in there is compared with that by itself.
        """
        if self.routes is None or not self.routes.taken:
            return self.too_far(run())
        with self.routes.held() as weights:
            value_TD = run()
        if value_TD.shape != self.value_TD.shape:
            return "of another shape"
        if far := self._over("most", value_TD, self.value_TD) or self._over("worst", value_TD, self.value_TD):
            return far
        pairs = zip(weights, self.routes.weights, strict=True)
        far = next((far for mine, own in pairs if (far := self._over("routers", mine[:-1], own[:-1]))), "")
        return far and f"a router's weights are {far}"

    def _over(self, which: Literal["most", "worst", "routers"], value_TD: Tensor, truth_TD: Tensor) -> str:
        """``too_far`` of tokens that take the same experts, by one of the ``_Rounding``."""
        worst = which == "worst"
        cap = WORST_ROUNDING if worst else MOST_ROUNDING
        compare = partial(too_far, value_TD, truth_TD.to(self.dtype), most=not worst, cap=cap)
        return compare() and compare(rounding=getattr(self.rounding_of_held, which))

    def too_far(self, value_TD: Tensor, truth_TD: Tensor | None = None) -> str:
        """How far a value is from it, or from ``truth_TD``, where that is more than rounding; else nothing."""
        truth_TD = self.value_TD if truth_TD is None else truth_TD
        if value_TD.shape != truth_TD.shape:
            return "of another shape"
        # Some give logits in float32 whatever they compute in.
        compare = partial(too_far, value_TD, truth_TD.to(self.dtype), most=self.by_chance)
        if not (far := compare()) or not (self.low and self.beside):
            return far
        if self.by_chance:
            return compare(rounding=self.rounding)
        return compare(rounding=self.rounding, cap=WORST_ROUNDING) or compare(rounding=self.rounding, most=True)

    @cached_property
    @torch.no_grad()
    def rounding(self) -> float:
        """What it is off by where the module's parts, which compute in 16 bits, round as they might as well.

        It grows with depth and width: Qwen2.5-32B's shapes with random weights were off by 0.17 in transformers' own
        decoding.
        """
        with rounded(self.module):
            return gap_of(self.run(), self.value_TD, most=self.by_chance)

    @cached_property
    @torch.no_grad()
    def rounding_of_held(self) -> _Rounding:
        """The same where tokens take the same experts."""
        assert self.routes is not None
        with rounded(self.module), self.routes.held() as weights:
            value_TD = self.run()
        pairs = zip(weights, self.routes.weights, strict=True)
        return _Rounding(
            most=gap_of(value_TD, self.value_TD, most=True),
            worst=gap_of(value_TD, self.value_TD),
            routers=max(gap_of(mine[:-1], own[:-1], most=True) for mine, own in pairs),
        )


class _Trial:
    """A model, sequences, and what the module's own forward makes of each of them by itself."""

    def __init__(self, model: LoadedModel, lengths: tuple[int, ...], *, beside: bool = False) -> None:
        self.model = replace(model, dtype="float32", packed=False, equal_lengths=False, split_head=False)
        self.batch = _probe_batch(model, lengths)
        self.shape: HeadShape | None = None
        """How its logits followed from its last hidden state in the last run, if they did."""
        alone = replace(self.model, equal_lengths=True)
        run = partial(hidden_states if model.scalar else native_logits, alone, self.batch)
        self.truth = Truth(model.module, run, beside=beside)

    def causal(self) -> bool:
        """Whether the first and the last sequence, which begin alike, are given the same where they are alike."""
        first, _, last, end = self.batch.bounds.tolist()
        shared = min(SHARED, end - last - 1)
        value_TD = self.truth.value_TD
        return not self.truth.too_far(value_TD[last : last + shared], value_TD[first : first + shared])

    def why_not(self, *, packed: bool) -> str:
        """Why the batch cannot go through it as one; empty where it can."""
        if packed and not self.model.module._supports_attention_backend and self.model.mixers is None:
            return "its attention cannot be replaced"
        try:
            found = self.run(packed=packed)
        except (UnsupportedAttention, TypeError, AttributeError) as error:
            return f"its attention needs what packing lacks ({error})"
        return "packed sequences do not reproduce its own forward" if self.truth.too_far(found) else ""

    def run(self, *, packed: bool, equal_lengths: bool = False) -> Tensor:
        """What the batch gives: of a scalar model the last hidden states, as its head may be all zeros; else logits."""
        model = replace(self.model, packed=packed, equal_lengths=equal_lengths)
        logits = partial(native_logits, model, self.batch)
        with _replaced(model.module) if packed else nullcontext():
            if model.scalar:
                return hidden_states(model, self.batch)
            found, self.shape = through_base(model.module, partial(hidden_states, model, self.batch), logits)
        if self.shape is not None and not self.truth.too_far(found):
            return found
        # There may be more to it than its base model and a head.
        self.shape = None
        with _replaced(model.module) if packed else nullcontext():
            return logits()


def through_base(
    module: Any, states: Callable[[], Tensor], logits: Callable[[], Tensor]
) -> tuple[Tensor, HeadShape | None]:
    """Logits that the module makes of its base model's output, [T, V], and how they follow from the product of its
    head and its last hidden state; None where they do not.

    ``states`` runs the base model on some tokens and gives its last hidden state, [T, D], ``logits`` the module on
    them. Layers run once: what the base model gave is what it is made to give again inside the module. The config says
    what shape to try; it is proved at magnitudes that any bend would show at.
    """
    head, base = module.get_output_embeddings(), module.base_model
    if (
        head is None
        or base is module
        or getattr(head, "in_features", None) != module.get_input_embeddings().weight.shape[1]
    ):
        return logits(), None
    given: list[Any] = []
    hook = base.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        state_TD = states()
    finally:
        hook.remove()
    config = module.config.get_text_config()
    scale = 1.0
    for name, power in (("logits_scaling", -1), ("logit_scale", 1), ("lm_head_multiplier", 1)):
        scale *= (getattr(config, name, None) or 1.0) ** power
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    shape = HeadShape(scale, next(filter(None, caps), None))
    # Residuals of some are in float32, whatever their weights are.
    dtype = head.weight.dtype
    product = head(state_TD.to(dtype))
    with _giving(base, given):
        found = logits()
    if not _close(shape.of(product), found):
        return found, None
    for largest in (10.0, 5 * (shape.cap or 20.0)):
        factor = largest / max(1e-6, float(product.abs().max()) * abs(scale))
        with _giving(base, [_enlarged(output, factor) for output in given]):
            final = logits()
        if not _close(shape.of(head((state_TD * factor).to(dtype))), final):
            return found, None
    return found, shape


def _enlarged(output: Any, factor: float) -> Any:
    """A base model's output with its last hidden state times ``factor``."""
    output = copy.copy(output)
    output["last_hidden_state"] = output["last_hidden_state"] * factor
    return output


@contextmanager
def _giving(base: Any, outputs: list[Any]) -> Iterator[None]:
    """With a base model that gives these when it is called, one after the other, and computes nothing."""
    own, left = base.forward, iter(outputs)
    # A module that calls it oftener is another matter, which its logits show.
    base.forward = lambda *args, **kwargs: next(left, outputs[-1])
    try:
        yield
    finally:
        # As it was found: the class's, or one that stood in its place.
        del base.forward
        if base.forward != own:
            base.forward = own


def _replace(module: Any) -> None:
    """Tandem's attention, and its grouped experts."""
    module.set_attn_implementation(IMPLEMENTATION)
    group_experts(module)


@contextmanager
def _replaced(module: Any) -> Iterator[None]:
    """``_replace``, taken back at the end."""
    attention, experts = module.config._attn_implementation, module.get_experts_implementation()
    _replace(module)
    try:
        yield
    finally:
        module.set_attn_implementation(attention)
        module.set_experts_implementation(experts)


def _probe_batch(model: LoadedModel, lengths: tuple[int, ...]) -> Batch:
    """Three sequences, the last of which begins as the first does."""
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    limit = getattr(model.module.config, "max_position_embeddings", None) or max(lengths)
    generator = torch.Generator().manual_seed(0)
    # Not 0 or 1, which some models take for padding.
    ids = [torch.randint(2, vocabulary, (min(limit, n),), generator=generator).tolist() for n in lengths]
    shared = min(SHARED, len(ids[2]) - 1)
    ids[2][:shared] = ids[0][:shared]
    sequences = [Sequence(token_ids=i, trainable=[True] * len(i)) for i in ids]
    return pack(sequences, prompt_lengths=[shared, 0, shared]).to(model.device)


def _close(value: Tensor, truth: Tensor) -> bool:
    return value.shape == truth.shape and not too_far(value, truth)


def too_far(
    value: Tensor, truth: Tensor, *, most: bool = False, rounding: float = 0.0, cap: float = MOST_ROUNDING
) -> str:
    """How far ``value`` is from the truth, [T, D] both, where that is more than rounding; else nothing.

    ``rounding``: what rounding makes of it in this model, where that is known: ``MARGIN`` times that is allowed for,
    and no more than ``cap``. ``most``: see ``gap_of``.
    """
    tolerance = TOLERANCE if truth.dtype.itemsize >= 4 else LOW_PRECISION_TOLERANCE
    gap = gap_of(value, truth, most=most)
    # Not the other way round: NaN is too far.
    return "" if gap <= max(tolerance, min(MARGIN * rounding, cap)) else f"off by {gap:.1%}"


def gap_of(value: Tensor, truth: Tensor, *, most: bool = False) -> float:
    """The difference over the truth, [T, D] both, in norms, of the worst row: it would hide among those that are right.

    ``most``: of the median row, where rounding by itself may make some rows others.
    """
    truth, value = truth.float(), value.float()
    gap_T = (value - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-6)
    return float(gap_T.median() if most else gap_T.max())
