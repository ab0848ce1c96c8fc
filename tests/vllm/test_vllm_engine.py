"""vLLM's own CPU build, in this process, against transformers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.models import make_tokenizer
from helpers.telling import tell, told
from helpers.vllm_faults import QUERY, all_at_once, faults_seen
from helpers.vllm_models import POSITIONS, Pusher, covered, make_model, reference_logp, save, wrong_tensors

from tandem.engines.vllm.engine import VLLMEngine
from tandem.engines.vllm.setup import VLLMParams
from tandem.errors import Cancelled, UserError
from tandem.roles import SleepingEngine
from tandem.sync.plan import Plan, TensorSpec, plan_of
from tandem.types import Request, SamplingParams

SLOTS = 4
MAX_LENGTH = 100
PROMPT = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def module() -> Any:
    """What the engine starts with and, after every test, has again."""
    return make_model("llama", seed=0, tied=True)


@pytest.fixture(scope="module")
def engine(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    folder = save(module, tmp_path_factory.mktemp("model"))
    engine = VLLMEngine(VLLMParams(model=folder, dtype="float32", max_slots=SLOTS, max_length=MAX_LENGTH, sleep=True))
    yield engine
    engine.close()


def sample(engine: VLLMEngine, seeds: tuple[int, ...] = (0,), prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> Any:
    """Completions of one prompt."""
    params = SamplingParams(**({"max_new_tokens": 16} | sampling))
    return engine.generate([Request(prompt_ids=prompt, seeds=seeds, sampling=params)])[0]


def pusher_of(engine: VLLMEngine, module: Any) -> Pusher:
    return Pusher.connect(engine, dict(module.named_parameters()))


def summed_by_tensor(worker: Any) -> Any:
    """A worker's sums, the tensors of a bucket summed as they were when the last bucket was."""
    sums = worker.weight_transfer_engine.sums
    for bucket in (0, *reversed(range(1, len(sums.plan.buckets)))):
        sums.tally.add(bucket)
    return sums.result()


@pytest.fixture
def restored(engine: VLLMEngine, module: Any) -> Iterator[None]:
    """Gives the engine its first weights back afterwards."""
    yield
    pusher = pusher_of(engine, module)
    pusher.push(0)
    pusher.close()


