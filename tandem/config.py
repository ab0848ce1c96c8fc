"""The typed config: sections of keys, read from YAML and flags by one parser, written back, and explained.

A command's config is a dataclass of sections (``run: RunSection``, ``model: ModelSection``, its method's own
knobs). Keys are flat: ``learning_rate: 1e-5`` in a file and ``--learning-rate 1e-5`` on the command line are the
same key, whatever section holds it. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import math
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, make_dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tandem.errors import UserError
from tandem.flags import Given, Key, Owners, flag_of, read_flags, read_yaml
from tandem.keys import said_of
from tandem.version import __version__

log = logging.getLogger("tandem")
Config = TypeVar("Config")
Section = TypeVar("Section")
INDENT = 28
"""Columns before the help of a key."""

_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
_CHOICES = {bool: {"true": True, "True": True, "yes": True, "false": False, "False": False, "no": False}}
_INFINITIES = {".inf": "inf", "-.inf": "-inf"}
_NOTHING = ("None", "none", "null")
_UNSET = (None, "", "0", "0m", "none", 0, ())


def section_class(name: str, keys: Mapping[str, tuple[Any, Any, str]], base: type[Section]) -> type[Section]:
    """``base`` with more keys, each with its type, its ``dataclasses.field`` and its help."""
    named = [(key, annotation, declared) for key, (annotation, declared, _) in keys.items()]
    namespace = {"__doc__": base.__doc__, "_docs": {key: doc for key, (_, _, doc) in keys.items()}}
    return make_dataclass(name, named, bases=(base,), namespace=namespace, frozen=True, kw_only=True)


def settings(config: Any) -> dict[str, Any]:
    """Every key of a config, or of a section, with its value. Not those that concern one start."""
    return {name: value for name, f, value in _values(config) if not f.metadata.get("one_start")}


def with_keys(section: Section, **values: Any) -> Section:
    """The section with other values of these keys, those of dataclasses in it included: what ``replace`` is to fields.

    Raises TypeError where it has no such key, and what the dataclasses raise of a value.
    """
    if unknown := values.keys() - _keys_of(type(section)):
        raise TypeError(f"{type(section).__name__} has no key {', '.join(sorted(unknown))}")
    changes: dict[str, Any] = {}
    for f in fields(section):  # type: ignore[arg-type]
        own = getattr(section, f.name)
        if not is_dataclass(own):
            changes |= {f.name: values[f.name]} if f.name in values else {}
        elif inner := _inner(f, type(own), values):
            changes[f.name] = with_keys(own, **inner)
    return replace(section, **changes)  # type: ignore[type-var]


def key_names(cls: Any) -> list[str]:
    """The full name of every key of a config class."""
    return [*_keys_of(cls)]


def given_values(cls: Any, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``--config`` files say, and what flags do: keys by their full names with values. Raises UserError."""
    keys = _keys_of(cls)
    in_files, in_flags = (
        {name: _convert_given(value, keys[name]) for name, value in given.items()} for given in _read(cls, keys, argv)
    )
    return in_files, in_flags


def load_config(cls: type[Config], argv: Sequence[str], *, prog: str = "tandem") -> Config:
    """The config that ``--config FILE.yaml`` and the flags after it describe. Flags win.

    ``cls`` is a dataclass whose fields are sections (dataclasses) or keys; ``cls.implied(given)``, if it has that, are
    defaults that follow from what is given, ``cls.inherited()`` keys that are another run's and need no effect, and
    ``cls.owners(name)`` the commands that have a key of that name. ``--help`` prints every key and raises
    SystemExit(0).

    Raises UserError, in one line, for an unknown key, a value of the wrong type or out of range, a required key that is
    missing, and a flag that would have no effect (see ``tandem.keys.needs``). Of a file such a
    key is said and passed over: one file serves a laptop and a cluster, and flags change what it is about.
    """
    keys = _keys_of(cls)
    if "--help" in argv or "-h" in argv:
        _print_help(cls, prog)
        raise SystemExit(0)
    in_files, flags = _read(cls, keys, argv)
    given = in_files | flags
    values = {name: _convert_given(value, keys[name]) for name, value in given.items()}
    implied: dict[str, Any] = getattr(cls, "implied", lambda given: {})(values)
    missing = [key for key in keys.values() if key.required and key.name not in values]
    if missing:
        wanted = "; ".join(f"{flag_of(key.name)} ({key.doc.partition('. ')[0].rstrip('.')})" for key in missing)
        raise UserError(f"missing {wanted}")
    try:
        values = implied | values
        config = _build(cls, values)
        inherited: Collection[str] = getattr(cls, "inherited", list)()
        for name, value in values.items():
            if name not in given or name in inherited or value == keys[name].default:
                continue
            if not (idle := _no_effect(keys[name], config)):
                continue
            if name in flags:
                raise UserError(f"{name}: {idle}")
            log.warning("%s: %s", given[name].where, idle)
        return config
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


