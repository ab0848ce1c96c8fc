"""The advisor on runs made by hand, whose ideal is known in closed form; and on wrong and broken ones."""

import itertools
import json
import random
import re
from dataclasses import replace

import pytest
import yaml

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.runs.advice import Setup, advise, spent_in, steps_that_count, tail_of

SHARED = Setup(
    prompts_per_step=32, samples_per_prompt=8, sample_epochs=1, max_slots=256, max_lag=0, window=1.0, reward=(),
    reward_processes=None, scorers=(), engines=0, devices_each=1, actors=1, pairwise=False,
)  # fmt: skip
SPLIT = replace(SHARED, engines=1)
ASYNC = replace(SPLIT, max_lag=1, window=0.3)


def records(sampling=1.0, training=1.0, scoring=0.0, sync=0.0, rest=0.0, *, steps=10, busy=None, **more):
    """Steps that all take as long, behind one that is slow since it is the first."""
    phases = {"sampling": sampling, "scoring": scoring, "training": training, "sync": sync}
    line = {f"seconds_{name}": seconds for name, seconds in phases.items()} | more
    line |= {"seconds": sum(phases.values()) + rest} | ({} if busy is None else {"engine_busy_seconds": busy})
    slow = {name: 50 * value if name.startswith("seconds") else value for name, value in line.items()}
    return [{"step": 0, "eval/reward": 0.1}] + [
        {"step": step, **(slow if step == 1 else line)} for step in range(1, steps + 1)
    ]


def overlap(lines, setup):
    counted = steps_that_count(lines, [], max_lag=setup.max_lag)
    return spent_in(counted, setup).overlap


def said(lines, setup, events=()):
    return "\n".join(advise(lines, list(events), setup))


def flags(text):
    """Every flag that is named with its value."""
    return dict(re.findall(r"(--[a-z.-]+) (?=\S)([\w.]+)", text))


def test_sampling_bound_taking_turns_on_devices_apart():
    """6 s and 4 s in turns are 10; one beside the other 6: 10/6 times as fast, and none of it reached."""
    lines = records(6.0, 3.0, 0.5, 0.3, 0.2)
    found = overlap(lines, SPLIT)
    assert (found.turns, found.ideal, found.reached) == pytest.approx((10, 6, 0))
    text = said(lines, SPLIT)
    assert "a step takes 10 s, the mean of steps 2 to 10: sampling 6 s, rewards and scoring 0.5 s, training 3 s" in text
    assert "bound by sampling: 6 s, 60% of a step" in text
    assert "the longer, 6 s, 1.67 times as fast as taking turns; reached: 0% of it" in text
    assert "--max-lag 1: the sampler draws for the next step while the trainer is at this one; that wins 4 s a" in text


def test_training_bound_taking_turns_on_devices_apart():
    lines = records(2.0, 8.0)
    assert overlap(lines, SPLIT).ideal == pytest.approx(8)
    text = said(lines, SPLIT)
    assert "bound by training: 8 s, 80% of a step" in text
    assert flags(text)["--max-lag"] == "1"
    # 2 devices for both in turns: (2 + 8) / 2 is less than the longer of the two.
    assert "--placement.engine actor --placement.actor 2: all 2 devices for both in turns would take 5 s a step" in text


def test_reward_bound():
    text = said(records(1.0, 1.0, 6.0), replace(SHARED, reward=("a.py:f",), reward_processes=2))
    assert "bound by rewards: 6 s, 75% of a step" in text
    assert (
        "one sample a call (docs/rewards.md) begins while others are drawn, and in more --reward-processes than 2"
        in text
    )
    text = said(records(1.0, 1.0, 6.0), replace(SHARED, scorers=("reward",)))
    assert "--placement.reward 1, where there is a device more, or a larger --token-budget: rewards and sc" in text
    assert "--placement" not in said(records(1.0, 1.0, 6.0), SHARED)


def test_balanced():
    text = said(records(2.0, 2.1), SPLIT)
    assert "balanced: training 2.1 s, sampling 2 s" in text
    assert "1.95 times as fast" in text  # 4.1 / 2.1


def test_asynchronous_at_its_ideal():
    """A sampler that is busy 6 s of each 6, a trainer that needs 4 and waits 2: nothing is left to overlap."""
    lines = records(2.0, 4.0, busy=6.0)
    assert overlap(lines, ASYNC).reached == pytest.approx(1)
    text = said(lines, ASYNC)
    assert "bound by sampling: 6 s, 100% of a step" in text
    assert "a step would take the longer, 6 s, 1.67 times as fast as taking turns; reached: 100% of it" in text
    assert "--max-lag" not in text
    # An epoch takes 4 s, and only 2 are to spare.
    assert text.endswith("nothing to change follows from these seconds")
    assert "--sample-epochs 2: beside the sampler the trainer has 4 s" in said(records(4.0, 2.0, busy=6.0, sync=0.0),
                                                                               replace(ASYNC, actors=1))  # fmt: skip