def test_it_is_an_engine(engine):
    assert isinstance(engine, SleepingEngine)
    assert engine.memory() == {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_transformers(engine, module, temperature):
    prompts = [PROMPT, (9, 10), (11,)]
    sampling = SamplingParams(max_new_tokens=24, temperature=temperature)
    requests = [Request(prompt_ids=prompt, seeds=(1, 2, 3), sampling=sampling) for prompt in prompts]
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        assert len(completions) == 3
        for completion in completions:
            wanted = reference_logp(module, request.prompt_ids, completion.token_ids, temperature)
            assert completion.behaviour_logp == pytest.approx(wanted, abs=1e-4)
            assert completion.untruncated_logp == completion.behaviour_logp


def test_greedy_is_what_transformers_generates(engine, module):
    for prompt in (PROMPT, (9, 10)):
        (completion,) = sample(engine, prompt=prompt, temperature=0.0, max_new_tokens=30, top_k=3)
        ids = torch.tensor([prompt])
        wanted = module.generate(ids, do_sample=False, max_new_tokens=30, attention_mask=torch.ones_like(ids))
        assert completion.token_ids == wanted[0, len(prompt) :].tolist()
        assert completion.behaviour_logp == [0.0] * len(completion.token_ids)
        assert completion.untruncated_logp == pytest.approx(
            reference_logp(module, prompt, completion.token_ids), abs=1e-4
        )


def test_a_seed_names_its_sample_whatever_else_runs(engine):
    seeds = (7, 8, 2**63 - 1)
    alone = [sample(engine, (seed,), max_new_tokens=16)[0].token_ids for seed in seeds]
    together = [c.token_ids for c in sample(engine, (*seeds, 7, 11, 12), max_new_tokens=16)]
    assert together[:4] == [*alone, alone[0]]
    assert len({tuple(ids) for ids in together}) == 5


def test_draws_follow_the_distribution(engine, module):
    with torch.no_grad():
        wanted = module(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    drawn = [c.token_ids[0] for c in sample(engine, tuple(range(600)), max_new_tokens=1)]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(wanted)).double()
    # Total variation of 600 fair draws from this distribution is about 0.1; from a uniform one it would be 0.6.
    assert (counts / 600 - wanted).abs().sum() / 2 < 0.2


def test_truncation_leaves_the_untruncated_log_prob_unknown(engine, module):
    for sampling in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        for completion in sample(engine, (1, 2, 3), max_new_tokens=12, **sampling):
            full = reference_logp(module, PROMPT, completion.token_ids)
            assert all(math.isnan(x) for x in completion.untruncated_logp)
            assert all(kept >= whole - 1e-4 for kept, whole in zip(completion.behaviour_logp, full, strict=True))
            assert sum(completion.behaviour_logp) > sum(full) + 1


def test_ends_at_the_length(engine):
    (completion,) = sample(engine, temperature=0.0, max_new_tokens=5)
    assert (completion.stop, len(completion.token_ids)) == ("length", 5)
    assert completion.text == make_tokenizer().decode(completion.token_ids, skip_special_tokens=True)


def test_ends_at_a_stop_id_and_keeps_it(engine):
    (whole,) = sample(engine, (3,), max_new_tokens=40)
    stop = whole.token_ids[10]
    (completion,) = sample(engine, (3,), max_new_tokens=40, stop_token_ids=(stop,))
    assert completion.stop == "eos"
    assert completion.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert len(completion.behaviour_logp) == len(completion.token_ids)


def test_ends_at_end_of_sequence(engine, module):
    completions = sample(engine, tuple(range(40)), max_new_tokens=60, temperature=2.0)
    ended = [c for c in completions if c.stop == "eos"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == module.config.eos_token_id
        assert module.config.eos_token_id not in completion.token_ids[:-1]
        assert "<eos>" not in completion.text
    assert all(module.config.eos_token_id not in c.token_ids for c in completions if c.stop == "length")


def test_ends_at_a_stop_string_and_cuts_the_text_before_it(engine):
    (whole,) = sample(engine, (3,), max_new_tokens=40)
    stop = whole.text[10:12]
    (completion,) = sample(engine, (3,), max_new_tokens=40, stop=(stop, "never in it"))
    assert completion.stop == "stop_string"
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert make_tokenizer().decode(completion.token_ids).endswith(stop)


def test_samples_come_back_in_the_order_asked_for(engine):
    lengths = (12, 2, 7)
    requests = [
        Request(prompt_ids=(5 + i,), seeds=(1, 2, 3), sampling=SamplingParams(max_new_tokens=n))
        for i, n in enumerate(lengths)
    ]
    results = engine.generate(requests)
    assert [len(row) for row in results] == [3] * 3
    for n, row in zip(lengths, results, strict=True):
        assert all(len(c.token_ids) == n or (c.stop == "eos" and len(c.token_ids) < n) for c in row)
    assert engine.generate([]) == []
    assert engine.generate([Request(prompt_ids=(5,), seeds=(), sampling=SamplingParams(max_new_tokens=1))]) == [[]]


def test_logprobs_of_given_sequences(engine, module):
    sequences = [[5, 6, 7, 8, 9, 3], [4, 5], [4], list(range(2, 2 + 60)) + [7] * 40]
    assert max(map(len, sequences)) == MAX_LENGTH
    found = engine.logprobs(sequences)
    for sequence, row in zip(sequences, found, strict=True):
        wanted = reference_logp(module, sequence[:1], sequence[1:]) if len(sequence) > 1 else []
        assert row == pytest.approx(wanted, abs=1e-4)


def test_calls_of_many_threads_share_the_engine(engine):
    wanted = {seed: sample(engine, (seed, seed + 100), max_new_tokens=12) for seed in range(10)}
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: found.update({seed: sample(engine, (seed, seed + 100), max_new_tokens=12)})
        )
        for seed in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: [c.token_ids for c in row] for seed, row in found.items()} == {
        seed: [c.token_ids for c in row] for seed, row in wanted.items()
    }


def greedy(*lengths: int) -> list[Request]:
    """One sample of each length."""
    sampling = [SamplingParams(max_new_tokens=n, temperature=0.0) for n in lengths]
    return [Request(prompt_ids=PROMPT, seeds=(0,), sampling=one) for one in sampling]