def changeable(config: Any) -> dict[str, str]:
    """The keys of a config that may change when its run is resumed, each with the reason against it, or "" for none.

    A key that says nothing about itself (``MAY_CHANGE``, ``may_change``) must stay as it was.
    """
    keys = _keys_of(type(config)).items()
    return {name: key.metadata["may_change"](config) for name, key in keys if "may_change" in key.metadata}


def paths_read(config: Any) -> dict[str, tuple[str, ...]]:
    """Files and folders that it names and that are read, by key; what is written is a key that may change (``out``)."""
    named = ((name, x) for name, f, x in _values(config) if f.metadata.get("path") and "may_change" not in f.metadata)
    return {name: x if isinstance(x, tuple) else (x,) for name, x in named if x}


def default_settings(config: Any) -> dict[str, Any]:
    """The keys of a config that need not be given, each with the value that it has then."""
    cls = type(config)
    implied: dict[str, Any] = getattr(cls, "implied", lambda given: {})(settings(config))
    return {name: key.default for name, key in _keys_of(cls).items() if not key.required} | implied


def describe(config: Any, without: Collection[str] = ()) -> str:
    """Every key with its value, under the name of its section, for a person to read; but for those ``without``."""
    sections = {title: keys for title, section in _sections(config) if (keys := {*section} - {*without})}
    width, values = max(map(len, set().union(*sections.values()))), settings(config)
    blocks = [
        "\n".join([title, *(f"  {key:<{width}}  {_show(values[key])}" for key in values if key in keys)])
        for title, keys in sections.items()
    ]
    return "\n\n".join(blocks)


def _read(cls: Any, keys: dict[str, Key], argv: Sequence[str]) -> tuple[dict[str, Given], dict[str, Given]]:
    """What the ``--config`` files say, the last of them that has a key, and what the other flags do."""
    owners: Owners = getattr(cls, "owners", lambda name: ())
    files, flags = read_flags(argv, keys, owners)
    sections = {name: [*_keys_of(hint)] for name, hint in _hints_of(cls).items() if is_dataclass(hint)}
    return {name: value for file in files for name, value in read_yaml(file, keys, sections, owners).items()}, flags


def _keys_of(cls: Any) -> dict[str, Key]:
    """Every key of a config class. Raises TypeError where two sections have a key of the same name."""
    keys: dict[str, Key] = {}
    hints, docs, said = _hints_of(cls), _attribute_docs(cls), said_of(cls)
    for f in fields(cls):
        default = _default(f)
        required = default is MISSING
        if is_dataclass(hints[f.name]):
            inner = {
                _full_name(f, name): replace(
                    key,
                    name=_full_name(f, name),
                    required=key.required and required,
                    default=key.default if required else {inner: value for inner, _, value in _values(default)}[name],
                )
                for name, key in _keys_of(hints[f.name]).items()
            }
        else:
            doc = " ".join(docs.get(f.name, "").split())
            key = Key(f.name, hints[f.name], required=required, doc=doc, default=default, metadata=said[f.name])
            inner = {f.name: key}
        if twice := inner.keys() & keys.keys():
            raise TypeError(f"{cls.__name__}: two sections have the key {', '.join(sorted(twice))}")
        keys |= inner
    return keys


_hints_of: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""The types of a class's fields. To read them anew each time takes longer than to read a command's flags."""


def _attribute_docs(cls: Any) -> dict[str, str]:
    """The strings written below the fields of a dataclass and of those it extends."""
    return {name: doc for base in reversed(cls.__mro__) for name, doc in _own_docs(base).items()}


@functools.cache
def _own_docs(cls: Any) -> dict[str, str]:
    """Those below its own fields."""
    docs: dict[str, str] = dict(vars(cls).get("_docs", {}))
    if "__dataclass_fields__" not in vars(cls) or "_docs" in vars(cls):
        return docs
    definition = _classes_of(cls.__module__).get(cls.__qualname__)
    if definition is None:  # within a function
        (alone,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(alone, ast.ClassDef)
        definition = alone
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


@functools.cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The statements that define a module's classes, by name. ``inspect`` reads the module anew for each class."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _full_name(section: Field[Any], key: str) -> str:
    return f"{section.name}.{key}" if section.metadata.get("prefixed") else key


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _build(cls: Any, values: dict[str, Any]) -> Any:
    own: dict[str, Any] = {}
    hints = _hints_of(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            inner, default = _inner(f, hints[f.name], values), _default(f)
            own[f.name] = _build(hints[f.name], inner) if default is MISSING else with_keys(default, **inner)
        elif f.name in values:
            own[f.name] = values[f.name]
    return cls(**own)


def _inner(f: Field[Any], cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are of keys of a field's dataclass, by the names that they have in it."""
    named = {name: _full_name(f, name) for name in _keys_of(cls)}
    return {name: values[full] for name, full in named.items() if full in values}


