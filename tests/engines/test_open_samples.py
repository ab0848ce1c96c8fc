"""Samples that stay open: while the caller does something else, while weights change, until they are given up."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.drawing import drawn
from helpers.engine_models import model, tokenizer
from helpers.family_models import family_model
from helpers.telling import tell, told

from tandem.engines.live.core import LiveCore
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.fitting import Fitting, free_bytes
from tandem.engines.live.over_pages import PagedBatching
from tandem.engines.live.sample import Sample
from tandem.engines.requests import StopRule, take_requests
from tandem.errors import Cancelled
from tandem.futures import wait_all
from tandem.types import Request, SamplingParams

WAYS = ["slots", "captured"]
TOKENS = {version: 10 + version for version in range(86)}


def asks(lengths: list[int], **sampling: Any) -> list[Request]:
    return [
        Request(
            prompt_ids=(5, 6, 7, 8)[: 1 + i % 4],
            seeds=(2 * i, 2 * i + 1),
            sampling=SamplingParams(max_new_tokens=length, **sampling),
        )
        for i, length in enumerate(lengths)
    ]


class Joining(Sample):
    """While it is stamped, another thread submits one more."""

    join: Any = None

    def stamp(self, version: int) -> None:
        super().stamp(version)
        self.join()


def test_samples_may_come_while_others_are_stamped_or_held():
    core = LiveCore(torch.nn.Module(), begin=Any, end=lambda failed: None, version=lambda: 0)  # type: ignore[arg-type]
    (asked,) = take_requests(
        asks([3]), lambda number, request: None, lambda sampling: StopRule(sampling, (), tokenizer())
    )
    core.add(0, first := Joining(asked, 0))
    core.add(1, Sample(asked, 1))
    first.join = lambda: core.add(2, Sample(asked, 0))
    core.renew(1)
    assert list(core.samples) == [0, 1, 2]


class Trained:
    """A live engine on weights that change: each version of them draws a token of its own."""

    def __init__(self, way: str, **options: Any) -> None:
        self.module = model("qwen2")
        self.version = -1
        self.step()
        self.engine = LiveEngine(
            self.module, tokenizer(), way=way, version=lambda: self.version, **options  # type: ignore[arg-type]
        )  # fmt: skip

    def step(self) -> None:
        self.version += 1
        tell(self.module, TOKENS[self.version])

    def steps(self, count: int) -> Any:
        """An ``until`` that is true once it has been asked so often, and so many steps have been made."""
        asked = iter(range(count))
        return lambda: next(asked, None) is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"max_slots": 3}, {"cache_tokens": 640}])
def test_every_token_belongs_to_the_weights_that_drew_it(way, options):
    """Also where steps are enqueued ahead, samples wait for rows, and rows are given up for want of pages."""
    if way == "slots" and "cache_tokens" in options:
        pytest.skip("of the paged cache")
    rng = random.Random(0)
    trained = Trained(way, **options)
    futures = trained.engine.submit(asks([9, 100, 3, 60, 60, 33, 1], temperature=0.8))
    while not all(future.done() for future in futures):
        trained.engine.wait(trained.steps(rng.choice([0, 0, 1] if way == "captured" else [0, 1, 5, 20])))
        for _ in range(rng.choice([0, 1, 1, 2])):
            trained.step()
        if rng.random() < 0.5:
            trained.engine.go_on()
    found = [completion for completions in wait_all(futures) for completion in completions]
    assert [len(c.token_ids) for c in found] == [n for n in (9, 100, 3, 60, 60, 33, 1) for _ in range(2)]
    assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
    assert max(len(c.versions) for c in found) > 2
    assert trained.engine.sampled_tokens == sum(len(c.token_ids) for c in found)


@pytest.mark.parametrize("way", WAYS)
def test_what_ends_is_known_while_others_run_and_nothing_is_lost_in_between(way):
    trained = Trained(way)
    heard: list[int] = []
    short, long = trained.engine.submit(asks([2, 90]), lambda ended: heard.extend(request for request, _, _ in ended))
    trained.engine.wait(short.done)
    assert heard == [0, 0]
    assert (short.done(), long.done()) == (True, False)
    busy = trained.engine.busy_seconds
    trained.engine.wait(lambda: True)
    assert trained.engine.busy_seconds == busy > 0
    trained.engine.wait(lambda: False)
    assert long.done(), "nothing is left, whatever is waited for"


def test_samples_that_ended_between_two_waits_may_be_given_up_before_the_next():
    """Their ends were read when the weights changed, and nobody has been told of them."""
    trained = Trained("captured")
    short, long = trained.engine.submit(asks([20, 90]))
    trained.engine.wait(trained.steps(2))
    assert not short.done()
    trained.step()
    trained.engine.go_on()
    names = [name for name, sample in trained.engine.core.samples.items() if sample.stop]
    assert names == [0, 1]
    trained.engine.core.abort(names)
    assert [len(completion.token_ids) for completion in long.result()] == [90, 90]
    assert not short.done()


@pytest.mark.parametrize("call", ["go_on", "give_way"])
def test_what_fails_between_two_waits_ends_what_was_being_sampled(call: str, monkeypatch: pytest.MonkeyPatch):
    trained = Trained("captured")
    (future,) = trained.engine.submit(asks([90]))
    trained.engine.wait(trained.steps(2))
    with monkeypatch.context() as patch:
        patch.setattr(PagedBatching, call, lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            getattr(trained.engine, call)()
    assert future.done(), "nobody waits for it in vain"
    with pytest.raises(ZeroDivisionError):
        future.result()
    assert [len(completion.token_ids) for completion in trained.engine.generate(asks([9]))[0]] == [9, 9]


@pytest.mark.parametrize("way", [*WAYS, "padded"])
def test_what_is_given_up_raises_and_leaves_an_engine_that_works(way):
    trained = Trained(way)
    futures = trained.engine.submit(asks([50, 60]))
    trained.engine.wait(trained.steps(2 if way != "padded" else 0))
    drawn = trained.engine.sampled_tokens
    assert drawn > 0 or way == "padded"
    trained.engine.cancel()
    for future in futures:
        assert future.done()
        with pytest.raises(Cancelled):
            future.result()
    assert trained.engine.sampled_tokens == drawn
    trained.step()
    ((first, _),) = trained.engine.generate(asks([4]))
    assert first.versions == [(1, 4)] == told(first, TOKENS)


def logp_of(module: Any, prompt: tuple[int, ...], token_ids: list[int]) -> list[float]:
    """By the module's own forward over the whole sequence, in float64."""
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        logp = module(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(token_ids)]


