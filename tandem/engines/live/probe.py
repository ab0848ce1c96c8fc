"""Whether a model runs on a cache of ours is tried out on it and on a shrunken copy, not looked up by its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tandem.engines.live.decoder import Decoder
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.layers import Unlike
from tandem.engines.live.over_slots import slots_of
from tandem.engines.live.padded import Together, generate
from tandem.engines.live.pages import CacheShape, PagedDecode
from tandem.engines.live.prefill import Forward
from tandem.engines.live.states import StateForward
from tandem.kernels.logprob import HeadShape
from tandem.models.attention import IMPLEMENTATION, Ask, PackedLayout, UnsupportedAttention, numbered
from tandem.models.moe.routers import has_experts
from tandem.models.proof.probe import Truth, through_base
from tandem.models.proof.shrunk import LIMIT, TURNING, named_limits, shrunk
from tandem.models.recurrent.states import states_of_layers

PROMPT_LENGTHS = (5, 3)
DECODED = 3
FAR_PROMPT_LENGTHS = (LIMIT - 3, TURNING - 6)
FAR_DECODED = 5
"""Tokens after the prompts of the shrunken copy: the first passes its limits while it decodes, the second is beyond."""


class Trial:
    """Sequences, and what a module's own forward makes of each of them by itself: what any way to decode must give.

    In eval mode only.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: Any,
        prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS,
        decoded: int = DECODED,
        *,
        beside: bool = False,
    ) -> None:
        self.module, self.prompt_lengths, self.decoded = module, prompt_lengths, decoded
        embedding = module.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        # Not 0 or 1, which some models take for padding.
        self.sequences = [
            torch.randint(2, embedding.shape[0], (n + decoded,), generator=generator) for n in prompt_lengths
        ]
        # Nothing that holds this trial: a cycle would keep a small copy until the collector comes by.
        self.truth = Truth(module, partial(_alone, module, self.sequences, prompt_lengths), beside=beside)

    @classmethod
    def both(cls, module: Any) -> tuple[Trial, Trial | None]:
        """That of the module, and that of a shrunken copy beyond the limits that its config names; None: there is no
        copy."""
        small = shrunk(module)
        near = cls(module, beside=small is not None)
        if small is None:
            return near, None
        far = cls(small, FAR_PROMPT_LENGTHS, FAR_DECODED)
        if module.config._attn_implementation == IMPLEMENTATION:
            small.set_attn_implementation(IMPLEMENTATION)
        return near, far

    @torch.no_grad()
    def why_not_slots(self) -> str:
        """Why the slot cache does not reproduce the module's own forward; empty where it does."""
        return why_not_layouts(self.module) or self._compare(lambda: _slot_logits(self.module, self))

    @torch.no_grad()
    def why_not_pages(self, forward: Forward | StateForward, shape: CacheShape) -> str:
        """Why ``forward`` over pages does not reproduce the module's own; empty where it does."""
        return self._said(lambda: self.truth.why_not(lambda: torch.cat(_page_logits(forward, shape, self))))

    @torch.no_grad()
    def why_not_captured(self, forward: Forward | StateForward, shape: CacheShape) -> str:
        """Why a step of experts, or of a module's own forward, cannot be captured: it waits for the host. Else empty.

        Experts do that are computed one after the other (``models.moe.experts`` has those that are stacked).
        """
        device = forward.device
        experts = has_experts(self.module)
        if device.type != "cuda" or not (experts or isinstance(forward, OwnForward | StateForward)):
            return ""
        decoder = Decoder(forward, shape, slots=1, pages=2, width=1)
        zero_1 = torch.zeros(1, dtype=torch.int64, device=device)
        if decoder.states is not None:
            decoder.prefill([[2]], [decoder.pool.take(1)])
            decoder.load_states(zero_1, zero_1)
        # A row that has ended, on the page that is nobody's.
        layout = PagedDecode(decoder.pool, zero_1.int()[None], zero_1, zero_1)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            for asked in ("default", "error"):
                # The first time kernels are compiled.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # That it is a prototype.
                    torch.cuda.set_sync_debug_mode(asked)
                decoder.logits(zero_1, zero_1, layout)
        except UnsupportedAttention:
            return ""  # Whoever compares says it.
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            states = isinstance(forward, StateForward)
            part = "products of its experts" if experts else "layers with a state" if states else "its layers"
            return f"{part} in {str(shape.dtype).removeprefix('torch.')} wait for the host"
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return ""

    @torch.no_grad()
    def why_not_padded(self, together: Together) -> str:
        """Why the module's own ``generate`` does not, with those prompts in a batch that may be ``together``."""
        return self._compare(lambda: _generated_logits(self.module, self, together))

    def _compare(self, logits_of: Callable[[], list[Tensor]]) -> str:
        """Why logits of what follows the prompts, and the tokens after them, are not the module's own."""
        return self._said(lambda: self.truth.too_far(torch.cat(logits_of())))

    def _said(self, compare: Callable[[], str]) -> str:
        try:
            far = compare()
        except UnsupportedAttention as error:
            return f"its attention needs what the cache lacks ({error})"
        return f"decoding from the cache does not reproduce its own forward ({far})" if far else ""


