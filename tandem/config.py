"""The typed config: sections of keys, read from YAML and flags by one parser, written back, and explained.

A command's config is a dataclass of sections (``run: RunSection``, ``model: ModelSection``, its algorithm's own
knobs). Keys are flat: ``learning_rate: 1e-5`` in a file and ``--learning-rate 1e-5`` on the command line are the
same key, whatever section holds it. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tandem import __version__
from tandem.errors import UserError

Config = TypeVar("Config")
ONE_START = {"one_start": True}
"""Metadata of a key that concerns one start of a run, and so is not written to the run's config."""
PREFIXED = {"prefixed": True}
"""Metadata of a section whose keys carry its name: ``placement.actor``."""

_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_CHOICES = {bool: {"true": True, "True": True, "yes": True, "false": False, "False": False, "no": False}}
_INFINITIES = {".inf": "inf", "-.inf": "-inf"}
_NOTHING = ("None", "none", "null")


def load_config(cls: type[Config], argv: Sequence[str], *, prog: str = "tandem") -> Config:
    """The config that ``--config FILE.yaml`` and the flags after it describe. Flags win.

    ``cls`` is a dataclass whose fields are sections (dataclasses) or keys. ``--help`` prints every key and raises
    SystemExit(0). Raises UserError, in one line, for an unknown key, a value of the wrong type or out of range, and
    a required key that is missing.
    """
    keys = _keys_of(cls)
    if "--help" in argv or "-h" in argv:
        _print_help(cls, prog)
        raise SystemExit(0)
    files, flags = _read_flags(argv, keys)
    given = {name: value for file in files for name, value in _read_yaml(file, keys).items()} | flags
    values = {name: _convert_given(value, keys[name]) for name, value in given.items()}
    missing = [key for key in keys.values() if key.required and key.name not in values]
    if missing:
        wanted = "; ".join(f"{_flag(key.name)} ({key.doc})" for key in missing)
        raise UserError(f"missing {wanted}")
    try:
        return _build(cls, values)
    except UserError as error:
        name, colon, problem = str(error).partition(": ")
        where = given[name].where if colon and name in given else name
        raise UserError(f"{where}{colon}{problem}") from None


def dump_config(config: Any) -> str:
    """Flat YAML of every key with its value, which ``load_config`` reads back to an equal config.

    Keys that concern one start only (``resume``, ``overwrite``, ``dry_run``) are left out.
    """
    lines = [
        f"# The resolved config of a run with Tandem {__version__}. To repeat it: --config THIS_FILE --out NEW_FOLDER"
    ]
    for title, section in _sections(config):
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        dumped = yaml.safe_dump(plain, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**9)
        lines += ["", f"# {title}", dumped.rstrip("\n")]
    return "\n".join(lines) + "\n"


def describe(config: Any) -> str:
    """Every key with its value, under the name of its section, for a person to read."""
    sections = _sections(config)
    width = max(len(key) for _, section in sections for key in section)
    blocks = [
        "\n".join([title, *(f"  {key:<{width}}  {_show(value)}" for key, value in section.items())])
        for title, section in sections
    ]
    return "\n\n".join(blocks)


@dataclass(frozen=True, kw_only=True)
class _Key:
    name: str
    annotation: Any
    required: bool
    doc: str


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A value as text, and where it was written."""

    value: str | list[str] | None
    where: str


def _keys_of(cls: Any) -> dict[str, _Key]:
    """Every key of a config class. Raises TypeError where two sections have a key of the same name."""
    keys: dict[str, _Key] = {}
    hints, docs = get_type_hints(cls), _attribute_docs(cls)
    for f in fields(cls):
        required = _default(f) is MISSING
        if is_dataclass(hints[f.name]):
            inner = {
                _full_name(f, name): replace(key, name=_full_name(f, name), required=key.required and required)
                for name, key in _keys_of(hints[f.name]).items()
            }
        else:
            doc = " ".join(docs.get(f.name, "").split()).partition(". ")[0].rstrip(".")
            inner = {f.name: _Key(name=f.name, annotation=hints[f.name], required=required, doc=doc)}
        if twice := inner.keys() & keys.keys():
            raise TypeError(f"{cls.__name__}: two sections have the key {', '.join(sorted(twice))}")
        keys |= inner
    return keys


@functools.cache
def _attribute_docs(cls: Any) -> dict[str, str]:
    """The strings written below the fields of a dataclass and of those it extends."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = inspect.cleandoc(text)
    return docs


def _full_name(section: Field[Any], key: str) -> str:
    return f"{section.name}.{key}" if section.metadata.get("prefixed") else key


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _build(cls: Any, values: dict[str, Any]) -> Any:
    own: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            named = {name: _full_name(f, name) for name in _keys_of(hints[f.name])}
            inner = {name: values[full] for name, full in named.items() if full in values}
            default = _default(f)
            own[f.name] = _build(hints[f.name], inner) if default is MISSING else replace(default, **inner)
        elif f.name in values:
            own[f.name] = values[f.name]
    return cls(**own)


