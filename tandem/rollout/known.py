"""What a frozen model says of a run's rows: asked once, kept in files by content, and the model can be let go."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tandem.batch import Batch, Outputs, filled
from tandem.data.order import content_hash
from tandem.errors import first_line
from tandem.roles import Seat
from tandem.whole import whole_file, writing

FILE_SECONDS = 30.0
"""A file is written after 30 seconds of asking: no more than that is asked again where a run was killed."""


class Known:
    """A model's log-probs of sequences that it was asked about (``tandem.roles.Scorer``).

    They are kept by content: by the tokens of a sequence and which of them are trained, in a folder that stands for
    everything the model's numbers depend on (``about``). So a changed row or model is never taken for another.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        """``folder`` may be shared by runs and models. None: kept in memory only."""
        self.folder = None if folder is None else folder / content_hash(about)
        self.about = json.dumps(about, sort_keys=True)
        self.logp: dict[bytes, Tensor] = {}
        self.fresh: dict[bytes, Tensor] = {}
        """Those of ``logp`` that no file has yet."""

    def read(self) -> list[str]:
        """Takes in every file of the folder. Returns a line for each that is damaged, which is deleted if it can be."""
        damaged: list[str] = []
        if self.folder is None:
            return damaged
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self.logp |= _read(file, self.about)
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                damaged.append(f"{file}: damaged ({first_line(error)}); what it held is computed again")
                with suppress(OSError):  # where it may not be deleted, it is passed over
                    file.unlink()
        return damaged

    def lacking(self, batch: Batch) -> list[int]:
        """The units of a batch with a sequence that is not known."""
        per, missing = batch.segments_per_unit, [key not in self.logp for key in content_keys(batch)]
        return [unit for unit in range(batch.units) if any(missing[unit * per : (unit + 1) * per])]

    def ask(self, seat: Seat, batches: Iterable[Batch]) -> None:
        """Asks the model for what is not known of each batch, and writes it down.

        Raises DiskFailure where the disk is full or refuses.
        """
        written = time.monotonic()
        for batch in batches:
            units = self.lacking(batch)
            if not units:
                continue
            part = batch if len(units) == batch.units else batch.select(units)
            self._learn(part, filled(seat.call("score", part).logp_T, "logp_T"))
            if time.monotonic() - written > FILE_SECONDS:
                self.write()
                written = time.monotonic()
        self.write()

    def write(self) -> None:
        """A file of what none has yet, whole or not there."""
        fresh, self.fresh = self.fresh, {}
        if not fresh or self.folder is None:
            return
        file = self.folder / f"{_digest(b''.join(fresh))}.safetensors"
        with writing(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(file, file.with_name(f".{uuid.uuid4().hex}-partial")) as opened:
                opened.write(_encoded(fresh, self.about))

    def score(self, batch: Batch) -> Outputs:
        """Log-probs of a batch whose sequences are all known. Raises ValueError where one is not."""
        logp_T = torch.zeros(batch.tokens)
        places = _trained(batch).split(_counts(batch))
        for place_N, key in zip(places, content_keys(batch), strict=True):
            if key not in self.logp:
                raise ValueError("a sequence of the batch is not known; the model should have been asked about it")
            logp_T[place_N] = self.logp[key]
        return Outputs(logp_T=logp_T)

    def _learn(self, batch: Batch, logp_T: Tensor) -> None:
        logp_N = logp_T.cpu()[_trained(batch)]
        for key, logp in zip(content_keys(batch), logp_N.split(_counts(batch)), strict=True):
            self.logp[key] = self.fresh[key] = logp


def content_keys(batch: Batch) -> list[bytes]:
    """16 bytes for each segment, which depend on its tokens and on which of them are trained, and on nothing else."""
    ids, trained, bounds = batch.token_ids_T.cpu().numpy(), batch.trainable_T.cpu().numpy(), batch.bounds.tolist()
    return [
        hashlib.blake2b(ids[start:end].tobytes() + trained[start:end].tobytes(), digest_size=16).digest()
        for start, end in pairwise(bounds)
    ]


def _trained(batch: Batch) -> Tensor:
    return batch.trainable_T.cpu().nonzero().squeeze(-1)


def _counts(batch: Batch) -> list[int]:
    """Trained tokens of each segment."""
    running = torch.cat([torch.zeros(1, dtype=torch.int64), batch.trainable_T.cpu().cumsum(0)])
    return running[batch.bounds].diff().tolist()


def _encoded(logp: Mapping[bytes, Tensor], about: str) -> bytes:
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(logp)), dtype=torch.uint8),
        "counts": torch.tensor([len(x) for x in logp.values()]),
        "logp": torch.cat(list(logp.values())),
    }
    # One entry: safetensors writes several in any order.
    return save(tensors, {"written": json.dumps([about, _checksum(tensors)])})


def _read(file: Path, about: str) -> dict[bytes, Tensor]:
    """Raises ValueError where it is not as it was written, or of another model."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        of_model, checksum = json.loads((opened.metadata() or {})["written"])
    if of_model != about:
        raise ValueError("it is of another model")
    if checksum != _checksum(tensors):
        raise ValueError("its checksum is wrong")
    keys = tensors["keys"].numpy().tobytes()
    parts = tensors["logp"].split(tensors["counts"].tolist())
    return {keys[16 * i : 16 * (i + 1)]: part for i, part in enumerate(parts)}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return _digest(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
