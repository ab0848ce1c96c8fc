"""Kills and stops random processes of small runs with workers, and says how each run ends.

    python bench/kills.py --runs 100 --seed 0
    python bench/kills.py --runs 200 --seed 0 --max-lag 2

A run is GRPO of a tiny model on a CPU: over two workers with live engines, over one with another live engine apart, or
with a vLLM engine of two tensor-parallel ranks; where asked for (--kinds adapters), also of adapters on a base in 4
bits, which travel alone to a vLLM engine of one rank. Its reward takes up to 50 ms for each sample. With --max-lag
samples are open across steps: on either side of a push, and while others train. Once its first step is done, one of its
processes gets SIGKILL or SIGSTOP at a random time. The run must end within the bound; with an error it must name a
process that died; and no process of it and no shared memory may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from models import write_folder

HEARTBEAT_S = 5.0
BOUND_S = 240.0
"""An engine that is started again needs most of it."""
START_S = 300.0
STEPS = 20
VICTIMS = {
    "driver": r"-m tandem grpo",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs_server ",
    "worker": r"^ray::WorkerProcess",
    "rank": r"^VLLM::Worker|multiprocessing\.spawn.*spawn_main",
    "agent": r"^ray::(DashboardAgent|RuntimeEnvAgent)",
    "helper": r"log_monitor\.py|monitor\.py|dashboard\.py",
    "reward": r"tandem\.rewards\.serving",
}
"""Command lines. A worker of the vllm configuration is its engine."""
KINDS = {
    "live": ["--placement.actor", "2"],
    "apart": ["--placement.actor", "1", "--placement.engine", "1"],
    "vllm": [
        *("--engine.kind", "vllm", "--placement.engine", "1", "--engine.tensor-parallel", "2"),
        *("--old-logp", "trainer", "--max-slots", "8", "--engine.max-length", "32"),
    ],
    "adapters": [
        *("--engine.kind", "vllm", "--placement.engine", "1", "--lora.rank", "4", "--lora.quantize", "nf4"),
        *("--old-logp", "trainer", "--max-slots", "8", "--engine.max-length", "32"),
    ],
}
REWARD = """import random
import time


def score(prompts, completions):
    time.sleep(random.uniform(0, 0.05) * len(prompts))
    return [float(i) for i in range(len(prompts))]
"""


@dataclass
class Ending:
    """What a run did after one of its processes was hit."""

    kind: str
    victim: str
    signal: str
    code: int | None
    seconds: float
    said: str
    processes_left: list[str]
    shared_memory_left: list[str]
    well: bool


def command_line(pid: int) -> str:
    """Nothing where the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def runs(pid: int) -> bool:
    """Whether it is there, and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def family(root: int) -> list[int]:
    """A process and all that it started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def shared_memory() -> set[str]:
    """The names in ``/dev/shm`` that no process has mapped: others run on this machine, too."""
    mapped = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped |= {line.split()[4] for line in path.read_text(errors="replace").splitlines() if "/dev/shm/" in line}
        except OSError:
            continue
    return {path.name for path in Path("/dev/shm").glob("*") if path.exists() and str(path.stat().st_ino) not in mapped}


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it came to hold within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def lagging(kind: str, max_lag: int) -> list[str]:
    """The flags of a run whose samples are open across so many steps."""
    corrected = ["--correction", "token_tis"] if kind in ("vllm", "adapters") else []
    return ["--max-lag", str(max_lag), *corrected] if max_lag else []