def with_states() -> Any:
    """A model with a convolution and attention."""
    return family_model("lfm2")


@pytest.mark.parametrize(
    ("way", "options", "make"),
    [
        ("slots", {"prefill_tokens": 40, "max_slots": 5}, lambda: model("qwen2")),
        ("slots", {"prefill_tokens": 40, "max_slots": 5}, with_states),
        ("captured", {}, lambda: model("qwen2")),
        ("captured", {"max_slots": 5}, lambda: model("qwen2")),
        ("captured", {"max_slots": 5}, with_states),
    ],
)
def test_a_stale_cache_is_kept_or_computed_anew(way, options, make):
    """Anew: every token has the log-prob that a fresh prefill under its weights gives it. Kept: it has not."""
    versions, found = [0], {}
    for stale_cache in ("keep", "recompute"):
        module = make()
        versions[:] = [0]
        engine = LiveEngine(
            module, tokenizer(), way=way, stale_cache=stale_cache, version=lambda: versions[0], **options
        )  # fmt: skip
        futures = engine.submit(asked := asks([50, 70, 90]))
        weights = [{name: p.clone() for name, p in module.state_dict().items()}]
        for _ in range(2):
            steps = iter(range(1 if way == "captured" else 20))
            engine.wait(lambda steps=steps: next(steps, None) is None)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.1)
            versions[0] += 1
            weights.append({name: p.clone() for name, p in module.state_dict().items()})
        completions = wait_all(futures)
        assert max(len(sample.versions) for samples in completions for sample in samples) == 3
        apart = 0.0
        for request, samples in zip(asked, completions, strict=True):
            for sample in samples:
                start = 0
                for version, count in sample.versions:
                    module.load_state_dict(weights[version])
                    wanted = logp_of(module, request.prompt_ids, sample.token_ids)[start : start + count]
                    drawn = sample.untruncated_logp[start : start + count]
                    off = max(abs(a - b) for a, b in zip(drawn, wanted, strict=True))
                    assert version or off < 1e-4
                    apart = max(apart, off)
                    start += count
        found[stale_cache] = apart
    assert found["recompute"] < 1e-4
    assert found["keep"] > 1e-2


