"""Digests of what a run reads (rows, reward functions, models), by which a resumed run knows that they have changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from transformers.utils import cached_file

from tandem.data.corpus import Corpus
from tandem.data.rows import Dataset
from tandem.errors import UserError
from tandem.hub import asking_hub
from tandem.models.folder import located
from tandem.models.lora.folder import ADAPTER_CONFIG, adapter_folder
from tandem.rewards.function import FunctionReward
from tandem.runs.identity import Inputs

MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".py", ".safetensors", ".bin")
"""Files of a model folder that are read, or may be."""
READ_WHOLE = 1 << 28
"""Bytes (256 MiB) up to which a file is read whole; of a larger one, ``SAMPLES`` blocks of ``BLOCK`` bytes are."""
SAMPLES, BLOCK = 256, 1 << 16


def digest_inputs(
    rows: Mapping[str, Dataset | None],
    rewards: Seq[FunctionReward] = (),
    models: Mapping[str, str] | None = None,
    template: str | None = None,
) -> Inputs:
    """Digests by kind and name. ``rows`` by key (``data``, ``eval_data``), ``models``: folder or hub name by role.
    ``template``: the file with a chat template, or the name of one of the tokenizer's.

    Datasets are taken as they were read, in their order, so that a change of a file's layout alone is none. A reward is
    its file and the modules from the same folder that it uses; what it reads or imports when it is called is not seen.
    """
    return {
        "data": {f"{key} {one.source}": digest_rows(one) for key, one in rows.items() if one is not None}
        | ({f"chat template {template}": digest_file(Path(template))} if template and Path(template).is_file() else {}),
        "reward": {
            f"reward {reward.source}" + (f": {name}" if name else ""): digest_file(path)
            for reward in rewards
            for name, path in reward.files.items()
        }
        | {f"reward {reward.source}: version": reward.version for reward in rewards if reward.version},
        "model": {
            f"model {source}" + (f": {name}" if name else ""): digest
            for source in dict.fromkeys((models or {}).values())
            for name, digest in digest_model(source).items()
        },
    }


def digest_corpus(key: str, corpus: Corpus) -> dict[str, str]:
    """Of each file of a corpus, as ``digest_file``; of a dataset, what the ``datasets`` library knows it by."""
    return {
        f"{key} {part.name}": digest_file(Path(part.name)) if Path(part.name).is_file() else part.fingerprint
        for part in corpus.parts
    }


def digest_rows(rows: Dataset) -> str:
    """A digest of the content of all rows, in order."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(json.dumps(row, default=str, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
    return f"{len(rows)} rows {found.hexdigest()}"


def digest_model(source: str) -> dict[str, str]:
    """Of each file of a model's folder, and of adapters' base; of a model on the hub, the commit in the cache."""
    folder = Path(located(source))
    if not folder.is_dir():
        with asking_hub():
            return {"": f"commit {Path(str(cached_file(source, 'config.json'))).parent.name}"}
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES and path.is_file())
    found = {path.name: digest_file(path) for path in files}
    if (adapters := adapter_folder(source)) is not None:
        found |= {f"base {adapters.base}/{name}": digest for name, digest in digest_model(adapters.base).items()}
    return found


def weights_digest(source: str) -> dict[str, str]:
    """Digests of what a model's numbers depend on, wherever that lies."""
    return of_weights(digest_model(source))


def of_weights(files: Mapping[str, str]) -> dict[str, str]:
    """The digests of those of a model's files that its numbers depend on: config, weights and code."""
    suffixes = (".safetensors", ".bin", ".py")
    return {
        name: digest
        for name, digest in files.items()
        if name.rpartition("/")[2] in ("", "config.json", ADAPTER_CONFIG) or name.endswith(suffixes)
    }


def digest_file(path: Path) -> str:
    """Of a file's size and content.

    Of one above ``READ_WHOLE`` (weights: to read all of them would take as long as to load them) blocks at even
    distances are read, both ends included. Training changes every tensor, and so some of them; a change of a few
    numbers between them is not seen. Raises UserError where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.blake2b(str(size).encode(), digest_size=16)
            if size <= READ_WHOLE:
                while block := file.read(1 << 20):
                    found.update(block)
            else:
                for sample in range(SAMPLES):
                    file.seek((size - BLOCK) * sample // (SAMPLES - 1))
                    found.update(file.read(BLOCK))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return found.hexdigest()