def why_not_tried(module: Any, far: Trial | None) -> str:
    """Why no trial ``far`` beyond the limits that the module's config names was made; empty where none was needed."""
    limits = [] if far is not None else named_limits(module.config)
    return (
        f"what it does beyond its limits ({', '.join(limits)}) could not be tried out on a small copy" if limits else ""
    )


def why_not_layouts(module: Any) -> str:
    """What says without a trial that the module's attention cannot be computed by a layout."""
    if states_of_layers(module):
        return ""  # Its layers say it themselves.
    if not module._supports_attention_backend:
        return "its attention cannot be replaced"
    implementation = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        return f"its attention implementation is {implementation!r} and not {IMPLEMENTATION!r}"
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of {', '.join(odd)}"
    return ""


@torch.no_grad()
def find_cache_shape(module: Any) -> CacheShape:
    """What a token needs in the cache.

    Raises Unlike where pages do not hold what its layers keep.
    """
    if states_of_layers(module):
        return _shape_beside_states(StateForward(module))
    forward = OwnForward(module)
    seen = _Seen(torch.tensor([0, 2]), forward.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=forward.device)
    try:
        forward(ids, torch.arange(2, device=forward.device)[None], seen)
    except UnsupportedAttention as error:
        raise Unlike(f"its attention needs what pages lack ({error})") from error
    if sorted(seen.layers) != list(range(len(seen.layers))):
        raise Unlike("its attention layers are not numbered from 0")
    flash = all(
        k.shape == v.shape and k.shape[-1] % 8 == 0 and k.shape[-1] <= 256 and ask.softcap is None
        for k, v, ask in seen.layers.values()
    )
    return _shape_of([seen.layers[number][:2] for number in range(len(seen.layers))], flash=flash)


def _shape_beside_states(forward: StateForward) -> CacheShape:
    found = forward.prefill([(2, 2)])
    state_bytes = sum(state.nbytes for state in found.states.values())
    kept = found.keys_and_values
    if not kept:
        return CacheShape(kept=(), layers=(), dtype=found.logits_PV.dtype, state_bytes=state_bytes)
    return _shape_of([kept[number] for number in range(len(kept))], state_bytes=state_bytes)


def _shape_of(layers: list[tuple[Tensor, Tensor]], **others: Any) -> CacheShape:
    """That of the keys and values of each layer, whose dimension 1 is heads, and whose last one is their width."""
    if any(key.shape[1] != value.shape[1] or key.shape[-1] < value.shape[-1] for key, value in layers):
        raise Unlike("its values are wider than its keys, or of other heads")
    if len(dtypes := {value.dtype for _, value in layers}) > 1:
        raise Unlike("its layers keep values of several types")
    # Layers that share keys and values are given the same ones.
    places = [(key.data_ptr(), value.data_ptr()) for key, value in layers]
    own = list(dict.fromkeys(places))
    return CacheShape(
        kept=tuple((key.shape[1], key.shape[-1]) for key, _ in (layers[places.index(place)] for place in own)),
        layers=tuple(map(own.index, places)),
        dtype=dtypes.pop(),
        **others,
    )


@torch.no_grad()
def head_shape_of(module: Any) -> HeadShape | None:
    """What the module does to the product of its head and its last hidden state; None where that is not all it does."""
    generator = torch.Generator().manual_seed(0)
    weight = module.get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (1, PROMPT_LENGTHS[0]), generator=generator).to(weight.device)
    _, shape = through_base(
        module,
        lambda: module.base_model(input_ids=ids, use_cache=False)["last_hidden_state"][0],
        lambda: module(input_ids=ids, use_cache=False).logits[0],
    )
    return shape