@pytest.mark.parametrize(
    ("way", "before"), [("slots", 0), ("slots", 4), ("captured", 1), ("captured", 4), ("padded", 1)]
)
def test_held_it_begins_nothing_and_ends_what_has_begun(way, before):
    """Wherever samples are: of three prompts, with two rows, some run, some have a prefilled prompt, some wait."""
    trained = Trained(way, max_slots=2)
    futures = trained.engine.submit(asks([40, 40, 40], temperature=0.8))
    trained.engine.wait(trained.steps(before))
    trained.engine.hold(True)
    running = trained.engine.running
    assert running == (2 if before and way != "padded" else 0)
    late = trained.engine.submit(asks([3]))
    trained.engine.wait(lambda: not trained.engine.running)
    ended = trained.engine.ended
    trained.engine.wait(trained.steps(5))
    assert (trained.engine.ended, trained.engine.running) == (ended, 0)
    trained.step()
    trained.engine.hold(False)
    found = [c for cs in wait_all([*futures, *late]) for c in cs]
    assert [c.versions for c in found] == [told(c, TOKENS) for c in found]
    assert sorted(c.versions[0][0] for c in found) == [0] * ended + [1] * (8 - ended)
    assert all(len(c.versions) == 1 for c in found)


def test_a_cache_that_gives_way_costs_no_sample(monkeypatch):
    """Two run and one waits when the cache goes; each draws what it draws alone, and the next cache stays."""
    module = model("qwen2")
    asked = asks([110, 90, 80], temperature=0.8)
    truth = LiveEngine(module, tokenizer(), way="slots").generate(asked)
    engine = LiveEngine(module, tokenizer(), way="captured", max_slots=4)
    futures = engine.submit(asked)
    # As if a device had been filled.
    monkeypatch.setattr(Fitting, "_is_large", lambda self: self.decoder is not None)
    caches = []
    for _ in range(3):
        steps = iter(range(1))
        engine.wait(lambda steps=steps: next(steps, None) is None)
        assert engine.fitting is not None
        caches.append(engine.fitting.decoder)
    assert caches[0] is None
    assert caches[1] is caches[2] is not None
    assert drawn(wait_all(futures)) == drawn(truth)


def test_a_shared_device_keeps_what_training_needed():
    gb = 10**9
    # 80 GB; weights and optimizer take 20, training took 50 in all, and torch keeps its 30 or gives them back.
    assert free_bytes(free=60 * gb, reserved=20 * gb, theirs=50 * gb) == 30 * gb
    assert free_bytes(free=30 * gb, reserved=50 * gb, theirs=50 * gb) == 30 * gb
    assert free_bytes(free=60 * gb, reserved=20 * gb, theirs=0) == 60 * gb
    assert free_bytes(free=5 * gb, reserved=20 * gb, theirs=50 * gb) == 0
