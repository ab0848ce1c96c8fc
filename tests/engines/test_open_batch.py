"""An engine that is never shut: jobs come, are given up and fail while others run, which draw what they draw alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers.drawing import drawn, mixed_requests
from helpers.engine_models import EOS, model, tokenizer

from tandem.engines.live.core import LiveCore
from tandem.engines.live.decoder import Decoder
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.fitting import Fitting
from tandem.engines.live.pages import PAGE
from tandem.engines.live.sample import Sample
from tandem.errors import UserError
from tandem.futures import wait_all
from tandem.types import Completion, Request, SamplingParams

WAYS = ["slots", "captured", "padded"]


def live(module: Any, way: str, **options: Any) -> LiveEngine:
    return LiveEngine(module, tokenizer(), way=way, **options)  # type: ignore[arg-type]


def one(length: int, token: int = 7, *, seeds: tuple[int, ...] = (1,), prompt: int = 1) -> Request:
    sampling = SamplingParams(max_new_tokens=length, temperature=0.9)
    return Request(prompt_ids=(5,) * (prompt - 1) + (token,), seeds=seeds, sampling=sampling)


def core(engine: LiveEngine) -> LiveCore:
    found = engine.stepper.core
    assert isinstance(found, LiveCore)
    return found


def advance(engine: LiveEngine, steps: int) -> None:
    """As somebody who waits would."""
    with engine.stepper._lock:
        for _ in range(steps):
            engine.stepper._deliver(core(engine).step())


def nothing_is_left(engine: LiveEngine) -> None:
    assert engine.stepper.unfinished == 0
    assert not core(engine).samples
    assert core(engine).batching is None
    if engine.fitting is not None and engine.fitting.decoder is not None:
        pool = engine.fitting.decoder.pool
        assert pool.available == pool.pages - 1
        assert not pool.holders.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"max_slots": 3}])
def test_calls_that_come_while_others_run_change_no_sample(way: str, options: dict[str, int]) -> None:
    """The later ones need more rows, more pages a row and another stop rule than the engine was made ready for."""
    module = model("qwen2", eos=EOS)
    asked = [one(3), one(40, 9), *mixed_requests(8), one(100, 11, prompt=20)]
    truth = [live(module, way).generate([request])[0] for request in asked]
    engine = live(module, way, **options)
    first = engine.submit(asked[:2])
    first[0].result()
    second = engine.submit(asked[2:-1])
    second[2].result()
    third = engine.submit(asked[-1:])
    assert drawn(wait_all([*third, *first, *second])) == drawn([truth[-1], *truth[:-1]])
    nothing_is_left(engine)


@pytest.mark.parametrize("way", ["slots", "captured"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_samples_are_given_up_wherever_they_are(way: str, steps: int) -> None:
    """Of three prompts with four samples each: new, waiting, prefilled or decoding, with steps under way."""
    module = model("qwen2")
    asked = [one(30, token, seeds=(1, 2, 3, 4), prompt=3) for token in (7, 8, 9)]
    kept = [one(45, 11, seeds=(5, 6)), one(20, 12)]
    truth = live(module, way).generate(kept)
    for order in ((0, 1), (1, 0)):
        engine = live(module, way, max_slots=5, prefill_tokens=4)
        stays, goes = (engine.submit([kept, asked][which]) for which in order)
        stays, goes = (stays, goes) if order == (0, 1) else (goes, stays)
        advance(engine, steps)
        names = [name for name, (part, _) in engine.stepper._jobs.items() if part in goes]
        core(engine).abort(names[1::2])
        core(engine).abort([*names, 10**6])
        for name in names:
            engine.stepper._jobs.pop(name)
        assert drawn(wait_all(stays)) == drawn(truth)
        nothing_is_left(engine)
        assert drawn(engine.generate(kept)) == drawn(truth)


def test_rows_of_samples_that_were_given_up_in_a_flight_stop_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rules are not the next call's, whose table of stop ids may be shorter."""
    engine = live(model("qwen2"), "captured")
    rules = [SamplingParams(max_new_tokens=90, stop_token_ids=(token,)) for token in (90, 91, 92)]
    asked = [Request(prompt_ids=(5, 6), seeds=(1, 2), sampling=sampling) for sampling in rules]
    engine.submit(asked)
    advance(engine, 2)
    alive: list[int] = []
    steps = Decoder.steps

    def watched(self: Decoder, rows: int, *rest: Any) -> Any:
        alive.append(int(self.state_FS[5, :rows].sum()))
        return steps(self, rows, *rest)

    with engine.stepper.exclusive():
        engine.stepper.fail(UserError("given up"))
    monkeypatch.setattr(Decoder, "steps", watched)
    engine.generate([one(8)])
    assert max(alive) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_call_with_logits_that_are_not_finite_leaves_the_others(way: str) -> None:
    module = model("qwen2")
    asked = [one(25, 11, seeds=(5, 6))]
    truth = live(module, way).generate(asked)
    engine = live(module, way, max_slots=3)
    unused = next(token for token in range(13, 60) if all(token not in sample.token_ids for sample in truth[0]))
    with torch.no_grad():
        module.get_input_embeddings().weight[unused] = float("nan")
    (good,) = engine.submit(asked)
    fine, bad = engine.submit([one(1, 12), one(9, unused, seeds=(1, 2, 3))])
    with pytest.raises(UserError, match=r"request 1, sample 0: .* not finite at new token 0"):
        bad.result()
    assert fine.done()
    assert drawn([good.result()]) == drawn(truth)
    nothing_is_left(engine)