def test_asynchronous_short_of_its_ideal():
    """Sampler 6, trainer 4, a step of 8: 10 - 8 of the 10 - 6 that could be won, and each waits 2 or 4 s."""
    lines = records(4.0, 4.0, busy=6.0)
    assert overlap(lines, ASYNC).reached == pytest.approx(0.5)
    text = said(lines, ASYNC)
    assert "reached: 50% of it" in text
    assert "--max-lag 2: the trainer waited 4 s and the sampler 2 s a step, each for the other" in text
    assert "win at most 2 s; or --window 0.6" in text
    assert "--window" not in said(lines, replace(ASYNC, window=1.0))


def test_samples_that_are_waited_for_before_each_push_are_no_work_of_the_trainer():
    """The same step of 8, in which half of what the trainer waits is within its weight sync of 2.5 s."""
    lines = [
        line | ({"settling_seconds": 2.0} if line["step"] else {}) for line in records(2.0, 3.5, sync=2.5, busy=6.0)
    ]
    found = overlap(lines, ASYNC)
    assert (found.turns, found.ideal, found.reached) == pytest.approx((10, 6, 0.5))
    text = said(lines, ASYNC)
    assert "--weights-change in-flight: the samples that run end before each push" in text
    assert "the trainer waited 2 s a step for that" in text
    assert "--max-lag" not in text
    assert "--weights-change" not in said(records(4.0, 4.0, busy=6.0), ASYNC)


def test_more_lag_than_needed_is_said():
    text = said(records(0.0, 5.0, busy=4.5), replace(ASYNC, max_lag=3))
    assert "--max-lag 1: the trainer waited 0 s a step for samples, so fresher ones" in text
    assert "--max-lag" not in said(records(0.0, 5.0, busy=4.5), ASYNC)


def test_pairs_of_more_samples_fill_a_waiting_sampler():
    """A sample of a prompt costs 1 s, and 4 are to spare; of the others more samples are more training."""
    setup = replace(ASYNC, samples_per_prompt=4)
    lines = records(0.0, 5.0, busy=4.0)
    assert flags(said(lines, replace(setup, pairwise=True)))["--samples-per-prompt"] == "5"
    assert "--samples-per-prompt" not in said(lines, setup)


def test_devices_are_divided_anew_and_never_as_they_are():
    """Sampler 9 s on 4, trainer 3 s on 4: 36 and 12 device-seconds, so 6 and 2 devices take 6 s."""
    lines, setup = records(6.0, 3.0, busy=9.0), replace(ASYNC, engines=4, actors=4)
    assert "--placement.engine 6 --placement.actor 2: were each faster" in said(lines, setup)
    assert "the longer of the two would take 6 s a step instead of 9 s" in said(lines, setup)
    assert "--placement" not in said(records(0.0, 6.0, busy=6.0), setup)
    wide = replace(setup, engines=2, devices_each=2)
    assert flags(said(lines, wide))["--placement.engine"] == "3"


def test_the_tail_on_one_device_from_fitted_costs():
    """Drawing costs 3 ms a turn and 10 us a token; 256 slots: the tail is 3 ms (longest - mean)."""
    rng, lines = random.Random(0), []
    for step in range(1, 31):
        lengths = [min(1024, int(rng.expovariate(1 / 260)) + 1) for _ in range(256)]
        tokens, longest = sum(lengths), max(lengths)
        sampling = 0.003 * longest + 1e-5 * tokens
        lines.append(
            {"step": step, "seconds": sampling + 1, "seconds_sampling": sampling, "seconds_training": 1.0,
             "sampled_tokens": float(tokens), "response_length": tokens / 256, "response_length_max": float(longest)}
        )  # fmt: skip
    counted = steps_that_count(lines, [], max_lag=0)
    tail = tail_of(counted, SHARED)
    expected = sum(0.003 * (r["response_length_max"] - r["response_length"]) for r in counted) / 29
    assert (tail.seconds, tail.at_most) == (pytest.approx(expected, rel=1e-6), False)
    text = said(lines, SHARED)
    assert "only the tail of sampling can be won" in text
    assert "reached: nothing of it, since each step waits for its last sample" in text
    assert (
        "--max-lag 1: samples that are not done go on through the optimizer step; that wins 2.3 s a step, 49%" in text
    )
    assert "at most" not in text
    # With noise in the seconds that hides the difference it is a bound, and is called one.
    noisy = [r | {"seconds_sampling": r["seconds_sampling"] * rng.uniform(0.5, 1.5)} for r in lines]
    assert tail_of(noisy[1:], SHARED).at_most
    assert "at most" in said(noisy, SHARED)
    # Costs of tokens alone: the tail is free, and nothing is advised.
    free = [
        r | {"seconds_sampling": 2e-5 * r["sampled_tokens"], "seconds": 1 + 2e-5 * r["sampled_tokens"]} for r in lines
    ]
    assert tail_of(free[1:], SHARED).seconds == pytest.approx(0, abs=1e-9)
    assert "--max-lag" not in said(free, SHARED)