class _Seen(PackedLayout):
    """Writes down what each layer asks of attention."""

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        super().__init__(bounds, device)
        self.layers: dict[int, tuple[Tensor, Tensor, Ask]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        self.layers[numbered(ask)] = (key, value, ask)
        return super().attend(query, key, value, ask)


def _alone(module: Any, sequences: list[Tensor], prompt_lengths: tuple[int, ...]) -> Tensor:
    """Logits for what follows each prompt and each of the tokens after it, by the module's own forward."""
    device = module.get_input_embeddings().weight.device
    return torch.cat(
        [
            module(input_ids=sequence[None].to(device), use_cache=False).logits[0, length - 1 :]
            for sequence, length in zip(sequences, prompt_lengths, strict=True)
        ]
    )


def _slot_logits(module: Any, trial: Trial) -> list[Tensor]:
    """Logits [decoded + 1, V] for what follows each prompt and each of the tokens after it."""
    slots = slots_of(module)
    sequences = trial.sequences
    prompts = [tuple(s[: -trial.decoded].tolist()) for s in sequences]
    count = len(prompts)
    # Others of their lengths go through beside them.
    prefilled = slots.prefill([*(prompt[::-1] for prompt in prompts), *prompts])
    slots.grow(count, max(map(len, sequences)))
    slots.reserve(max(map(len, prompts)))
    prefilled.load_into(list(range(count)), list(range(count, 2 * count)))

    def decode(token_B: Tensor, length_B: Tensor) -> Tensor:
        return slots.decode(token_B, length_B, int(length_B.max()))

    return _decoded(decode, prefilled.logits_PV[count:], trial)


def _page_logits(forward: Forward | StateForward, shape: CacheShape, trial: Trial) -> list[Tensor]:
    """The same through a decoder's pages, one of its own for each sequence."""
    sequences = trial.sequences
    decoder = Decoder(forward, shape, slots=len(sequences), pages=len(sequences) + 1, width=1)
    pages = [decoder.pool.take(1) for _ in sequences]
    logits_PV = decoder.prefill([s[: -trial.decoded].tolist() for s in sequences], pages)
    row_B = torch.arange(len(sequences), device=forward.device)
    decoder.load_states(row_B, row_B)
    table_BP = torch.tensor(pages, dtype=torch.int32).to(forward.device)

    def decode(token_B: Tensor, length_B: Tensor) -> Tensor:
        layout = PagedDecode(decoder.pool, table_BP, length_B, torch.ones_like(length_B))
        return decoder.logits(token_B, length_B, layout)

    return _decoded(decode, logits_PV, trial)


def _decoded(decode: Callable[[Tensor, Tensor], Tensor], logits_PV: Tensor, trial: Trial) -> list[Tensor]:
    device, count = logits_PV.device, trial.decoded
    length_B = torch.tensor(trial.prompt_lengths).to(device)
    steps = [logits_PV]
    for step in range(count):
        token_B = torch.stack([s[len(s) - count + step] for s in trial.sequences]).to(device)
        steps.append(decode(token_B, length_B))
        length_B = length_B + 1
    return list(torch.stack(steps, dim=1))


def _generated_logits(module: Any, trial: Trial, together: Together) -> list[Tensor]:
    """The same through ``generate``, which is made to draw the tokens of the sequences."""
    if together == "all":
        return _forced(module, trial.sequences, trial.decoded)
    found: list[Tensor] = []
    for place, sequence in enumerate(trial.sequences):
        # Another of its length, once before and once behind it.
        other = sequence.roll(1)
        rows = [sequence] if together == "none" else [sequence, other] if place % 2 else [other, sequence]
        found.append(_forced(module, rows, trial.decoded)[next(i for i, row in enumerate(rows) if row is sequence)])
    return found


def _forced(module: Any, sequences: list[Tensor], decoded: int) -> list[Tensor]:
    forced = _Forced([s[-decoded:] for s in sequences])
    generate(module, [s[:-decoded].tolist() for s in sequences], forced, max_new_tokens=decoded + 1)
    return list(torch.stack(forced.seen, dim=1))


class _Forced(LogitsProcessor):
    """Keeps the logits of each step, and leaves only the sequences' own next tokens."""

    def __init__(self, tokens: list[Tensor]) -> None:
        # The last is drawn and looked at by nobody.
        self.token_NB = torch.stack([*torch.stack(tokens, dim=1), torch.full((len(tokens),), 2)])
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B = self.token_NB[len(self.seen)].to(scores.device)
        self.seen.append(scores.clone())
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)