def test_a_sample_that_no_cache_has_room_for_leaves_the_others() -> None:
    engine = live(model("qwen2"), "captured", cache_tokens=3 * PAGE)
    (good,) = engine.submit([one(20)])
    (small,), (large,) = engine.submit([one(10)]), engine.submit([one(100)])
    with pytest.raises(UserError, match=rf"request 0, sample 0: .* room for {3 * PAGE} tokens and one sample may need"):
        large.result()
    assert [len(future.result()[0].token_ids) for future in (good, small)] == [20, 10]
    with pytest.raises(UserError, match="room for"):
        engine.generate([one(100)])
    nothing_is_left(engine)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_is_cut_off_leaves_an_engine_that_works(
    way: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model("qwen2")
    engine = live(module, way, max_slots=3)
    asked = [one(12, token, seeds=(1, 2)) for token in (7, 8, 9)]
    truth = engine.generate(asked)
    (waits,) = engine.submit([one(5)])
    calls = 0
    add, extend = Sample.add, Sample.extend

    def cut_off(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "add", lambda *args: (cut_off(), add(*args))[1])
        patch.setattr(Sample, "extend", lambda *args, **kw: (cut_off(), extend(*args, **kw))[1])
        with pytest.raises(error, match="in the middle"):
            engine.generate(asked)
    with pytest.raises(RuntimeError, match="in the middle"):
        waits.result()
    nothing_is_left(engine)
    assert drawn(engine.generate(asked)) == drawn(truth)


@pytest.mark.parametrize("way", ["slots", "captured"])
def test_weights_that_change_between_two_steps_stamp_their_samples(way: str) -> None:
    """What runs goes on; what has not begun is wholly of the new weights, also where its prompt was prefilled."""
    module = model("qwen2")
    version = 3
    engine = live(module, way, version=lambda: version, max_slots=2)
    asked = [one(90, 8), one(30, 9, seeds=(1, 2, 3))]
    old = [c for cs in live(module, way).generate([asked[1], one(6, 10)]) for c in cs]
    running, waiting = engine.submit(asked)
    advance(engine, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.05)
    version = 4
    (late,) = engine.submit([one(6, 10)])
    (went_on,) = running.result()
    assert (went_on.version_min, went_on.version_max) == (3, 4)
    found = [*waiting.result(), *late.result()]
    truth = [c for cs in live(module, way).generate([asked[1], one(6, 10)]) for c in cs]
    assert [(c.version_min, c.version_max) for c in found] == [(3, 4), (4, 4), (4, 4), (4, 4)]
    assert [c.token_ids for c in found[1:]] == [c.token_ids for c in truth[1:]]
    assert [c.token_ids for c in found] != [c.token_ids for c in old]


def test_a_larger_decoder_is_made_few_times_while_samples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = Fitting.make

    def counted(self: Fitting, samples: list[Sample], slots: int, *, spare: int) -> list[Sample]:
        made.append(slots)
        return make(self, samples, slots, spare=spare)

    monkeypatch.setattr(Fitting, "make", counted)
    module = model("qwen2")
    engine = live(module, "captured")
    asked = [one(60, token) for token in range(20, 50)]
    futures = []
    for request in asked:
        futures += engine.submit([request])
        advance(engine, 1)
    found = wait_all(futures)
    assert len(made) <= 6
    assert drawn(found) == drawn(live(module, "slots").generate(asked))
    nothing_is_left(engine)


@pytest.mark.parametrize("way", WAYS)
def test_threads_share_an_engine(way: str) -> None:
    module = model("qwen2", eos=EOS)
    asked = mixed_requests(6)
    truth = [live(module, way).generate([request])[0] for request in asked]
    engine = live(module, way, max_slots=4)
    found: dict[int, list[Completion]] = {}

    def ask(number: int) -> None:
        found[number] = engine.generate([asked[number]])[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn([found[number] for number in range(len(asked))]) == drawn(truth)
    nothing_is_left(engine)


@pytest.mark.parametrize("way", ["slots", "captured"])
def test_an_interrupt_while_samples_are_given_up_costs_all_and_not_the_engine(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model("qwen2")
    engine = live(module, way)
    (gone,), (other,) = engine.submit([one(60)]), engine.submit([one(20, 8)])
    advance(engine, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(core(engine).batching), "leave", interrupted)
        with pytest.raises(KeyboardInterrupt), engine.stepper._lock:
            engine.stepper._end(gone.call, UserError("given up"))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="interrupted"):
        other.result()
    nothing_is_left(engine)
    assert drawn(engine.generate([one(20, 8)])) == drawn(live(module, way).generate([one(20, 8)]))
