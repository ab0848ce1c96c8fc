"""Digests of large files, and of models that are not in a folder."""

from __future__ import annotations

import os

import huggingface_hub.constants

from tandem.assembly.digests import BLOCK, READ_WHOLE, digest_file, digest_model


def test_a_large_file_is_sampled_at_both_ends_and_between(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.touch()
    os.truncate(file, READ_WHOLE + 12345)  # sparse: zeros that take no room

    def digest_with(position, data=b"x"):
        with file.open("r+b") as opened:
            opened.seek(position)
            before = opened.read(len(data))
            opened.seek(position)
            opened.write(data)
        digest = digest_file(file)
        with file.open("r+b") as opened:
            opened.seek(position)
            opened.write(before)
        return digest

    size, plain = file.stat().st_size, digest_file(file)
    seen = {plain, digest_with(0), digest_with(size - 1), digest_with(size // 2, b"x" * (size // 255))}
    assert len(seen) == 4
    # What is documented as unseen: between two blocks. A file that is read whole shows it.
    assert digest_with(2 * BLOCK) == plain
    os.truncate(file, READ_WHOLE)
    assert digest_file(file) != plain
    assert digest_with(2 * BLOCK) != digest_file(file)


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """In a cache as the hub's client lays it out."""
    model = tmp_path / "models--somebody--small"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abcd")
    (model / "snapshots" / "0123abcd").mkdir(parents=True)
    (model / "snapshots" / "0123abcd" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert digest_model("somebody/small") == {"": "commit 0123abcd"}
