"""The loops of recipes/ run: bash calls ``tandem``, which is this process, with a small model."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.models import make_module, make_tokenizer

from tandem.cli.main import main
from tandem.runs.lines import read_lines

RECIPES = Path(__file__).parents[2] / "recipes"
TANDEM = """#!{python} -S
import socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({address!r})
    s.sendall(chr(0).join(sys.argv[1:]).encode())
    s.shutdown(socket.SHUT_WR)
    sys.exit(s.recv(1)[0])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of recipes/ with a small model and a reward model that its answers differ in."""
    shutil.copytree(RECIPES, tmp_path / "recipes", ignore=shutil.ignore_patterns("cluster", "*.yaml"))
    monkeypatch.chdir(tmp_path / "recipes")
    module = make_module("llama")
    module.config.max_position_embeddings = 1024  # rotary ones, of which there is no table
    module.save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    Path("prompts.jsonl").write_text("".join(Path("prompts.jsonl").read_text().splitlines(keepends=True)[:12]))
    # A model with random weights is right about the number of its letters.
    Path("check.py").write_text("def right(completions):\n    return [float(len(c) > 2) for c in completions]\n")
    return tmp_path


def run_loop(script: str, folder: Path, **environment: str) -> list[str]:
    """Runs a script; the command lines that it gave to ``tandem``."""
    address, lines = str(folder / "tandem.sock"), []
    shim = folder / "bin" / "tandem"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(TANDEM.format(python=sys.executable, address=address))
    shim.chmod(0o755)
    path = f"{shim.parent}:{os.environ['PATH']}"
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        bash = subprocess.Popen(["bash", f"./{script}"], env=os.environ | environment | {"PATH": path})
        ended = threading.Thread(target=lambda: (bash.wait(), _knock(address)))
        ended.start()
        while True:
            connection, _ = listening.accept()
            with connection:
                words = connection.makefile("rb").read().decode().split("\0")
                if words == [""]:
                    break
                lines.append(" ".join(words))
                connection.sendall(bytes([main(words)]))
        ended.join()
    assert bash.returncode == 0
    return lines


def _knock(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.connect(address)
        knocking.shutdown(socket.SHUT_WR)


FEW = {"SAMPLE": "--max-new-tokens 5 --samples-per-prompt 4", "TRAIN": "--batch-size 8", "ROUNDS": "2", "MODEL": "base"}


def test_rejection_sampling(folder):
    lines = run_loop("rejection-sampling.sh", folder, OUT="r", **FEW)
    assert [line.split()[0] for line in lines] == ["sample", "sft"] * 2
    assert "--model r/1/sft/model" in lines[2]
    assert len(read_lines(Path("r/1/samples/best.jsonl"))) == 12
    assert Path("r/2/sft/model/config.json").exists()
    before = Path("r/2/sft/metrics.jsonl").read_bytes()
    assert run_loop("rejection-sampling.sh", folder, OUT="r", **FEW) == lines
    assert Path("r/2/sft/metrics.jsonl").read_bytes() == before


def test_iterative_dpo(folder):
    train = ["rm", "--model", "base", "--data", "pairs.jsonl", "--steps", "1", "--batch-size", "4", "--out", "rm"]
    assert main(train) == 0
    lines = run_loop("iterative-dpo.sh", folder, OUT="i", REWARD_MODEL="rm/model", **FEW)
    assert [line.split()[0] for line in lines] == ["sample", "dpo"] * 2
    pairs = read_lines(Path("i/2/samples/pairs.jsonl"))
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert Path("i/2/dpo/model/config.json").exists()