def test_a_later_call_joins_the_running_batch(engine):
    """The short call of another thread, made while the long one has begun, ends before it."""
    alone = engine.generate(greedy(60))[0][0].token_ids
    short, long = engine.submit(greedy(1, 60))
    short.result()
    assert engine._engine.get_num_unfinished_requests() == 1
    thread = threading.Thread(target=lambda: sample(engine, (1,), max_new_tokens=1))
    thread.start()
    thread.join()
    assert not long.done()
    assert engine._engine.get_num_unfinished_requests() == 1
    (completion,) = long.result()
    assert completion.token_ids == alone


def test_a_call_that_fails_in_the_middle_leaves_nothing_behind(engine, monkeypatch):
    request = Request(prompt_ids=PROMPT, seeds=tuple(range(9)), sampling=SamplingParams(max_new_tokens=50))
    (other,) = engine.submit(greedy(30))
    bad, long = engine.submit([*greedy(10), request])
    with monkeypatch.context() as patch:
        patch.setattr("tandem.engines.vllm.engine._flat", lambda logprobs: [math.nan] * 10)
        with pytest.raises(UserError, match=r"request 0, sample 0: .* not finite"):
            bad.result()
    assert long.done()
    with pytest.raises(UserError, match="request 0, sample 0"):
        long.result()
    assert engine._engine.get_num_unfinished_requests() == 1
    assert len(other.result()[0].token_ids) == 30
    assert engine._engine.get_num_unfinished_requests() == 0


@pytest.mark.usefixtures("restored")
def test_a_push_changes_the_samples_to_the_new_models(engine, module):
    before = sample(engine, (1, 2), max_new_tokens=20)
    other = make_model("llama", seed=1, tied=True)
    pusher = pusher_of(engine, other)
    for version in (3, 4):
        sums = pusher.push(version)
        assert engine.version == version
        assert wrong_tensors(engine, sums) == []
        after = sample(engine, (1, 2), max_new_tokens=20)
        assert [c.token_ids for c in after] != [c.token_ids for c in before]
        for completion in after:
            wanted = reference_logp(other, PROMPT, completion.token_ids)
            assert completion.behaviour_logp == pytest.approx(wanted, abs=1e-4)
            assert (completion.version_min, completion.version_max) == (version, version)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        before = after
    pusher.close()


@pytest.mark.usefixtures("restored")
def test_checksums_cover_every_weight(engine):
    other = make_model("llama", seed=2, tied=True)
    pusher = pusher_of(engine, other)
    sums = pusher.push(1)
    held, found = engine.held(), engine.checksums()
    by_tensor = engine._engine.collective_rpc(summed_by_tensor)
    assert found == pusher.found == engine._whole_tensors().add_up(by_tensor)
    assert covered(engine) == set(dict(other.named_parameters())) == set(sums)
    places = {part: [where for other, where in held if other == part] for part, _ in held}
    assert places["model.embed_tokens.weight"] == ["model.embed_tokens.weight", "lm_head.weight"]
    key = "model.layers.1.self_attn.k_proj.weight"
    assert places[key] == ["model.layers.1.self_attn.qkv_proj.weight"]
    assert wrong_tensors(engine, sums | {key: sums[key] ^ 1}) == places[key]
    pusher.close()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("end", ["sender", "engine"])
def test_every_fault_is_seen_at_the_first_push_that_has_it(engine, end):
    pusher = pusher_of(engine, make_model("llama", seed=7, tied=True))
    seen = faults_seen(pusher, end)
    assert all_at_once(seen)
    assert f"{QUERY} in its model.layers.0.self_attn.qkv_proj.weight" in seen["swapped query heads"][1]
    pusher.close()


