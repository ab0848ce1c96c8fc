"""Threads that share one engine: whoever stops stepping leaves it to one who still waits for something."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from tandem.engines.vllm.stepper import Job, Stepper

PATIENCE_S = 20.0


@dataclass
class Output:
    request_id: str
    finished: bool = True


class Engine:
    """Ends what the first two calls wait for in one step, once all are there, and the rest a step later."""

    def __init__(self) -> None:
        self.steps = 0
        self.requests: list[str] = []
        self.stepper = Stepper(self, 9, lambda: 0)

    def add_request(self, name: str, prompt: object, params: object) -> None:
        self.requests.append(name)

    def step(self) -> list[Output]:
        self.steps += 1
        if self.steps == 1:
            end = time.monotonic() + PATIENCE_S
            while [call.waiting for call in self.stepper._calls] != [False, True, True]:
                assert time.monotonic() < end
                time.sleep(0.001)
            return []
        ended, self.requests = self.requests[:2], self.requests[2:]
        return [Output(name) for name in ended]


def test_two_calls_that_end_in_one_step_leave_the_third_to_go_on():
    engine = Engine()
    done: list[int] = []

    def call(number: int) -> None:
        engine.stepper.run([Job(None, None)], lambda index, ended: done.append(number))

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(3)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        end = time.monotonic() + PATIENCE_S
        while len(engine.stepper._calls) < count and time.monotonic() < end:
            time.sleep(0.001)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(done) == [0, 1, 2]
    assert engine.steps == 3
