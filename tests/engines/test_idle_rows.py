"""How much of a device the live engine uses while a run trains on it in turns: counted on a simulated one.

The device does one thing after another, as a stream does; time is counted in decoding steps of all rows. The host's own
code takes none, but where a run has other things to do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_models import EOS, model, tokenizer

from tandem.engines.live import fitting
from tandem.engines.live.decoder import Decoder, Landing
from tandem.engines.live.engine import LiveEngine
from tandem.futures import Future
from tandem.kernels.draw import ALIVE, DRAWN, FIELDS, LIMIT, SEED
from tandem.schedules.buffer import Buffer, Place
from tandem.types import Completion, Request, SamplingParams, Ticket

ROWS, PROMPTS, SAMPLES, MEAN, LONGEST = 64, 32, 8, 260, 1024
PACKING, WRITING, TRAINING = 90, 30, 1000
"""Steps for which the host is busy before a training step and after it, and for which training has the device."""


class Device:
    """What it has been given ends at ``end``; the host is at ``now``."""

    def __init__(self) -> None:
        self.now = self.end = self.idle = 0.0
        self.drawn = 0

    def enqueue(self, steps: float) -> float:
        self.idle += max(0.0, self.now - self.end)
        self.end = max(self.now, self.end) + steps
        return self.end


class Later(Landing):
    def __init__(self, device: Device, at: float, values: np.ndarray) -> None:
        self.device, self.at, self.drawn = device, at, values

    @property
    def landed(self) -> bool:
        return self.device.now >= self.at

    def values(self) -> np.ndarray:
        self.device.now = max(self.device.now, self.at)
        return self.drawn


def ends_after(seed: int, equal: bool) -> int:
    """Tokens of a sample: a number of its seed."""
    return LONGEST if equal else 1 + int(math.log(random.Random(int(seed)).random()) / math.log(1 - 1 / MEAN))


class Simulated(Decoder):
    """A decoder without a model: a sample ends when ``ends_after`` says, or at its limit."""

    device_of_all: Device
    equal = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows_FS = np.zeros((FIELDS, self.slots), np.int64)
        self.end_S = np.zeros(self.slots, np.int64)
        self.prefill = lambda prompts, pages: torch.zeros(len(prompts), 1)  # type: ignore[assignment]

    def draw(self, rows: Any) -> np.ndarray:
        """Tokens of rows, float64 [3, N], -1 where they had ended."""
        lives_N = self.rows_FS[ALIVE, rows] > 0
        self.device_of_all.drawn += int(lives_N.sum())
        self.rows_FS[DRAWN, rows] += lives_N
        last_N = self.rows_FS[DRAWN, rows] >= self.end_S[rows]
        self.rows_FS[ALIVE, rows] = lives_N & ~last_N & (self.rows_FS[DRAWN, rows] < self.rows_FS[LIMIT, rows])
        drawn_3N = np.zeros((3, len(lives_N)))
        drawn_3N[0] = np.where(lives_N, np.where(last_N, EOS, 2), -1)
        return drawn_3N

    def start(self, slots: list[int], state_FN: np.ndarray, *rest: Any) -> Landing:
        self.rows_FS[:, slots] = state_FN
        self.rows_FS[ALIVE, slots] = 1
        self.end_S[slots] = [ends_after(seed, self.equal) for seed in state_FN[SEED]]
        return Later(self.device_of_all, self.device_of_all.enqueue(0), self.draw(slots)[None])

    def steps(self, rows: int, count: int, wanted: Any) -> Landing:
        drawn = np.stack([self.draw(slice(rows)) for _ in range(count)])
        return Later(self.device_of_all, self.device_of_all.enqueue(count), drawn)

    def stop(self, slots: list[int]) -> None:
        self.rows_FS[ALIVE, slots] = 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        self.rows_FS[:, targets], self.end_S[targets] = self.rows_FS[:, sources], self.end_S[sources]
        self.stop(sources)

    def set_table(self, table_SP: np.ndarray) -> None:
        """Nobody reads it."""


def share_used(monkeypatch: pytest.MonkeyPatch, *, max_lag: int, equal: bool = False, steps: int = 4) -> float:
    """Tokens drawn for each row and step that the device had beside training, in all steps but the first."""
    device = Device()
    monkeypatch.setattr(Simulated, "device_of_all", device, raising=False)
    monkeypatch.setattr(Simulated, "equal", equal)
    monkeypatch.setattr(fitting, "Decoder", Simulated)
    module = model("qwen2", eos=EOS)
    module.config.max_position_embeddings = 2048
    version = 0
    engine = LiveEngine(module, tokenizer(), way="captured", max_slots=ROWS, version=lambda: version)
    sampling = SamplingParams(max_new_tokens=MEAN if equal else LONGEST)

    def begin(numbers: range) -> Iterator[tuple[int, Future[list[Completion]]]]:
        asked = [
            Request(prompt_ids=(2,) * 64, seeds=tuple(range(n * SAMPLES, (n + 1) * SAMPLES)), sampling=sampling)
            for n in numbers
        ]
        return zip(numbers, engine.submit(asked), strict=True)

    buffer = Buffer(items_per_step=PROMPTS, max_lag=max_lag, window=0.3)
    begun, before = 0, (0.0, 0)
    for step in range(steps):
        for number, future in begin(range(begun, begun := begun + buffer.room(steps + 2))):
            buffer.add(Place(Ticket(number=number, row=0, step=0, place=0), future, admitted=step))
        engine.wait(lambda: buffer.ready(PROMPTS))
        taken = buffer.take(PROMPTS, step)
        for place in taken:
            place.item.result()
        device.now += PACKING
        device.now = device.enqueue(TRAINING)
        version += 1
        engine.go_on()
        buffer.trained()
        device.now += WRITING
        if step == 0:
            before = device.now - TRAINING, device.drawn
    return (device.drawn - before[1]) / ROWS / (device.now - before[0] - steps * TRAINING)


def test_open_samples_use_the_device_while_the_host_does_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lag 1 and unknown lengths: 0.87 with nothing enqueued ahead, 0.95 where one row in 16 is waited for."""
    assert share_used(monkeypatch, max_lag=1) > 0.96