def _no_effect(key: Key, config: Any) -> str:
    """Why a key has no effect in this config; nothing where it has one."""
    given = settings(config)
    for other, *values in key.metadata.get("needs", ()):
        if other == "part" and not set(values) & set(config.parts):
            return f"has no effect, since this run has no {' and no '.join(values)}"
        if other not in given:
            continue
        found = given[other]
        if not values and found in _UNSET:
            return f"has no effect without {flag_of(other)}"
        if values and found not in values:
            other_value = " or ".join(map(_show, values))
            return f"has no effect with {flag_of(other)} {_show(found)}; give {flag_of(other)} {other_value}"
    return ""


def _convert_given(given: Given, key: Key) -> Any:
    value = given.value
    if key.metadata.get("path"):
        value = None if get_origin(key.annotation) is tuple and value in _NOTHING else value
        value = [expanduser(text) for text in value] if isinstance(value, list) else value and expanduser(value)
    try:
        converted = _convert(value, key.annotation)
        if isinstance(converted, int) and not -(2**63) <= converted < 2**63:
            raise UserError(f"{given.where}: expected a whole number of at most 64 bits, got {given.value!r}")
        numbers = converted if isinstance(converted, tuple) else (converted,)
        if {math.inf, -math.inf} & {*numbers} and not key.metadata.get("infinite"):
            raise UserError(f"{given.where}: expected a finite number, got {given.value!r}")
        return converted
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


def _values(config: Any) -> Iterator[tuple[str, Field[Any], Any]]:
    """(full name, field, value) of each key of a config or section."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from ((_full_name(f, name), inner, x) for name, inner, x in _values(value))
        else:
            yield f.name, f, value


def _sections(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, keys and values) of each section of a config that has keys."""
    sections = [(f, settings(getattr(config, f.name))) for f in fields(config)]
    return [(f.name, {_full_name(f, name): x for name, x in keys.items()}) for f, keys in sections if keys]


def _show(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_help(cls: Any, prog: str) -> None:
    """Every key with its type, meaning and default, by section."""
    width, keys, hints = max(60, min(100, shutil.get_terminal_size().columns)), _keys_of(cls), _hints_of(cls)
    print(f"{inspect.getdoc(cls)}\n\nusage: {prog} [--config FILE.yaml] [--key value ...]")
    print(f"Every key can also stand in a YAML file: {prog} --config FILE.yaml. Flags win.")
    for f in fields(cls):
        about = " ".join((inspect.getdoc(hints[f.name]) or "").split())
        print("", textwrap.fill(f"{f.name.replace('_', ' ')}: {about}", width), sep="\n")
        for key in (keys[_full_name(f, name)] for name in _keys_of(hints[f.name])):
            known = "required" if key.required else f"default: {_show(key.default) or 'empty'}"
            head, lines = f"  {_flag_shown(key)}", textwrap.wrap(f"{key.doc} ({known})", width - INDENT)
            if len(head) < INDENT - 1:
                head = head.ljust(INDENT) + lines.pop(0)
            print(head, *(" " * INDENT + line for line in lines), sep="\n")


def _flag_shown(key: Key) -> str:
    """A flag with what comes after it: ``--learning-rate FLOAT``."""
    flag, annotation = flag_of(key.name), key.annotation
    if type(None) in get_args(annotation):
        annotation = _without_none(annotation)
    if annotation is bool:
        section, dot, name = flag.removeprefix("--").rpartition(".")
        return f"--{section}{dot}[no-]{name}"
    several = get_origin(annotation) is tuple
    inner = get_args(annotation)[0] if several else annotation
    choices = get_args(inner)
    wanted = "{" + ",".join(map(str, choices)) + "}" if choices else inner.__name__.upper()
    return f"{flag} {wanted}{' ...' * several}"
