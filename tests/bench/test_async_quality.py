"""The bench of asynchronous quality: what it plans, one run of it, how it goes on, and what it makes of its rows."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

from tandem.assembly.configs.methods import read_config
from tandem.errors import UserError
from tandem.tasks import letters

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("async_quality")


def test_the_plan_has_every_run_once_and_each_is_a_config(bench, tmp_path):
    cells = bench.plan(bench.PARTS, range(3), 256)
    assert len({cell.name for cell in cells}) == len(cells)
    table = {(cell.variant, cell.lag, cell.seed) for cell in cells if cell.part == "corrections"}
    assert table == {(name, k, s) for name in bench.CORRECTIONS for k in (0, 1, 2, 4, 8) for s in range(3)}
    methods = {(cell.method, cell.lag) for cell in cells if cell.part == "lag"}
    assert methods == {(name, k) for name in ("ppo", "rloo", "online-dpo") for k in (0, 1, 4, 16)}
    # The first seed of everything comes before the second of anything.
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for cell in bench.plan(bench.PARTS, range(1), 256):
        keys = bench.keys_of(cell, tmp_path, tmp_path / "out")
        config = read_config(cell.method, **keys)
        assert config.schedule.max_lag == cell.lag
        assert config.run.steps == cell.keys["steps"]


@pytest.fixture(scope="module")
def starts(bench, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STARTS", {"hidden": 64, "layers": 1, "sft_steps": 2, "comparisons": 16, "rm_steps": 2})
        patch.setattr(bench, "HELD_OUT", 8)
        folder = tmp_path_factory.mktemp("start")
        bench.make_starts(folder)
        yield folder


def test_a_run_is_measured_and_its_samples_are_as_old_as_they_are_said_to_be(bench, starts, tmp_path, monkeypatch):
    before = (starts / "sft" / "model" / "model.safetensors").stat().st_mtime_ns
    bench.make_starts(starts)
    assert (starts / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == before, "made once"
    keys = {"steps": 4, "prompts_per_step": 2, "old_logp": "trainer", "correction": "token_tis"}
    row = bench.run_cell(bench.Cell("lag", "rloo", "token_tis", 2, 0, keys), starts, tmp_path / "run")
    assert "ended" not in row
    assert (row["steps"], row["lag_max"]) == (4, 2)
    assert row["lag_mean"] == pytest.approx((0 + 1 + 2 + 2) / 4, abs=0.3)
    assert [step for step, _ in row["curve"]] == [0, 1, 2, 3, 4]
    assert 0 <= row["gold"] <= 1
    assert row["kl"] > 0
    assert row["command"].startswith("tandem rloo --model ")
    same = bench.measured(starts / "sft" / "model", starts)
    assert same["kl"] == pytest.approx(0, abs=1e-9), "the start is where the start is"
    # A model's answers are those that the checker has seen.
    assert same["gold"] * 8 * bench.SAMPLES == pytest.approx(round(same["gold"] * 8 * bench.SAMPLES))
    assert 1 <= same["length"] <= letters.MAX_NEW_TOKENS

    monkeypatch.setitem(bench.STARTS, "layers", 2)
    with pytest.raises(UserError, match="of other sizes"):
        bench.make_starts(starts)


def test_a_run_that_ends_early_is_a_row(bench, starts, tmp_path):
    # Samples of a second step's weights are no longer within 1e-9 of the trainer's.
    keys = {"steps": 3, "prompts_per_step": 2, "old_logp": "trainer", "correction": "gap", "correction_gap": 1e-12}
    row = bench.run_cell(bench.Cell("corrections", "grpo", "gap", 1, 0, keys), starts, tmp_path / "run")
    assert "leaves out every token" in row["ended"]
    assert bench.collapsed(row)


CHILD = """
import json, os, sys, time
name, file = sys.argv[sys.argv.index("--cell") + 1], sys.argv[sys.argv.index("--json") + 1]
assert os.environ["OMP_NUM_THREADS"] == "1"
if "lag 4" in name:
    time.sleep(600)
