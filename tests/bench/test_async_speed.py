"""What bench/async_speed.py makes of runs, and that each of its commands is one."""

import argparse
import importlib
from pathlib import Path

import pytest

from tandem.assembly.configs.methods import read_config

PLACES = {"here": ("here", None), "split": (1, 1), "shared": (2, None)}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("async_speed")


@pytest.mark.parametrize("method", ["grpo", "online-dpo"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("way", "lag", "longest"), [("equal", 0, 26), ("sync", 0, 99), ("lag1", 1, 99)])
def test_each_case_is_a_command(bench, method, place, way, lag, longest):
    options = argparse.Namespace(
        method=method, gpus=2, prompts=4, samples=2, mean=26, longest=99, slots=8, steps=9, token_budget=512,
        device="cpu", tandem_flags="--window 0.5" if lag else "",
    )  # fmt: skip
    argv = bench.command(options, f"{place}-{way}")
    assert argv[2:4] == ["tandem", method]
    keys = [flag.removeprefix("--") for flag in argv[4::2]]
    config = read_config(method, **dict(zip(keys, argv[5::2], strict=True)))
    assert (config.schedule.max_lag, config.sampling.max_new_tokens) == (lag, longest)
    actor, engine = PLACES[place]
    assert str(config.placement.actor) == str(actor)
    assert engine is None or str(config.placement.engine) == str(engine)


def test_gains_are_over_the_twin_in_the_same_place_and_the_ideal_is_the_longer_part(bench):
    common = {"sampling_rate": 100.0, "sampling": 6.0, "seconds": 10.0}
    rows = [
        common | {"case": "split-sync", "tokens_per_second": 100.0},
        common | {"case": "split-lag1", "tokens_per_second": 150.0},
        common | {"case": "here-equal", "tokens_per_second": 80.0, "sampling_rate": 200.0},
        common | {"case": "here-lag1", "tokens_per_second": 300.0},
        {"case": "here-sync", "error": "died"},
    ]
    bench.compared(rows)
    sync, lagging, _, alone, _ = rows
    assert sync["ideal"] == pytest.approx(10 / 6)
    assert (lagging["over_sync"], lagging["of_ideal"]) == pytest.approx((1.5, 0.9))
    assert alone["of_equal"] == 0.5
    assert "over_sync" not in alone
    assert "of_ideal" not in alone
