"""The device's side of continuous batching: the state of every row, and one decoding step as a captured graph.

The host enqueues prefills, steps and changes of rows, all on one stream, and reads results some steps later; the
device decides by itself which rows end. Nothing here waits but ``Landing.values``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.engines.live.draws import Wanted, draw
from tandem.engines.live.graphs import Capturing
from tandem.engines.live.pages import CacheShape, PagedDecode, PagePool, send_array
from tandem.engines.live.prefill import Forward, Prefill, StatePrefill
from tandem.engines.live.states import StateForward, StateStore
from tandem.kernels.draw import ALIVE, DRAWN, FIELDS, LENGTH, LIMIT, RULE, SEED, TOKEN, advance

STEPS = 16
"""Most steps between two readings of results."""


@dataclass
class Landing:
    """Results on their way to the host."""

    result_K3B: Tensor
    event: torch.cuda.Event | None

    @property
    def landed(self) -> bool:
        """Whether ``values`` would not wait."""
        return self.event is None or self.event.query()

    def values(self) -> np.ndarray:
        """float64 [steps, 3, rows], token -1 where a row had ended. Waits until they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.result_K3B.numpy()


class Decoder:
    """Rows that decode side by side: their state, their pages, and a graph for each number of rows.

    ``slots``: rows; ``pages``: pages of the cache; ``width``: most pages of a row. Of a forward with states a row has
    its own beside its pages.
    """

    def __init__(
        self,
        forward: Forward | StateForward,
        shape: CacheShape,
        *,
        slots: int,
        pages: int,
        width: int,
    ) -> None:
        device = forward.device
        self.forward, self.device = forward, device
        self.slots, self.width = slots, width
        self.pool = PagePool(shape, pages, device)
        self.state_FS = torch.zeros(FIELDS, slots, dtype=torch.int64, device=device)
        self.params_5S = torch.ones(5, slots, dtype=torch.float64, device=device)
        self.table_SP = torch.zeros(slots, width, dtype=torch.int32, device=device)
        self.ring_K3S = torch.zeros(STEPS, 3, slots, dtype=torch.float64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.stops_RV = torch.zeros(0, 0, dtype=torch.uint8, device=device)
        self.graphs: dict[tuple[int, Wanted], torch.cuda.CUDAGraph] = {}
        self.capturing = Capturing(device) if device.type == "cuda" else None
        self.states: StateStore | None = None
        self.prefill: Prefill | StatePrefill
        if isinstance(forward, StateForward):
            self.states = StateStore(forward.kept, slots)
            self.prefill = StatePrefill(forward, self.pool)
        else:
            self.prefill = Prefill(forward, self.pool, self.capturing)

    def set_stops(self, stops: list[frozenset[int]], vocabulary: int) -> None:
        """For each rule, the token ids that end a sample."""
        marks_RV = torch.zeros(len(stops), vocabulary, dtype=torch.uint8)
        for rule, ids in enumerate(stops):
            marks_RV[rule, [i for i in ids if 0 <= i < vocabulary]] = 1
        if marks_RV.shape != self.stops_RV.shape:
            self.stops_RV = torch.zeros_like(marks_RV, device=self.device)
            self.graphs.clear()
        self.stops_RV.copy_(marks_RV)

    def start(
        self,
        slots: list[int],
        state_FN: np.ndarray,
        params_5N: Tensor,
        logits_PV: Tensor,
        chosen: list[int],
        wanted: Wanted,
    ) -> Landing:
        """Draws the next token of sequences whose prompts have been prefilled, and lets them go on in ``slots``.

        ``state_FN`` has their LENGTH, DRAWN, LIMIT, RULE and SEED; their logits are rows ``chosen`` of ``logits_PV``.
        """
        sent = send_array(np.concatenate((state_FN, np.asarray((slots, chosen)))), self.device)
        new_FN, slot_N, chosen_N = sent[:FIELDS], sent[FIELDS], sent[FIELDS + 1]
        self.load_states(chosen_N, slot_N)
        alike = chosen == list(range(len(logits_PV)))
        logits_NV = logits_PV if alike else logits_PV.index_select(0, chosen_N)
        params_5N = send_array(params_5N.numpy(), self.device)
        drawn_3N = draw(logits_NV, new_FN[SEED], params_5N, new_FN[DRAWN], wanted)
        new_FN[TOKEN] = drawn_3N[0].long()
        new_FN[DRAWN] += 1
        stopped_N = self.stops_RV[new_FN[RULE], new_FN[TOKEN]] > 0
        new_FN[ALIVE] = ~stopped_N & (new_FN[DRAWN] < new_FN[LIMIT])
        self.state_FS[:, slot_N] = new_FN
        self.params_5S[:, slot_N] = params_5N
        return self._land(drawn_3N[None])

    def load_states(self, prompt_N: Tensor, slot_N: Tensor) -> None:
        """Gives rows the states of prompts of the last prefill, if there are any. Both int64 on the device."""
        if self.states is not None and isinstance(self.prefill, StatePrefill):
            self.states.load(self.prefill.states, prompt_N, slot_N)

    def logits(self, token_B: Tensor, length_B: Tensor, layout: PagedDecode) -> Tensor:
        """Logits [B, V] after one more token in each of the first B rows."""
        if isinstance(self.forward, StateForward):
            assert self.states is not None
            attending = layout if self.pool.sets else None
            return self.forward.decode(token_B, length_B, attending, self.states.held(len(token_B)))
        return self.forward(token_B[:, None], length_B[:, None], layout)[:, -1]

    def steps(self, rows: int, count: int, wanted: Wanted) -> Landing:
        """``count`` tokens for each of the first ``rows`` rows that goes on."""
        self.cursor.zero_()
        graph = self._graph(rows, wanted) if self.capturing is not None else None
        for _ in range(count):
            if graph is not None:
                graph.replay()
            else:
                self._step(rows, wanted)
        return self._land(self.ring_K3S[:count, :, :rows])

    def stop(self, slots: list[int]) -> None:
        """Ends rows that the device would go on with."""
        self._end(send_array(np.asarray(slots), self.device))

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Rows to other places. Their pages stay where they are."""
        source_N, target_N = send_array(np.stack((np.asarray(sources), np.asarray(targets))), self.device)
        self.state_FS[:, target_N] = self.state_FS[:, source_N]
        self.params_5S[:, target_N] = self.params_5S[:, source_N]
        if self.states is not None:
            self.states.move(source_N, target_N)
        self._end(source_N)

    def _end(self, slot_N: Tensor) -> None:
        # Not by assigning 0, for which the host would wait.
        self.state_FS[ALIVE].index_fill_(0, slot_N, 0)

    def set_table(self, table_SP: np.ndarray) -> None:
        """The pages of every row, int32 [slots, width]."""
        self.table_SP.copy_(send_array(table_SP, self.device))

    def _step(self, rows: int, wanted: Wanted) -> None:
        state_FB = self.state_FS[:, :rows]
        layout = PagedDecode(self.pool, self.table_SP[:rows], state_FB[LENGTH], state_FB[ALIVE])
        logits_BV = self.logits(state_FB[TOKEN], state_FB[LENGTH], layout)
        drawn_3B = draw(logits_BV, state_FB[SEED], self.params_5S[:, :rows], state_FB[DRAWN], wanted)
        advance(self.state_FS, drawn_3B, self.stops_RV, self.ring_K3S, self.cursor, rows)

    def _graph(self, rows: int, wanted: Wanted) -> torch.cuda.CUDAGraph:
        if (rows, wanted) not in self.graphs:
            assert self.capturing is not None
            kept = self.state_FS.clone(), self.cursor.clone()
            states = {} if self.states is None else {n: x[:rows].clone() for n, x in self.states.states.items()}
            self.graphs[rows, wanted], _ = self.capturing(lambda: self._step(rows, wanted))
            # It has been done once for real.
            self.state_FS.copy_(kept[0])
            self.cursor.copy_(kept[1])
            for name, state in states.items():
                assert self.states is not None
                self.states.states[name][:rows].copy_(state)
        return self.graphs[rows, wanted]

    def forget_graphs(self) -> None:
        """Captures anew from here on: parameters have moved."""
        self.graphs.clear()
        if isinstance(self.prefill, Prefill) and self.prefill.graphs is not None:
            self.prefill.graphs.graphs.clear()

    def _land(self, result_K3B: Tensor) -> Landing:
        if self.capturing is None:
            return Landing(result_K3B.clone(), None)
        result_K3B = result_K3B.contiguous()
        host = torch.empty(result_K3B.shape, dtype=result_K3B.dtype, pin_memory=True)
        host.copy_(result_K3B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Landing(host, event)