if "rloo" in name and not os.path.exists(os.environ["AGAIN"]):
    sys.exit("no memory")
open(file, "w").write(json.dumps({"cell": name, "gold": 0.5, "seconds": 1.0}))
"""


def test_calls_go_on_where_the_time_was_over(bench, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(bench, "__file__", str(child))
    monkeypatch.setenv("AGAIN", str(tmp_path / "again"))
    cells = [cell for cell in bench.plan(["lag"], [0], 8) if cell.lag in (1, 4) and cell.variant == "none"]
    options = argparse.Namespace(
        json=tmp_path / "rows.json", jobs=3, minutes=2 / 60, start=tmp_path, steps=8, commit="abc"
    )
    bench.run_all(cells, options, bench.Kept(options))
    rows = {row["cell"]: row for row in json.loads(options.json.read_text())["rows"]}
    # What sleeps is not done when the time is over: no row. What dies is a row that says why.
    assert set(rows) == {cell.name for cell in cells if cell.lag == 1}
    assert rows["lag/rloo/none/lag 1/seed 0"]["error"] == "ended with 1: no memory"

    (tmp_path / "again").touch()
    child.write_text(CHILD.replace("time.sleep(600)", "pass").replace("0.5", "0.75"))
    options.minutes = 1.0
    bench.run_all(cells, options, bench.Kept(options))
    found = json.loads(options.json.read_text())
    assert sorted(row["gold"] for row in found["rows"]) == [0.5, 0.5, 0.75, 0.75, 0.75, 0.75]
    assert [call["commit"] for call in found["calls"]] == ["abc", "abc"]
    assert {row["call"] for row in found["rows"]} == {0, 1}


def rows_of(bench, gold):
    """A row for every run of two seeds, whose gold score is ``gold(cell)``."""
    return [
        {"cell": cell.name, "part": cell.part, "method": cell.method, "variant": cell.variant, "max_lag": cell.lag,
         "gold": gold(cell) + 0.01 * cell.seed, "kl": 1.0 + cell.lag, "lag_mean": cell.lag / 2, "steps": 8,
         "curve": [(0, 0.2), (4, gold(cell) / 2), (8, gold(cell))]}
        for cell in bench.plan(bench.PARTS, range(2), 8)
    ]  # fmt: skip


def test_tables_findings_and_figure(bench, tmp_path):
    rows = rows_of(
        bench, lambda cell: 0.1 if (cell.variant, cell.lag) == ("none", 8) else 0.9 if "4" in cell.variant else 0.8
    )
    results = bench.Results([*rows, {"cell": "x", "error": "died"}])
    table = bench.tables(results)
    assert "| none | 0.805 ± 0.007, 1.00 |" in table
    assert "| 0.105 ± 0.007, 9.00, 2 of 2 collapsed |" in table
    assert "lag 16 (mean 8.0)" in table
    said = bench.findings(results)
    assert "pairs: K=4: gold +0.100 (standard error 0.007), KL +0.00" in said
    assert "after 1.00 of the updates" in said
    assert "ppo, none: lag 16: gold +0.000 (standard error 0.007), KL +16.00" in said
    bench.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    # With nothing there yet nothing is claimed.
    empty = bench.Results([])
    assert "nan" not in bench.tables(empty) + bench.findings(empty)
    bench.draw(empty, tmp_path / "empty.png")


@pytest.mark.parametrize(
    ("gold", "curve", "expected"),
    [(0.5, [0.3, 0.9, 0.6], False), (0.44, [0.3, 0.9, 0.6], True), (0.29, [0.3, 0.4, 0.35], True), (None, [0.3], True)],
)
def test_collapsed(bench, gold, curve, expected):
    row = {"curve": list(enumerate(curve))} | ({} if gold is None else {"gold": gold})
    assert bench.collapsed(row) is expected
