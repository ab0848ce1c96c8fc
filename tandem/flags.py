"""What is written in flags and YAML files: keys with their values as text, and where each stands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml

from tandem.errors import UserError, listed


@dataclass(frozen=True)
class Key:
    """A key of a config, with its full name."""

    name: str
    annotation: Any
    _: KW_ONLY
    required: bool
    doc: str
    default: Any
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value as text, and where it was written."""

    value: str | list[str] | None
    where: str


Owners = Callable[[str], Sequence[str]]
"""The commands that have a key of this name, where another one has not."""


def read_flags(
    argv: Sequence[str], keys: dict[str, Key], owners: Owners = lambda name: ()
) -> tuple[list[Path], dict[str, Given]]:
    """The ``--config`` files, and every other flag. A flag's values reach up to the next ``--``."""
    files: list[Path] = []
    given: dict[str, Given] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} stands alone; values come after the --key they belong to")
        flag, equals, joined = word.partition("=")
        texts = [joined] if equals else []
        while words and not words[0].startswith("--"):
            texts.append(_value_of(words.pop(0), flag, keys))
        name = flag[2:].replace("-", "_")
        if name == "config":
            if not texts:
                raise UserError("--config: expected a YAML file")
            files += [Path(text).expanduser() for text in texts]
            continue
        section, dot, key = name.rpartition(".")
        negated = section + dot + key.removeprefix("no_")
        if name not in keys and negated in keys and keys[negated].annotation is bool and not texts:
            name, texts = negated, ["false"]
        elif name in keys and keys[name].annotation is bool and not texts:
            texts = ["true"]
        if name not in keys:
            known = key if key in keys else name
            raise UserError(f"unknown flag {flag}{suggest(known, [*keys, 'config'], flag_of, owners)}")
        value = texts[0] if len(texts) == 1 else texts
        if name in given:
            value = _both(given[name].value, value, flag, keys[name])
        given[name] = Given(value=value, where=flag)
    return files, given


def _value_of(word: str, flag: str, keys: dict[str, Key]) -> str:
    """The word, as a value of ``flag``. Raises UserError for a flag that has lost a dash."""
    if re.match("-[A-Za-z]", word) and word.lower() != "-inf":
        name = word[1:].partition("=")[0].replace("-", "_")
        raise UserError(
            f"unknown flag {word}{suggest(name, keys, flag_of)} (flags begin with two dashes; as a value of {flag}, "
            f"write {flag}={word})"
        )
    return word


def _both(first: Any, second: Any, flag: str, key: Key) -> Any:
    """What a flag means that is given twice: lists go on. Raises UserError for two values where one is wanted."""
    if get_origin(key.annotation) is tuple:
        return [*([first] if isinstance(first, str) else first), *([second] if isinstance(second, str) else second)]
    if first != second:
        raise UserError(f"{flag}: given twice, {first} and {second}; keep one of the two")
    return second


def read_yaml(
    path: Path, keys: dict[str, Key], sections: Mapping[str, list[str]], owners: Owners = lambda name: ()
) -> dict[str, Given]:
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
    given: dict[str, Given] = {}
    for key_node, value_node in root.value:
        name, place = str(key_node.value).replace("-", "_"), f"{path}:{key_node.start_mark.line + 1}"
        if name not in keys:
            full = [key for inner in sections.get(name, ()) for key in (inner, f"{name}.{inner}") if key in keys]
            hint = f"; keys are flat, so write {full[0]}: … by itself, and so on" if full else ""
            hint = hint or suggest(name, keys, owners=owners)
            raise UserError(f"{place}: unknown key {key_node.value}{hint}")
        if name in given:
            raise UserError(f"{place}: {name} is given a second time; keep one of the two")
        given[name] = Given(value=_text_of(value_node, f"{place}: {name}"), where=f"{place}: {name}")
    return given


def _text_of(node: yaml.Node, where: str) -> str | list[str] | None:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    raise UserError(f"{where}: expected a value or a list of values; keys are flat, not nested")


def flag_of(name: str) -> str:
    """The flag of a key: ``--learning-rate``."""
    return "--" + name.replace("_", "-")


THEIRS = {
    "batch_size": ["prompts_per_step"],
    "beta": ["kl_coef"],
    "dataset_name": ["data"],
    "eval_steps": ["eval_every"],
    "generate_max_len": ["max_new_tokens"],
    "gradient_checkpointing": ["activation_checkpointing"],
    "init_kl_coef": ["kl_coef"],
    "lora_r": ["lora.rank"],
    "max_completion_length": ["max_new_tokens"],
    "max_seq_length": ["max_length"],
    "max_steps": ["steps"],
    "model_name_or_path": ["model"],
    "n_samples_per_prompt": ["samples_per_prompt"],
    "num_generations": ["samples_per_prompt"],
    "num_train_epochs": ["epochs"],
    "output_dir": ["out"],
    "per_device_train_batch_size": ["batch_size", "prompts_per_step"],
    "prompts_per_step": ["batch_size"],
    "report_to": ["track"],
    "reward_funcs": ["reward"],
    "save_steps": ["save_every"],
    "save_total_limit": ["keep"],
    "warmup_ratio": ["warmup_steps"],
}
"""Names that somebody may bring along, from TRL, OpenRLHF or another command, with ours, however they are spelled."""


def suggest(name: str, names: Iterable[str], show: Callable[[str], str] = str, owners: Owners = lambda name: ()) -> str:
    """``; did you mean X?`` for the nearest of ``names``: called so elsewhere, with these initials, or the likest.

    One that others have (``owners``), and that is called otherwise nowhere, is said to be theirs instead.
    """
    pool = list(names)
    near = [known for known in THEIRS.get(name, ()) if known in pool]
    if not near and (others := owners(name)):
        return f", which is one of {listed(others)}; leave it out"
    near = near or [known for known in pool if "".join(word[:1] for word in known.split("_")) == name]
    near = near or difflib.get_close_matches(name, pool, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(map(show, near))}?" if near else "; --help lists them"