@pytest.mark.usefixtures("restored")
def test_weights_change_between_two_steps_of_running_samples(engine, module):
    """The long sample sees both models: each of its tokens has the log-prob of the one that drew it."""
    other = make_model("llama", seed=3, tied=True)
    pusher = pusher_of(engine, other)
    engine.core.version = 0
    requests = [
        Request(prompt_ids=PROMPT, seeds=(1,), sampling=SamplingParams(max_new_tokens=n, temperature=t))
        for n, t in ((10, 1.0), (40, 1.0))
    ]
    first, second = engine.submit(requests)
    (short,) = first.result()
    pusher.push(1)
    (long,) = second.result()
    assert (short.versions, [version for version, _ in long.versions]) == ([(0, 10)], [0, 1])
    old = reference_logp(module, PROMPT, long.token_ids)
    new = reference_logp(other, PROMPT, long.token_ids)
    close = [[abs(a - b) < 1e-4 for a, b in zip(long.behaviour_logp, wanted, strict=True)] for wanted in (old, new)]
    turn = close[0].index(False)
    assert 10 <= turn == long.versions[0][1] < 40
    assert all(close[1][turn:])
    pusher.close()


@pytest.mark.usefixtures("restored")
def test_every_token_belongs_to_the_weights_that_drew_it(engine):
    """Six samples, four slots: those that wait begin with newer weights. Then what is left is given up."""
    other = make_model("llama", seed=3, tied=True)
    pusher = pusher_of(engine, other)
    tokens = {version: 10 + version for version in range(1, 9)}
    futures, drawn = [], engine.sampled_tokens
    for version, token in tokens.items():
        tell(other, token)
        pusher.push(version)
        if version == 1:
            futures = engine.submit(
                [
                    Request(prompt_ids=PROMPT, seeds=(n,), sampling=SamplingParams(max_new_tokens=n))
                    for n in (30, 9, 40, 3, 25, 90)
                ]
            )
        asked = iter(range(3 * version % 8))
        engine.wait(lambda asked=asked: next(asked, None) is None)
    engine.wait(lambda: all(future.done() for future in futures[:-1]))
    found = [future.result()[0] for future in futures[:-1]]
    assert [c.versions for c in found] == [told(c, tokens) for c in found]
    assert max(len(c.versions) for c in found) > 3
    engine.cancel()
    with pytest.raises(Cancelled):
        futures[-1].result()
    assert 0 < engine.sampled_tokens - drawn - sum(len(c.token_ids) for c in found) < 90
    assert engine.busy_seconds > 0
    pusher.close()
    assert [c.versions for c in sample(engine)] == [[(8, 16)]]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("change", ["unknown name", "wrong shape", "missing"])
