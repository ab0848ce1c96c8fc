"""A hub that cannot be reached is not asked again and again, and what its cache holds is taken."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from helpers.models import make_module

from tandem.assembly.digests import digest_model
from tandem.data.rows import open_dataset
from tandem.errors import UserError
from tandem.hub import REACH_S, unreached
from tandem.models.proof.limits import read_limits


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that nobody has (RFC 6761), asked for without a proxy."""
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_name_that_nobody_has_is_said_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^some/model: .* none in the hub's cache, and https://hub.invalid cannot be"):
        read_limits("some/model")
    with pytest.raises(UserError, match=r"^some/rows: no such file, none in the hub's cache, and https://hub.invalid"):
        open_dataset("some/rows", "train")
    assert time.monotonic() - start < REACH_S
    assert not constants.HF_HUB_OFFLINE


def test_what_is_in_the_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
    make_module().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "models--some--model" / "snapshots" / commit)
    start = time.monotonic()
    assert read_limits("some/model").positions == read_limits(tmp_path / "base").positions
    assert digest_model("some/model") == {"": f"commit {commit}"}
    assert time.monotonic() - start < REACH_S


def test_a_hub_that_answers_and_one_behind_a_proxy_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hub.invalid cannot be reached: " in unreached()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    assert unreached() == ""
    monkeypatch.delenv("HTTPS_PROXY")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert unreached() == ""
    assert "Connection refused" in unreached()
