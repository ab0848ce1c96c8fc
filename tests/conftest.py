"""What every test process begins with: signals as in a terminal, one thread, Triton without a GPU."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background job. What is started here would ignore Ctrl-C too, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: the tensors are tiny, and threads that wait for each other are slow where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test asks for several threads, those that wait leave their core to other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test may ask a hub: where there is none, each question is repeated for three quarters of a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidia0"):
    # Before kernels are defined: without a GPU, Triton runs them on CPU tensors, step by step in Python.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tandem.cli.main import main
from tandem.collector import collect_rarely

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
# To import what the tests need takes 3 s of 11 longer where all that lives is gone through again and again.
collect_rarely()
# Helpers are imported by the fixtures: the process that hands out tests runs none, and needs no torch.

TESTS = Path(__file__).parent
LONGEST = (
    "quickstart/test_quickstart.py",
    "learning/test_learning.py",
    "cli/test_resume.py",
    "parallel/test_compiled_sharding.py",
    "models/test_compiled.py",
    "recipes/test_commands_run.py",
    "bench/test_benches.py",
    "kernels/test_compiles.py",
    "kernels/test_engine_kernels.py",
    "own_loop/test_launch.py",
    "vllm/test_vllm_runs.py",
    "workers/test_placements.py",
    "workers/test_failures.py",
    "workers/test_own_ray.py",
    "workers/test_offline.py",
    "vllm/test_vllm_commands.py",
    "workers/test_kills.py",
    "vllm/test_loop_vllm.py",
    "workers/test_homes.py",
    "workers/test_threads.py",
    "workers/test_engine_groups.py",
    "vllm/test_vllm_parallel.py",
)
"""Files of a quarter of a minute and more, whatever the number of their tests."""
LAST = ("workers", "vllm")
"""Rooms whose tests start Ray and vLLM in the tests' own process, where both leave things changed."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of processes that each take the next file, none is left with a long one alone."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "LONGEST has a file that is not there"
    items.sort(key=lambda item: (item.path.parent.name in LAST, places.get(item.path, len(places))))


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw its curves takes a third of a tiny run. They are drawn where that is tested, marked ``draws``."""
    from helpers.undrawn import draw_nothing

    if request.node.get_closest_marker("draws") is None:
        draw_nothing(monkeypatch)


@pytest.fixture
def helpers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get this process's PYTHONPATH, and find ``helpers`` there."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from helpers.models import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def model_folder(tmp_path) -> Any:
    """A small Llama with its tokenizer as a Hugging Face folder."""
    from helpers.models import make_module, make_tokenizer

    folder = tmp_path / "model"
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a small model, data of each kind and a reward."""
    from helpers.runs import write_inputs

    folder: Path = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def tandem(inputs, monkeypatch, capsys) -> Any:
    """Runs a command in the folder of the inputs; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(inputs)

    def call(*argv: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call
