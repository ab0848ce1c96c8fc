"""The live engine's fast way on a GPU: which forward, how large a cache, and what is kept from call to call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch

from tandem.engines.live.decoder import Decoder
from tandem.engines.live.forwards import LeanForward, OwnForward, Unlike
from tandem.engines.live.over_pages import PagedBatching
from tandem.engines.live.pages import PAGE, pages_for
from tandem.engines.live.probe import find_cache_shape, why_not_pages
from tandem.engines.samples import Sample
from tandem.errors import UserError
from tandem.types import SamplingParams

log = logging.getLogger("tandem")
KEPT_SHARE = 0.05
"""A cache of at most this share of the device's memory, and its graphs, stay from call to call."""
FREE_SHARE = 0.85
"""The cache takes at most this share of the memory that is free; activations and logits need the rest."""


class Fitting:
    """Continuous batching over pages, each step one captured graph. It samples on the module's own parameters.

    ``positions``: most tokens of a sequence (None: the model has no limit of its own); ``cache_tokens``: most tokens in
    the cache (None: what is free); ``eight_bit``: whether it keeps them in 8 bits. Raises Unlike where no forward over
    pages computes what the module computes.
    """

    def __init__(
        self, module: Any, *, positions: int | None, cache_tokens: int | None = None, eight_bit: bool = False
    ) -> None:
        self.module = module
        self.cache_tokens = cache_tokens
        self.shape, attention = find_cache_shape(module)
        self.decoder: Decoder | None = None
        self.addresses: tuple[int, ...] = ()
        self.forward: LeanForward | OwnForward
        self.own_because = ""
        """Why the module's own forward is used, where it is."""
        try:
            self.forward = LeanForward(module, positions=positions, attention=attention)
            self.own_because = why_not_pages(module, self.forward, self.shape)
        except Unlike as error:
            self.own_because = str(error)
        if self.own_because:
            self.forward = OwnForward(module)
            if reason := why_not_pages(module, self.forward, self.shape):
                raise Unlike(reason)
            log.warning("%s: sampled with its own forward (slower): %s", type(module).__name__, self.own_because)
        # Only now: what is compared above is how it computes, not what 8 bits lose.
        self.shape = replace(self.shape, eight_bit=eight_bit)

    def run(
        self,
        samples: list[Sample],
        params: Seq[SamplingParams],
        seeds: Seq[int],
        finish: Callable[[Sample], None],
        *,
        max_slots: int,
        prefill_tokens: int,
    ) -> None:
        """Samples everything, at most ``max_slots`` side by side. Parameters by the samples' numbers."""
        decoder = self._decoder(samples, min(max_slots, len(samples)))
        stops: dict[frozenset[int], int] = {}
        rules = [stops.setdefault(sample.rule.ids, len(stops)) for sample in samples]
        decoder.set_stops(list(stops), self.module.get_output_embeddings().weight.shape[0])
        try:
            PagedBatching(decoder, samples, params, seeds, rules, finish, prefill_tokens=prefill_tokens).run()
        except BaseException:
            # Its pages are held by samples that are gone.
            self.release()
            raise
        if decoder.device.type == "cuda":
            memory = torch.cuda.get_device_properties(decoder.device).total_memory
            if decoder.pool.pages * self.shape.page_bytes > KEPT_SHARE * memory:
                self.release()

    def release(self) -> None:
        """Gives the cache and the graphs back."""
        if self.decoder is not None and self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        self.decoder = None

    def _decoder(self, samples: list[Sample], slots: int) -> Decoder:
        """The one of the last call if it is large enough; its graphs too, if the parameters lie where they lay."""
        sizes = sorted((pages_for(s.prompt_length + s.rule.max_new_tokens) for s in samples), reverse=True)
        width = sizes[0]
        # One page a row beside what samples can fill: prompts are shared until their last sample starts.
        wanted = 1 + sum(sizes[:slots]) + slots + width
        if isinstance(self.forward, LeanForward):
            self.forward.stack()
        addresses = tuple(parameter.data_ptr() for parameter in self.module.parameters())
        decoder = self.decoder
        if decoder is None or decoder.slots < slots or decoder.width < width or decoder.pool.pages < wanted:
            if decoder is not None:
                slots, width = max(slots, decoder.slots), max(width, decoder.width)
                del decoder
            self.release()
            pages = self._pages(wanted, width)
            self.decoder = decoder = Decoder(self.forward, self.shape, slots=slots, pages=pages, width=width)
        elif addresses != self.addresses:
            decoder.forget_graphs()
        self.addresses = addresses
        return decoder

    def _pages(self, wanted: int, width: int) -> int:
        """As many as are wanted, or as there is memory for. Raises UserError where not even one sample fits."""
        pages = wanted
        if self.cache_tokens is not None:
            pages = min(pages, self.cache_tokens // PAGE)
        if self.forward.device.type == "cuda":
            pages = min(pages, int(FREE_SHARE * _free_bytes(self.forward.device)) // self.shape.page_bytes)
        if pages < width + 2:
            raise UserError(
                f"the key-value cache has room for {pages * PAGE} tokens and one sample may need {width * PAGE}; lower "
                "max_new_tokens, or leave the device more memory"
            )
        return pages


def _free_bytes(device: torch.device) -> int:
    """What the device has free, and what torch has reserved there without using it."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