def one(
    folder: Path, number: int, kind: str, victim: str, name: str, rng: random.Random, max_lag: int
) -> Ending | None:
    """A run, hit once. None where it has no such process."""
    before = shared_memory()
    out = folder / f"run-{number}"
    argv = [
        *(sys.executable, "-m", "tandem", "grpo", "--model", str(folder / "model"), "--out", str(out)),
        *("--data", str(folder / "prompts.jsonl"), "--reward", f"{folder}/reward.py:score", "--device", "cpu"),
        *("--steps", str(STEPS), "--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "8"),
        *("--cluster.heartbeat", str(HEARTBEAT_S), *KINDS[kind], *lagging(kind, max_lag)),
    ]
    written = folder / f"run-{number}.txt"
    with written.open("w") as output:
        run = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    metrics = out / "metrics.jsonl"
    begun = wait_for(lambda: (metrics.exists() and metrics.stat().st_size) or run.poll() is not None, START_S)
    members = family(run.pid)
    hit = [pid for pid in members if re.search(VICTIMS[victim], command_line(pid))]
    if not begun or run.poll() is not None or not hit:
        print(f"  {kind}: no {victim} to hit", *([written.read_text()[-2000:]] if run.poll() is not None else []))
        run.kill()
        run.wait()
        return None
    time.sleep(rng.uniform(0, 3))
    members = family(run.pid)
    pid = rng.choice(hit)
    os.kill(pid, getattr(signal, name))
    if victim == "driver" and name == "SIGSTOP":
        # Whoever stops a run lets it go on. It must not have been given up meanwhile.
        time.sleep(2 * HEARTBEAT_S)
        os.kill(pid, signal.SIGCONT)
    start = time.monotonic()
    ended = wait_for(lambda: run.poll() is not None, BOUND_S)
    seconds = time.monotonic() - start
    wait_for(lambda: not any(map(runs, members)) and not shared_memory() - before, 2 * HEARTBEAT_S + 5)
    left = [member for member in members if runs(member)]
    names = [f"{member} {command_line(member)[:120]}" for member in left]
    shared = sorted(shared_memory() - before)
    text = written.read_text()
    said = next((line for line in text.splitlines() if line.startswith("tandem: error: ")), "")
    # A reward is named after its function.
    named = bool(said) and (str(pid) in text or (victim == "reward" and "reward 'score'" in said))
    killed_itself = victim == "driver" and name == "SIGKILL" and run.returncode == -signal.SIGKILL
    well = (
        ended and not left and not shared and (run.returncode == 0 or killed_itself or (named and run.returncode == 75))
    )
    for member in left:
        os.kill(member, signal.SIGKILL)
    run.wait()
    if not well:
        print(text[-3000:])
    return Ending(kind, victim, name, run.returncode, round(seconds, 1), said[:300], names, shared, well)


def counts(endings: list[Ending]) -> list[dict[str, object]]:
    """How many of each configuration, victim and signal ended well, and with which exit codes."""
    found = []
    for key in sorted({(each.kind, each.victim, each.signal) for each in endings}):
        same = [each for each in endings if (each.kind, each.victim, each.signal) == key]
        codes = dict(sorted(Counter(str(each.code) for each in same).items()))
        row = {"runs": len(same), "well": sum(each.well for each in same), "codes": codes}
        found.append(dict(zip(("configuration", "victim", "signal"), key, strict=True)) | row)
    return found


def save(path: Path, command: str, commit: str, endings: list[Ending]) -> None:
    """Adds to what other commands have saved there."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    here = {"command": command, "commit": commit}
    runs = [run for run in runs if {name: run[name] for name in here} != here]
    runs.append(here | {"endings": [asdict(each) for each in endings]})
    table = counts([Ending(**ending) for run in runs for ending in run["endings"]])
    path.write_text(json.dumps({"counts": table, "runs": runs}, indent=1) + "\n")


def main() -> int:
    """The command. Returns its exit code: 1 where a run has not ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["live", "apart", "vllm"])
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGSTOP"])
    parser.add_argument("--max-lag", type=int, default=0)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    rng = random.Random(asked.seed)
    endings: list[Ending] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder("0.75m", folder / "model")
        (folder / "reward.py").write_text(REWARD)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": c}) + "\n" for c in "abcdefgh"))
        for number in range(asked.runs):
            kind, victim = rng.choice(asked.kinds), rng.choice(asked.victims)
            if victim == "rank":
                kind = "vllm"
            ending = one(folder, number, kind, victim, rng.choice(asked.signals), rng, asked.max_lag)
            if ending is not None:
                endings.append(ending)
                print(json.dumps(asdict(ending)), flush=True)
                if asked.save:
                    words = " ".join(word for word in sys.argv[1:] if word not in ("--save", str(asked.save)))
                    save(asked.save, f"python bench/kills.py {words}", commit, endings)
    for row in counts(endings):
        print(*row.values())
    well = sum(each.well for each in endings)
    print(f"{well} of {len(endings)} ended well")
    return int(well < asked.runs)


if __name__ == "__main__":
    sys.exit(main())