def test_the_tail_on_one_device_is_bounded_where_all_steps_are_alike():
    """Mean 100, longest 400: at most 3/4 of 4 s. With equal lengths there is no tail."""
    lengths = {"response_length": 100.0, "response_length_max": 400.0, "sampled_tokens": 25600.0}
    lines = records(4.0, 1.0, **lengths)
    assert overlap(lines, SHARED).ideal == pytest.approx(2)
    assert "at most 3 s of 4 s, a step of 2 s, 2.50 times as fast" in said(lines, SHARED)
    equal = lengths | {"response_length_max": 100.0}
    assert "leave slots empty, and it is short: 0 s of 4 s" in said(records(4.0, 1.0, **equal), SHARED)
    assert "--max-lag" not in said(records(4.0, 1.0, **equal), SHARED)
    # 64 slots for 256 samples: 400 turns of full slots, then at most 400 (1 - 1/64).
    few = replace(SHARED, max_slots=64)
    turns, full = 25600 / 64 + 400 * 63 / 64, 25600 / 64
    assert tail_of(lines[2:], few).seconds == pytest.approx(4 * (turns - full) / turns)
    assert "--max-slots 256, where memory allows it: a step has 256 samples, and 64 are drawn at a time" in said(
        lines, few
    )


def test_one_device_that_carries_samples_over_is_at_its_ideal():
    text = said(records(2.0, 1.0, busy=2.0, open_groups=48.0), replace(ASYNC, engines=0))
    assert "that is reached (max_lag 1; 48 groups were open when a step began)" in text
    assert "--max-lag" not in text


def test_the_warm_up_of_every_start_does_not_count():
    lines, events = records(1.0, 1.0, steps=12), [{"event": "start"}, {"event": "resume", "step": 6}]
    for slow in (7,):
        lines[slow] = {name: 90.0 if name != "step" else v for name, v in lines[slow].items()}
    assert "a step takes 2 s, the mean of steps 2 to 12 (10 that count)" in said(lines, SPLIT, events)
    assert [r["step"] for r in steps_that_count(lines, events, max_lag=1)] == [3, 4, 5, 6, 9, 10, 11, 12]
    # In the last step of a finished run nothing is sampled for a next one; where it goes on, that step is as any other.
    events += [{"event": "finish", "step": 12}]
    assert [r["step"] for r in steps_that_count(lines, events, max_lag=1)][-2:] == [10, 11]
    again = [{"event": "start"}, {"event": "resume", "step": 12}]
    assert steps_that_count(lines, [*events, *again], max_lag=1)[-1]["step"] == 12


