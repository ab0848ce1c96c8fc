"""The Python files that a reward function is made of."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of what pip installs."""


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