def _read_flags(argv: Sequence[str], keys: dict[str, _Key]) -> tuple[list[Path], dict[str, _Given]]:
    """The ``--config`` files, and every other flag. A flag's values reach up to the next ``--``."""
    files: list[Path] = []
    given: dict[str, _Given] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} stands alone; values come after the --key they belong to")
        flag, equals, joined = word.partition("=")
        texts = [joined] if equals else []
        while words and not words[0].startswith("--"):
            texts.append(words.pop(0))
        name = flag[2:].replace("-", "_")
        if name == "config":
            if not texts:
                raise UserError("--config: expected a YAML file")
            files += map(Path, texts)
            continue
        section, dot, key = name.rpartition(".")
        negated = section + dot + key.removeprefix("no_")
        if name not in keys and negated in keys and keys[negated].annotation is bool and not texts:
            name, texts = negated, ["false"]
        elif name in keys and keys[name].annotation is bool and not texts:
            texts = ["true"]
        if name not in keys:
            raise UserError(f"unknown flag {flag}{suggest(name, [*keys, 'config'], _flag)}")
        given[name] = _Given(value=texts[0] if len(texts) == 1 else texts, where=flag)
    return files, given


def _read_yaml(path: Path, keys: dict[str, _Key]) -> dict[str, _Given]:
    """A file's keys with their lines. Scalars stay as written, so that YAML's own idea of types does not matter."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected lines of 'key: value'")
    given: dict[str, _Given] = {}
    for key_node, value_node in root.value:
        name, place = str(key_node.value).replace("-", "_"), f"{path}:{key_node.start_mark.line + 1}"
        if name not in keys:
            raise UserError(f"{place}: unknown key {key_node.value}{suggest(name, keys, str)}")
        if name in given:
            raise UserError(f"{place}: {name} is given a second time; keep one of the two")
        given[name] = _Given(value=_text_of(value_node, f"{place}: {name}"), where=f"{place}: {name}")
    return given


def _text_of(node: yaml.Node, where: str) -> str | list[str] | None:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    raise UserError(f"{where}: expected a value or a list of values; keys are flat, not nested")


def _convert_given(given: _Given, key: _Key) -> Any:
    try:
        return _convert(given.value, key.annotation)
    except ValueError:
        got = f"[{', '.join(given.value)}]" if isinstance(given.value, list) else given.value
        shown = repr(got) if given.value else "nothing"
        raise UserError(f"{given.where}: expected {_expected(key.annotation)}, got {shown}") from None


def _convert(value: str | list[str] | None, annotation: Any) -> Any:
    """The value that a text stands for. Raises ValueError where it is not of the type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return None if value is None or value in _NOTHING else _convert(value, _without_none(annotation))
    if origin is tuple:
        items = [value] if isinstance(value, str) else value or []
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0]) for item in items)
        return tuple(_convert(item, inner) for item, inner in zip(items, arguments, strict=True))
    if not isinstance(value, str):
        raise ValueError(value)
    choices = {str(choice): choice for choice in arguments} if origin is Literal else _CHOICES.get(annotation)
    if choices is not None:
        if value not in choices:
            raise ValueError(value)
        return choices[value]
    if annotation is float:
        value = _INFINITIES.get(value.lower(), value)
        if math.isnan(float(value)):
            raise ValueError(value)
    return annotation(value)


def _expected(annotation: Any) -> str:
    """The type in words: what a message asks for."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return f"{_expected(_without_none(annotation))} or none"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        many = "a list, each" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}, each"
        return f"{many} {_expected(arguments[0])}"
    return _TYPES[annotation]


def _without_none(annotation: Any) -> Any:
    (inner,) = (argument for argument in get_args(annotation) if argument is not types.NoneType)
    return inner


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def suggest(name: str, names: Iterable[str], show: Callable[[str], str] = str) -> str:
    """``; did you mean X?`` for the nearest of ``names``: those with these initials (lr), or the likest spelling."""
    pool = list(names)
    near = [known for known in pool if "".join(word[:1] for word in known.split("_")) == name]
    near = near or difflib.get_close_matches(name, pool, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(map(show, near))}?" if near else "; --help lists them"


def _sections(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, keys and values) of each section of a config; the keys that are in none come first."""
    loose: dict[str, Any] = {}
    sections: list[tuple[str, dict[str, Any]]] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            kept = [inner for inner in fields(value) if not inner.metadata.get("one_start")]
            if kept:
                sections.append((f.name, {_full_name(f, inner.name): getattr(value, inner.name) for inner in kept}))
        else:
            loose[f.name] = value
    return [("options", loose), *sections] if loose else sections


def _show(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_help(cls: Any, prog: str) -> None:
    """Every key with its type, meaning and default, by section."""
    # Imported here because only --help needs it, and it takes longer than reading a config.
    import tyro

    print(f"{inspect.getdoc(cls)}\n\nEvery key can also stand in a YAML file: {prog} --config FILE.yaml. Flags win.\n")
    tyro.cli(for_tyro(cls), prog=prog, description="", args=["--help"])


def for_tyro(cls: Any) -> Any:
    """The config class as tyro must see it: keys without the name of their section, but for prefixed ones."""
    import tyro

    hints = get_type_hints(cls)
    marked = [
        (
            f.name,
            hints[f.name] if f.metadata.get("prefixed") else Annotated[hints[f.name], tyro.conf.OmitArgPrefixes],
            field(default=f.default) if f.default_factory is MISSING else field(default_factory=f.default_factory),
        )
        for f in fields(cls)
    ]
    return make_dataclass(cls.__name__, marked, kw_only=True, frozen=True)
