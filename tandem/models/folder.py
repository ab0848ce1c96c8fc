"""Where a model lies, and one line about what is wrong with its folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from tandem.errors import UserError, first_line, nearest
from tandem.hub import asking_hub
from tandem.models.lora.folder import adapter_folder
from tandem.models.trusted import trusted_as

WRONG_FILES = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, IndexError, EOFError)
"""What transformers and torch raise for a folder's damaged or foreign files, besides classes of their own."""
_LACKING = re.compile(r"Unrecognized configuration class <class 'transformers_modules\..*?(\w+)'> .*: (\w+)\.")
"""What transformers says of a model's own code that gives it no class of one kind."""


def located(source: str | Path) -> str:
    """The folder with ``~`` resolved, or the hub name as it is."""
    return trusted_as(source, str(Path(source).expanduser()) if str(source).startswith("~") else str(source))


def with_config(source: str | Path) -> str:
    """Where the config of a model lies: in its folder, and for a folder of adapters that has none, in their base's."""
    found = adapter_folder(source)
    if found is None or (found.folder / "config.json").is_file():
        return located(source)
    return located(trusted_as(source, found.base))


def with_tokenizer(source: str | Path) -> str:
    """Where its tokenizer lies: likewise."""
    found = adapter_folder(source)
    if found is None or (found.folder / "tokenizer_config.json").is_file():
        return located(source)
    return located(trusted_as(source, found.base))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and notes, which tear up a live display."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@contextmanager
def readable_errors(source: str | Path, what: str) -> Iterator[None]:
    """One line instead of the several screens that transformers prints for a wrong name or a damaged file."""
    if (adapters := adapter_folder(source)) is not None:
        base = Path(located(adapters.base))
        if base.is_absolute() and not base.is_dir():
            raise UserError(f"{source}: adapters of {base}, which is no folder{nearest(base, Path.is_dir)}")
    path = Path(with_config(source))
    looks_local = path.is_absolute() or str(source).startswith(".") or path.exists()
    if looks_local and not path.is_dir():
        raise UserError(f"no model folder {source}{nearest(path, Path.is_dir)}")
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"{source}: {_no_model(path)}")
    out_of_reach = ""
    try:
        # "Some weights were newly initialized" is an error, or is said in our own words.
        with quiet_transformers(), nullcontext("") if looks_local else asking_hub() as out_of_reach:
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{source}: its .bin weights are damaged or hold more than tensors, and torch refuses to read them; "
            "give safetensors"
        ) from error
    except (*WRONG_FILES, SafetensorError) as error:
        if "custom code" in first_line(error):
            raise UserError(
                f"{source}: it comes with Python code of its own, which is run for those alone who say so: read it, "
                "and give --trust-remote-code"
            ) from error
        if lacking := _LACKING.match(first_line(error)):
            config, auto = lacking.groups()
            raise UserError(
                f"{source}: its own code has no {auto} of its {config}, which a {what} is made of; add {auto}.register("
                f"{config}, CLASS) to the code, or use another model"
            ) from error
        hub = f"none in the hub's cache, and {out_of_reach}" if out_of_reach else "and not on the hub"
        where = "in that folder" if looks_local else f"no folder of that name here{nearest(path, Path.is_dir)}, {hub}"
        raise UserError(f"{source}: cannot load a {what} ({where}): {first_line(error)}") from error


def _no_model(path: Path) -> str:
    """Why a folder without a config.json is no model, and which one is meant."""
    if (path / "model" / "config.json").is_file():
        return f"the folder of a run, not of a model; did you mean {path / 'model'}?"
    if (path / "checkpoints").is_dir():
        return "the folder of a run that has not finished, so it holds no model yet; go on with it: --resume"
    if path.parent.name == "checkpoints" and (path / "manifest.json").is_file():
        return f"a checkpoint of a run, not a model; 'tandem export --model {path} --out DIR' makes one of it"
    return "no config.json in it, so it is no Hugging Face model folder"