def test_only_steps_since_the_devices_changed_count():
    config = {"event": "config", "changed": {"placement.engine": ["actor", "1"]}}
    events = [{"event": "start"}, config, {"event": "resume", "step": 6}]
    assert [r["step"] for r in steps_that_count(records(steps=9), events, max_lag=0)] == [8, 9]
    config["changed"] = {"keep": [1, 2]}
    assert [r["step"] for r in steps_that_count(records(steps=9), events, max_lag=0)] == [2, 3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("steps", [1, 2])
def test_too_few_steps_say_so(steps):
    with pytest.raises(UserError, match="too few steps to advise, 2 are needed beside the warm-up: the first after"):
        advise(records(steps=steps), [], SPLIT)


def test_missing_fields_and_numbers_that_are_none():
    lines = [{"step": s, "seconds": 3.0, "seconds_sampling": 2.0} for s in range(1, 6)]
    assert "sampling 2 s, the rest 1 s" in said(lines, SHARED)
    assert "the spread of lengths, which it follows from, is not in metrics.jsonl" in said(lines, SHARED)
    assert "not known: how long the sampler was busy is not logged; the trainer waited 2 s" in said(lines, ASYNC)
    # An engine that does not count its seconds says 0.
    assert "not known" in said([line | {"engine_busy_seconds": 0.0} for line in lines], ASYNC)
    lines[3] |= {"seconds": float("nan")}
    assert "steps 2 to 5 (3 that count)" in said(lines, SHARED)


def test_nothing_is_advised_that_the_run_already_does():
    """Over many setups and steps: no flag is named with the value that the run has."""
    rng = random.Random(1)
    seen = set()
    for lag, engines, actors, epochs, slots, pairs in itertools.product(
        (0, 1, 3), (0, 1, 4), (1, 4), (1, 2), (16, 256), (False, True)
    ):
        setup = replace(
            SHARED, max_lag=lag, engines=engines, actors=actors, sample_epochs=epochs, max_slots=slots, pairwise=pairs,
            window=rng.choice((0.3, 1.0)), scorers=rng.choice(((), ("reward",))),
        )  # fmt: skip
        seconds, busy = (rng.uniform(0, 5), rng.uniform(0.1, 5), rng.uniform(0, 3)), rng.uniform(0.1, 9)
        lengths = {"response_length": 50.0, "response_length_max": rng.uniform(50, 500), "sampled_tokens": 12800.0}
        lines = records(*seconds, busy=busy if lag else None, **lengths)
        has = {"--max-lag": lag, "--window": setup.window, "--sample-epochs": epochs, "--max-slots": slots,
               "--samples-per-prompt": 8}  # fmt: skip
        named = flags(said(lines, setup))
        seen |= named.keys()
        for flag, value in has.items():
            assert named.get(flag) != f"{value:g}", (setup, named)
        assert not ({"--placement.engine", "--placement.actor"} <= named.keys()) or (
            named["--placement.engine"], named["--placement.actor"]
        ) != (str(engines or "actor"), str(actors))  # fmt: skip
    assert seen >= {
        "--max-lag",
        "--window",
        "--sample-epochs",
        "--max-slots",
        "--placement.engine",
        "--placement.actor",
    }


KEYS = {"prompts_per_step": 4, "samples_per_prompt": 2, "sample_epochs": 1, "max_slots": 8, "placement.engine": 1,
        "placement.actor": "here", "reward": ["r.py:f"], "reward_model": []}  # fmt: skip


def folder(path, lines, keys=KEYS, title="GRPO"):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(yaml.safe_dump(keys))
    (path / "run.json").write_text(json.dumps({"id": "a", "method": title, "seed": 0, "inputs": {}}))
    return str(path)


def test_the_command(tmp_path, capsys):
    assert main(["advise", folder(tmp_path / "run", records(6.0, 4.0))]) == 0
    out = capsys.readouterr().out
    assert out.count("\nadvice: ") == 4
    assert "advice: bound by sampling" in out
    keys = KEYS | {"placement.actor": "1", "max_lag": 1, "samples_per_prompt": 4}
    lines = records(0.0, 5.0, busy=4.0)
    for title, pairs in (("Online DPO", True), ("GRPO", False)):
        assert main(["advise", "--run", folder(tmp_path / title, lines, keys, title)]) == 0
        assert ("--samples-per-prompt 5" in capsys.readouterr().out) == pairs


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        ([{"step": 1, "seconds": 1.0, "seconds_training": 1.0}], KEYS, "none of its steps has sampled"),
        ([{"step": 0, "eval/loss": 1.0}], KEYS, "it has done no step yet"),
        (records(), {"steps": 5}, "no config of a run on samples ('prompts_per_step' is missing)"),
    ],
)
def test_runs_that_there_is_nothing_to_advise_of(tmp_path, capsys, lines, keys, message):
    assert main(["advise", folder(tmp_path / "run", lines, keys)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_or_damaged(tmp_path, capsys):
    assert main(["advise", str(tmp_path / "none")]) == 2
    assert "none: not the folder of a run: it has no run.json" in capsys.readouterr().err
    assert main(["advise"]) == 2
    assert "missing --run" in capsys.readouterr().err
    out = folder(tmp_path / "run", records())
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    assert main(["advise", out]) == 2
    assert "config.yaml: not the config of a run any more" in capsys.readouterr().err


def test_an_error_names_no_key_of_a_run_on_samples():
    with pytest.raises(UserError, match="max_slots"):
        Setup.of({name: value for name, value in KEYS.items() if name != "max_slots"}, pairwise=False)
