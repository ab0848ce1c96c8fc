"""Finds the reward function that a run names, in a file or an importable module, and the files that it is made of."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tandem.errors import UserError, kind_of

_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of what pip installs."""


def import_function(source: str) -> tuple[Callable[..., Any], ModuleType]:
    """``FILE.py:function`` or ``package.module:function`` imported, and its module.

    A file is imported under a name of its own; while it loads, its folder (for a module, the working directory) is
    importable. Raises UserError where the file, the module or the function is missing (the nearest name is given)
    and where the import fails (the cause and the line).
    """
    place, _, name = source.rpartition(":")
    module = _load_file(Path(place).expanduser()) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if function is None:
        present = sorted(
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        )
        near = difflib.get_close_matches(name, present, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{place}: no function {name!r}; {hint}functions present: {', '.join(present) or 'none'}")
    if inspect.isclass(function) or not callable(function):
        raise UserError(f"{place}: {name!r} is {kind_of(function)}, not a function")
    return function, module


def shortened(text: str, limit: int = 100) -> str:
    """The text, or its two ends with … between them."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    message = " ".join(str(error).split())
    return shortened(f"{type(error).__name__}: {message}" if message else type(error).__name__, 300)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{path}: no such file (the reward function's)")
    path = path.resolve()
    name = f"tandem_reward_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not importable as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    with _importable(path.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's code may raise anything
            del sys.modules[name]
            raise UserError(f"{_error_place(error, path)}: import failed: {one_line(error)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except Exception as error:  # the user's code may raise anything
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                others = "a reward that is no function begins with http://, https://, judge: or format:"
                raise UserError(f"no module named {error.name!r} (for the function of {name!r}; {others})") from error
            spec = importlib.util.find_spec(name)
            place = _error_place(error, Path(spec.origin)) if spec and spec.origin else name
            raise UserError(f"{place}: import failed: {one_line(error)}") from error


def _error_place(error: Exception, path: Path) -> str:
    """The line of ``path`` where its import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def source_files(module: ModuleType) -> dict[str, Path]:
    """A module's own file under "", and under its place beside it each file that the module uses, also through others.

    Those in the module's folder count, or in its package, if it has one. What is installed does not, nor what a
    function imports when it is called.
    """
    root = _root(module)
    files: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        file = _file(one)
        if one.__name__ in seen or file is None or root is None or (one is not module and not _beside(file, root)):
            continue
        seen.add(one.__name__)
        files["" if one is module else str(file.relative_to(root))] = file
        for value in list(vars(one).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name in sys.modules:
                waiting.append(sys.modules[name])
    return dict(sorted(files.items()))


def _root(module: ModuleType) -> Path | None:
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    folders = list(getattr(top, "__path__", []))
    file = _file(module)
    return Path(folders[0]).resolve() if folders else file and file.parent


def _file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _beside(file: Path, root: Path) -> bool:
    if root.name in _INSTALLED or not file.is_relative_to(root):
        return False
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return _INSTALLED.isdisjoint(file.relative_to(root).parts) and not file.is_relative_to(library)