def test_a_push_that_does_not_fit_is_named_and_nothing_is_sampled_after_it(engine, change):
    parameters = dict(make_model("llama", seed=4, tied=True).named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = parameters.pop(name)
    if change == "unknown name":
        name = "model.layers.1.mlp.sideways_proj.weight"
        parameters[name] = tensor
    elif change == "wrong shape":
        parameters[name] = torch.nn.Parameter(torch.zeros(3, 5))
    pusher = Pusher.connect(engine, parameters)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        pusher.push(9)
    assert engine.version != 9
    with pytest.raises(UserError, match="weight sync"):
        sample(engine)
    pusher.close()


@pytest.mark.usefixtures("restored")
def test_a_sender_that_is_gone_is_an_error(engine):
    plan = Plan((TensorSpec("model.norm.weight", (64,), "float32"),))
    pusher = Pusher.connect(engine, {"model.norm.weight": torch.ones(64)}, plan)
    pusher.source.close()
    for attempt in (lambda: engine.receive(1), lambda: sample(engine)):
        with pytest.raises(UserError, match="weight sync: the push of version 1 failed"):
            attempt()


@pytest.mark.usefixtures("restored")
def test_asleep_it_samples_nothing_until_it_has_weights(engine):
    engine.sleep()
    with pytest.raises(UserError, match="asleep"):
        sample(engine)
    for half_awake in (False, True):
        if half_awake:
            engine.wake("weights")
            engine.sleep()
        with pytest.raises(UserError, match="wake"):
            engine.receive(5)
    engine.wake("weights")
    other = make_model("llama", seed=5, tied=True)
    pusher = pusher_of(engine, other)
    pusher.push(5)
    with pytest.raises(UserError, match="asleep"):
        sample(engine)
    engine.wake("cache")
    (completion,) = sample(engine, max_new_tokens=8)
    assert completion.behaviour_logp == pytest.approx(reference_logp(other, PROMPT, completion.token_ids), abs=1e-4)
    engine.sleep()
    engine.wake("weights")
    engine.wake("cache")
    with pytest.raises(UserError, match="push weights"):
        sample(engine)
    pusher.close()


def test_held_it_begins_no_samples_and_scores_all_the_same(engine, module):
    """Six samples, four slots: the two that wait stay where they are, and what is scored goes before them."""
    requests = [
        Request(prompt_ids=PROMPT, seeds=(n,), sampling=SamplingParams(max_new_tokens=n)) for n in (9, 8, 7, 6, 5, 4)
    ]
    futures = engine.submit(requests)
    asked = iter(range(3))
    engine.wait(lambda: next(asked, None) is None)
    engine.hold(True)
    assert engine.running == SLOTS
    (logp,) = engine.logprobs([PROMPT])
    assert logp == pytest.approx(reference_logp(module, PROMPT[:1], list(PROMPT[1:])), abs=1e-4)
    engine.wait(lambda: not engine.running)
    assert [future.done() for future in futures] == [True] * 4 + [False] * 2
    assert len(engine.logprobs([PROMPT])) == 1
    engine.hold(False)
    assert [len(future.result()[0].token_ids) for future in futures] == [9, 8, 7, 6, 5, 4]


@pytest.mark.usefixtures("restored")
def test_unfinished_samples_survive_its_sleep(engine):
    """Two run and two wait when it goes to sleep; it wakes with other weights, and they go on from their own tokens."""
    other = make_model("llama", seed=5, tied=True)
    pusher = pusher_of(engine, other)
    tokens = {1: 11, 2: 12}
    tell(other, tokens[1])
    pusher.push(1)
    requests = [
        Request(prompt_ids=PROMPT, seeds=(1, 2), sampling=SamplingParams(max_new_tokens=length)) for length in (40, 9)
    ]
    long, short = engine.submit(requests)
    engine.wait(short.done)
    assert not long.done()
    engine.sleep()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(long.result)
        steps = engine.busy_seconds
        engine.wake("weights")
        tell(other, tokens[2])
        pusher.push(2)
        assert engine.busy_seconds == steps, "nobody samples before the cache is back"
        engine.wake("cache")
        found = waiting.result(20)
    assert [c.versions for c in found] == [told(c, tokens) for c in found]
    assert all([version for version, _ in c.versions] == [1, 2] for c in found)
    pusher.close()


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ((), {}, "prompt is empty"),
        ((5, 99), {}, "token id 99"),
        ((5,) * 90, {"max_new_tokens": 20}, "above the engine's max_length of 100"),
        ((5,), {"temperature": 3.0}, "temperature is 3.0"),
        ((5,), {"temperature": 0.001}, "temperature is 0.001"),
        ((5,), {"top_p": 0.0}, "top_p"),
    ],
)
def test_a_request_that_cannot_be_sampled_is_named(engine, prompt, sampling, words):
    with pytest.raises(UserError, match=f"request 1: .*{words}"):
        engine.generate(
            [
                Request(prompt_ids=p, seeds=(0,), sampling=SamplingParams(**({"max_new_tokens": 2} | s)))
                for p, s in (((5,), {}), (prompt, sampling))
            ]
        )


@pytest.mark.usefixtures("restored")
def test_weights_that_are_not_finite_are_an_error(engine):
    other = make_model("llama", seed=6, tied=True)
    with torch.no_grad():
        other.model.norm.weight.fill_(math.nan)
    pusher = pusher_of(engine, other)
    pusher.push(1)
    with pytest.raises(UserError, match=r"request 0, sample 0: .* not finite at new token 0"):
        sample(engine, max_new_tokens=4)
    pusher.close()


def test_a_push_needs_a_plan_of_the_same_model_only_once(engine, module):
    """What was recorded about one trainer's tensors is forgotten when another one connects."""
    plan = plan_of(module.named_parameters(), bucket_bytes=1 << 30)
    assert len(plan.buckets) == 1
    pusher = Pusher.connect(engine, dict(module.named_parameters()), plan)
    with pytest.raises(UserError, match="nothing has been pushed"):
        engine.checksums()
    assert wrong_tensors(engine, pusher.push(0)) == []
    pusher.close()
    assert POSITIONS > MAX_LENGTH
