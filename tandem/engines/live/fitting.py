"""What fits the model and the device: which forward over pages, how large a cache, kept from call to call."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch

from tandem.engines.live.decoder import Decoder
from tandem.engines.live.forwards import LeanForward, OwnForward
from tandem.engines.live.layers import Unlike
from tandem.engines.live.pages import PAGE, pages_for
from tandem.engines.live.probe import Trial, find_cache_shape, head_shape_of, why_not_tried
from tandem.engines.live.sample import Sample
from tandem.engines.live.states import StateForward
from tandem.errors import UserError
from tandem.models.proof.limits import limits_of
from tandem.models.proof.shrunk import POSITIONS
from tandem.models.recurrent.states import states_of_layers

log = logging.getLogger("tandem")
KEPT_SHARE = 0.05
"""A cache of at most this share of the device's memory, and its graphs, stay from call to call."""
FREE_SHARE = 0.85
"""The cache takes at most this share of the memory that is free; activations and logits need the rest."""


STATE_COPIES = 3
"""A row's states, and those of prompts on their way into one and a half times as many rows (``over_pages.AHEAD``)."""


class Fitting:
    """A forward over pages on the module's own parameters, and a decoder in which given samples fit.

    ``positions``: most tokens of a sequence (None: the model has no limit of its own); ``cache_tokens``: most tokens in
    the cache (None: what is free); ``eight_bit``: whether it keeps them in 8 bits. Raises Unlike where no forward over
    pages computes what the module computes.
    """

    def __init__(
        self, module: Any, *, positions: int | None, cache_tokens: int | None = None, eight_bit: bool = False
    ) -> None:
        self.module = module
        self.cache_tokens = cache_tokens
        self.with_states = bool(states_of_layers(module))
        self.shape = find_cache_shape(module)
        if eight_bit and not self.shape.kept:
            raise UserError(f"kv_cache_dtype fp8: {type(module).__name__} keeps no keys and values; take auto")
        near, far = Trial.both(module)
        if reason := why_not_tried(module, far):
            raise Unlike(reason)
        self.decoder: Decoder | None = None
        self.planned = self.planned_slots = 0
        """Pages and rows that the decoder was to have; it may have got fewer."""
        self.says_fewer = False
        """Whether it has been said that it got fewer rows."""
        self.addresses: tuple[int, ...] = ()
        self.shares = False
        """Whether others compute on the device while samples are in the cache: it leaves them what they have needed."""
        self.forward: LeanForward | OwnForward | StateForward
        self.lean: LeanForward | None = None
        """What computes a step, where it is not the module's own forward."""
        self.own_because = ""
        """Why it is that, where it is."""
        try:
            self.lean = LeanForward(module, positions=positions, head_shape=head_shape_of(module))
            self.forward = StateForward(module, self.lean) if self.with_states else self.lean
            shape = self.lean.shape_of(self.shape)
            self.own_because = near.why_not_pages(self.forward, shape)
            if not self.own_because and far is not None:
                longest = min(POSITIONS, limits_of(far.module.config).sampling.positions or POSITIONS)
                lean = LeanForward(far.module, positions=longest, head_shape=head_shape_of(far.module))
                small = StateForward(far.module, lean) if self.with_states else lean
                self.own_because = far.why_not_pages(small, lean.shape_of(find_cache_shape(far.module)))
            if not self.own_because:
                self.shape = shape
        except Unlike as error:
            self.own_because = str(error)
        if self.own_because:
            self.lean = None
            own = StateForward if self.with_states else OwnForward
            self.forward = own(module)
            reason = near.why_not_captured(self.forward, self.shape) or near.why_not_pages(self.forward, self.shape)
            if not reason and far is not None:
                reason = far.why_not_pages(own(far.module), find_cache_shape(far.module))
            if reason:
                raise Unlike(f"{reason}, nor has it a fused forward ({self.own_because})")
            log.warning("%s: sampled with its own forward (slower): %s", type(module).__name__, self.own_because)
        elif reason := near.why_not_captured(self.forward, self.shape):
            raise Unlike(reason)
        # Only now: what is compared above is how it computes, not what 8 bits lose.
        self.shape = replace(self.shape, eight_bit=eight_bit)

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.module.get_output_embeddings().weight.shape[0])

    def look(self) -> None:
        """Before steps: weights may have been moved since the last ones, and graphs know where they lay."""
        if self.lean is not None:
            self.lean.stack()
        addresses = tuple(x.data_ptr() for x in (*self.module.parameters(), *self.module.buffers()))
        if self.decoder is not None and addresses != self.addresses:
            self.decoder.forget_graphs()
        self.addresses = addresses

    def fits(self, samples: Seq[Sample], slots: int) -> bool:
        """Whether these can run in the decoder that there is, ``slots`` side by side."""
        decoder = self.decoder
        if decoder is None:
            return False
        # It may have fewer rows than were planned, where states take much.
        width, pages = _needs(samples, min(slots, decoder.slots))
        return self.planned_slots >= slots and decoder.width >= width and self.planned >= pages

    def make(self, samples: Seq[Sample], slots: int, *, spare: int) -> list[Sample]:
        """Makes a decoder for these, no smaller than the one that there was, which goes.

        It has up to ``spare`` times the pages that they need. Returns those that do not fit even by themselves, with
        their error.
        """
        least = (0, 0) if self.decoder is None else (self.planned_slots, self.decoder.width)
        theirs = self._reserved() - self._cache_bytes() if self.shares else 0
        self.release()
        self.planned_slots = rows = max(slots, least[0])
        free = self._free(theirs)
        if free is not None and self.shape.state_bytes:
            # Half of what is free, so that keys and values have the other half.
            rows = max(1, min(rows, free // 2 // (STATE_COPIES * self.shape.state_bytes)))
            if rows < self.planned_slots and not self.says_fewer:
                self.says_fewer = True
                log.warning(
                    "%s: %d samples side by side, not %d (slower): the states of one take %.3g MB, and half of the "
                    "%.3g MB that are free are for them; leave the device more memory, or lower max_slots",
                    *(type(self.module).__name__, rows, self.planned_slots),
                    *(STATE_COPIES * self.shape.state_bytes / 1e6, free / 1e6),
                )
        room = self._room(free, rows)
        refused = [sample for sample in samples if room is not None and pages_for(sample.limit) + 2 > room]
        for sample in refused:
            sample.fail(
                f"the key-value cache has room for {(room or 0) * PAGE} tokens and one sample may need "
                f"{pages_for(sample.limit) * PAGE}; lower max_new_tokens, or leave the device more memory"
            )
        if len(refused) < len(samples):
            width, pages = _needs([sample for sample in samples if sample.error is None], min(slots, rows))
            self.planned = spare * pages
            pages = self.planned if room is None else min(self.planned, room)
            self.decoder = Decoder(self.forward, self.shape, slots=rows, pages=pages, width=max(width, least[1]))
        return refused

    def rest(self, failed: bool) -> None:
        """While nothing runs, a large cache is given back; also one whose pages are held by samples that are gone."""
        if failed or self._is_large():
            self.release()

    def share(self) -> bool:
        """Others are about to compute on the device while samples are in the cache. Whether it must go for now.

        It must the first time, where it is large: nobody knows yet what the others need. From then on a cache takes
        none of what torch has reserved for them.
        """
        first, self.shares = not self.shares, True
        return first and self._is_large()

    def _is_large(self) -> bool:
        """Whether the cache takes more of the device than may stay."""
        if self.decoder is None or self.decoder.device.type != "cuda":
            return False
        memory = torch.cuda.get_device_properties(self.decoder.device).total_memory
        return self._cache_bytes() > KEPT_SHARE * memory

    def _cache_bytes(self) -> int:
        if self.decoder is None:
            return 0
        return self.decoder.pool.pages * self.shape.page_bytes + self.decoder.slots * self.shape.state_bytes

    def _reserved(self) -> int:
        """Bytes of the device that torch has, in use or not."""
        device = self.forward.device
        return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

    def release(self) -> None:
        """Gives the cache and the graphs back."""
        device = self.forward.device
        if self.decoder is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.decoder = None
        if self.shares and device.type == "cuda":
            # Not to torch: what it has reserved when others are through is what they needed.
            torch.cuda.empty_cache()

    def _free(self, theirs: int) -> int | None:
        """Bytes that the cache may take, beside what others have of the device; None: as many as are asked for."""
        device = self.forward.device
        if device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return int(FREE_SHARE * free_bytes(torch.cuda.mem_get_info(device)[0], self._reserved(), theirs))

    def _room(self, free: int | None, slots: int) -> int | None:
        """Pages that there is room for in ``free`` bytes, beside the states of rows; None: as many as are asked for."""
        room = None if self.cache_tokens is None else self.cache_tokens // PAGE
        if free is None or not self.shape.page_bytes:
            return room
        pages = max(0, free - STATE_COPIES * slots * self.shape.state_bytes) // self.shape.page_bytes
        return pages if room is None else min(room, pages)


def _needs(samples: Seq[Sample], slots: int) -> tuple[int, int]:
    """The most pages of one, and of all when ``slots`` of the longest run."""
    sizes = sorted((pages_for(sample.limit) for sample in samples), reverse=True)
    # One page a row beside what samples can fill: prompts are shared until their last sample starts.
    return sizes[0], 1 + sum(sizes[:slots]) + slots + sizes[0]


def free_bytes(free: int, reserved: int, theirs: int) -> int:
    """Of the ``free`` bytes of a device of which torch has ``reserved`` some, those that others do not need again.

    ``theirs``: what torch had reserved, in use or not, when they were through.
    """
    return max(0, free - max(0, theirs - reserved))
