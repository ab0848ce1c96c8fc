"""Recipes load: configs, scripts, the Kubernetes manifest, the image's pins, and the reward."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.commands import command_lines, config_class
from helpers.models import make_module, make_tokenizer

from tandem.cli.main import main
from tandem.config import load_config
from tandem.methods.table import METHODS, SAMPLES
from tandem.rewards.function import load_reward
from tandem.roles import RewardBatch

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
MANIFEST = RECIPES / "cluster" / "kuberay.yaml"
CONFIGS = sorted(set(RECIPES.rglob("*.yaml")) - {MANIFEST})
SCRIPTS = sorted([*(RECIPES / "cluster").glob("*.sh"), *(RECIPES / "cluster").glob("*.sbatch")])


def command_of(config):
    """``grpo-7b-split.yaml`` is for ``tandem grpo``, ``dr-grpo.yaml`` for ``tandem dr-grpo``."""
    return max((name for name in METHODS if f"{config.stem}-".startswith(f"{name}-")), key=len)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads(path):
    config = load_config(config_class(command_of(path)), ["--config", str(path)])
    assert config.run.out.endswith(path.stem)
    # The command in its first lines is for this very file.
    (words, *_) = command_lines("\n".join(line.removeprefix("#") for line in path.read_text().splitlines()))
    assert words[:3] == [command_of(path), "--config", str(path.relative_to(RECIPES))]
    assert (RECIPES / config.data.data).is_file()
    if hasattr(config, "sampling"):
        room = config.engine.max_length
        assert room is None or config.data.max_length + config.sampling.max_new_tokens <= room
        judges = (*config.reward.reward, *config.evaluation.eval_reward)
        assert judges
        for file, _, function in (judge.partition(":") for judge in judges):
            assert f"def {function}(" in (RECIPES / file).read_text()


def test_each_method_on_samples_has_a_recipe():
    assert {command_of(path) for path in CONFIGS} >= set(SAMPLES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A copy of the folder with a small model in the place of a hub's."""
    folder = tmp_path_factory.mktemp("recipes") / "recipes"
    shutil.copytree(RECIPES, folder)
    module = make_module("llama")
    module.config.max_position_embeddings = 4096  # rotary ones, of which there is no table
    module.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("name", [path.name for path in CONFIGS if path.parent == RECIPES])
def test_a_recipe_would_run(name, small, monkeypatch, capsys):
    """With ``--dry-run``: all that a start reads but weights, and what the run would use."""
    monkeypatch.chdir(small)
    small_ones = {"model": "base", "teacher": "base", "lora.rank": "8"}
    keys = [key for key in yaml.safe_load(Path(name).read_text()) if key in small_ones]
    swapped = [word for key in keys for word in (f"--{key}", small_ones[key])]
    assert main([command_of(Path(name)), "--config", name, *swapped, "--dry-run"]) == 0
    assert "base" in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_its_command_parses(path, monkeypatch):
    subprocess.run(["bash", "-n", str(path)], check=True)
    body = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    ((command, *argv),) = command_lines(body)
    monkeypatch.chdir(RECIPES)
    config = load_config(config_class(command), [word for word in argv if word != "$@"])
    assert config.run.resume
    assert config.run.out.startswith("$SHARED/")
    if "torchrun" in body:
        assert config.placement.actor == "here"
    else:
        assert config.cluster.address == "auto"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_misses(path):
    environment = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": "."}
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode != 0
    assert "set SHARED to a folder" in done.stderr


def test_the_manifest_asks_for_the_gpus_that_its_command_uses(monkeypatch):
    manifest = yaml.safe_load(MANIFEST.read_text())
    assert manifest["kind"] == "RayJob"
    ((command, *argv),) = command_lines(manifest["spec"]["entrypoint"])
    at = argv.index("--config") + 1
    inside = Path(argv[at])
    argv[at] = str(ROOT / inside.relative_to("/opt/tandem"))
    config = load_config(config_class(command), argv)
    (workers,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.placement.workers("actor") + config.placement.workers("engine") == gpus
    file = Path(config.reward.reward[0].partition(":")[0])
    assert (ROOT / file.relative_to("/opt/tandem")).is_file()
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/shared" in mounted
    assert config.run.out.startswith("/shared/")
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


def test_the_image_copies_what_there_is_and_pins_what_is_pinned():
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for name in line.split()]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(copied)
    (names,) = re.findall(r"\^\(([\w|]+)\)==", dockerfile)
    pins = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==", pins, re.M) for name in names.split("|"))


def test_the_reward_reads_the_last_number():
    reward = load_reward(f"{RECIPES / 'check.py'}:right")
    completions = [
        "3 + 4 = 7",
        "First 7, then 8.",
        "1,250 dollars",
        "none",
        [{"role": "assistant", "content": "-2.50"}],
    ]
    batch = RewardBatch(
        prompts=[""] * 5, completions=completions, rollouts=[], columns={"answer": [7, "7", "1250", "0", -2.5]}
    )
    assert reward.score(batch) == [1.0, 0.0, 1.0, 0.0, 1.0]
