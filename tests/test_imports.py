"""What importing Tandem costs and needs. Every check runs in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "matplotlib", "rich")


def loaded_by(code: str) -> set[str]:
    """The HEAVY modules that ``code`` has imported by the time it ends."""
    report = f"import sys\n{code}\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in loaded_by("import numpy")


def test_import_tandem_imports_nothing_heavy():
    assert loaded_by("import tandem; tandem.__version__; tandem.UserError") == set()


def test_help_imports_nothing_heavy():
    code = "from tandem.cli.main import main; assert main(['--help']) == 0; assert main(['--version']) == 0"
    assert loaded_by(code) == set()


def test_configs_import_nothing_heavy():
    assert loaded_by("import tandem.config, tandem.assembly.configs.methods") == set()


def test_help_of_every_command_and_a_mistyped_flag_load_no_torch_and_take_no_time():
    """They loaded torch and transformers, 4 s each."""
    code = """
import time
from tandem.cli.main import COMMANDS, main
start = time.process_time()
for name, command in COMMANDS.items():
    assert main([name, "--help"]) == 0
    if command.config:
        assert main([name, "--stepz", "3"]) == 2
assert time.process_time() - start < 2, time.process_time() - start
"""
    assert loaded_by(code) & {"torch", "transformers", "datasets", "pyarrow", "matplotlib"} == set()


def test_public_names_exist_and_others_do_not():
    import tandem

    for name in tandem._PUBLIC:
        assert getattr(tandem, name).__name__ == name
        assert name in dir(tandem)
    assert not hasattr(tandem, "no_such_name")


def test_import_tandem_needs_torch_and_transformers_only():
    """Everything that neither of the two installs is hidden, then every public name is imported."""
    code = """
from importlib.machinery import PathFinder
HIDDEN = {"datasets", "pyarrow", "pandas", "matplotlib", "rich", "ray", "vllm", "wandb", "pytest"}
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
try:
    import rich
    raise SystemExit("nothing is hidden")
except ModuleNotFoundError:
    pass
import torch, transformers
import tandem
for name in tandem._PUBLIC:
    getattr(tandem, name)
for module in ("types", "roles", "batch", "methods.ppo", "methods.grpo", "methods.sft", "methods.rm",
               "models.loading", "training.trainer", "engines.live.engine"):
    __import__("tandem." + module)
"""
    assert loaded_by(code) & {"datasets", "pyarrow", "matplotlib", "rich"} == set()
