from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from tandem.checkpoint.store import CheckpointStore
from tandem.errors import UserError


def parts_of(step: int) -> dict:
    module = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(module.weight, step)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.9, 0.95))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"actor": {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "version": step}}


def store_with(tmp_path: Path, *steps: int, keep: int = 0) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=keep)
    for step in steps:
        store.save(step, parts_of(step), {"algorithm": {"kl_coef": 0.1 * step}})
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = store_with(tmp_path, 3)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert checkpoint.path == store.path(3)
    assert checkpoint.state == {"algorithm": {"kl_coef": 0.1 * 3}}
    expected, loaded = parts_of(3)["actor"], checkpoint.load("actor")
    # The biases are random, the rest is not: compare what went in through torch's own deep comparison.
    assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
    assert loaded["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    torch.testing.assert_close(loaded["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=0)


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    assert store.latest() is None
    assert not store.folder.exists()
    store.folder.mkdir()
    assert store.latest() is None


@pytest.mark.parametrize("keep", range(9))
def test_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=keep)
    for step in range(1, 7):
        store.save(step, {"actor": {"x": torch.tensor(step)}}, {})
        first = max(1, step - keep + 1) if keep else 1
        assert names(store) == [f"step_{kept:08d}" for kept in range(first, step + 1)]


def test_one_may_be_spared_beside_the_newest(tmp_path: Path) -> None:
    store = store_with(tmp_path, keep=2)
    for step in range(1, 8):
        store.save(step, {"actor": {"x": torch.tensor(step)}}, {})
        # It is the newest when it is chosen, and goes when another one is.
        store.spared = {2: 2, 6: 6}.get(step, store.spared)
        newest = {step - 1, step} if step > 1 else {1}
        kept = newest | ({2} if 2 <= step <= 6 else set()) | ({6} if step >= 6 else set())
        assert names(store) == [f"step_{one:08d}" for one in sorted(kept)]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = store_with(tmp_path, 99_999_999, 100_000_000)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 100_000_000


def test_the_same_step_again_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5, keep=1)
    with pytest.raises(UserError, match="cannot be written: Directory not empty; step_00000005 is whole"):
        store.save(5, {"actor": {"new": torch.ones(2)}}, {"attempt": 2})
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.load("actor").keys() == parts_of(5)["actor"].keys()
    assert [path.name for path in store.folder.iterdir()] == ["step_00000005"]


def test_leftovers_are_passed_over_and_cleared(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (store.folder / ".partial-step_00000002").mkdir()
    (store.folder / ".partial-step_00000002" / "actor.pt").write_bytes(b"half")
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    store.save(3, parts_of(3), {})
    assert names(store) == ["step_00000001", "step_00000003"]


def test_truncated_is_refused_by_name_and_the_previous_serves_once_it_is_removed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    file = store.path(2) / "actor.pt"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(UserError, match=rf"{file}.*{size - 1} bytes, not {size}; remove {store.path(2)} to go on"):
        store.latest()
    for inner in store.path(2).iterdir():
        inner.unlink()
    store.path(2).rmdir()
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_a_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    file = store.path(1) / "actor.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    checkpoint = store.latest()
    assert checkpoint is not None
    with pytest.raises(UserError, match=rf"{file}: corrupt: sha256 .*remove {store.path(1)}"):
        checkpoint.load("actor")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "actor.pt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    (store.path(1) / name).unlink()
    with pytest.raises(UserError, match=rf"{store.path(1) / name}: is missing"):
        store.latest()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "not JSON"),
        ("[]", "its format is not"),
        (json.dumps({"format": "somebody-elses"}), "its format is not 'tandem-checkpoint'"),
        (json.dumps({"format": "tandem-checkpoint", "version": 99}), "version 99 of the format; this Tandem reads 3"),
        (json.dumps({"format": "tandem-checkpoint", "version": 3, "step": 2, "files": {}}), "does not describe step 1"),
        (
            json.dumps({"format": "tandem-checkpoint", "version": 3, "step": 1, "files": {"state.json": 3}}),
            "does not describe",
        ),
    ],
)
def test_a_foreign_manifest_is_refused_by_name(tmp_path: Path, manifest: str, message: str) -> None:
    store = store_with(tmp_path, 1)
    (store.path(1) / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=f"step_00000001.*{message}"):
        store.latest()


@pytest.mark.parametrize("name", ["checkpoint-500", "step_7", "notes"])
def test_a_strangers_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    (store.folder / name).mkdir()
    with pytest.raises(UserError, match=rf"{store.folder / name}: not a checkpoint of Tandem's"):
        store.latest()


def test_rotation_leaves_a_folder_without_manifest_alone(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    stranger = store.path(1)
    stranger.mkdir()
    (stranger / "precious.txt").write_text("mine")
    store.keep = 1
    store.save(3, parts_of(3), {})
    assert names(store) == ["step_00000001", "step_00000003"]


def test_a_file_that_torch_cannot_load_is_named(tmp_path: Path) -> None:
    """Whole by its checksum, but holding code: weights_only refuses it."""
    store = store_with(tmp_path, 1)
    file = store.path(1) / "actor.pt"
    file.write_bytes(pickle.dumps(os.system, protocol=2))
    manifest = json.loads((store.path(1) / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"]["actor.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (store.path(1) / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = store.latest()
    assert checkpoint is not None
    with pytest.raises(UserError, match=rf"{file}: torch cannot load it"):
        checkpoint.load("actor")


def test_an_absent_part_is_named_with_those_held(tmp_path: Path) -> None:
    checkpoint = store_with(tmp_path, 1).latest()
    assert checkpoint is not None
    with pytest.raises(UserError, match="holds no part 'critic' but actor"):
        checkpoint.load("critic")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": numpy.float64(1.0)}]}, r"actor\['a'\]\[1\]\['b'\] is a float64"),
        ({"a": {1, 2}}, r"actor\['a'\] is a set"),
        ({"a": {(1, print): 2}}, "is a builtin_function_or_method"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: dict, where: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(TypeError, match=where):
        store.save(1, {"actor": value}, {})
    assert not store.folder.exists()


def test_every_plain_value_survives(tmp_path: Path) -> None:
    value = {"a": (1, 0.1, True, None, "x"), 3: [torch.arange(3)], "o": OrderedDict(b=torch.zeros(2, dtype=torch.bool))}
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, {"actor": value}, {"x": 1 / 3, "infinite": float("inf")})
    checkpoint = store.latest()
    assert checkpoint is not None
    loaded = checkpoint.load("actor")
    assert loaded["a"] == value["a"]
    assert torch.equal(loaded[3][0], torch.arange(3))
    assert checkpoint.state == {"x": 1 / 3, "infinite": float("inf")}


def test_a_full_disk_names_the_path_and_leaves_the_previous_whole(tmp_path: Path) -> None:
    """The kernel itself refuses to write more: a limit on file size, in a process of its own."""
    store = store_with(tmp_path, 1, keep=1)
    if (pid := os.fork()) == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            store.save(2, {"actor": {"large": torch.zeros(100_000)}}, {})
        except UserError as error:
            said = str(error)
            assert said.startswith(f"{store.path(2)}: cannot be written: File too large;")
            assert "step_00000001 is whole" in said
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert names(store) == ["step_00000001"]
    checkpoint = store.latest()
    assert checkpoint is not None
    checkpoint.load("actor")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)
    with pytest.raises(UserError, match=r"file/checkpoints/step_00000001.*Not a directory; there is no earlier one"):
        store.save(1, {}, {})


def test_keep_below_zero_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=-1"):
        CheckpointStore(tmp_path, keep=-1)
