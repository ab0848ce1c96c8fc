"""A reward function is found by file or module, and what hinders it is said with file and line."""

import sys

import pytest

from tandem.errors import UserError
from tandem.rewards.function import load_reward
from tandem.rewards.loading import import_function


def refused(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_reward(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, text):
    path.write_text(text)
    return path


def test_files_import_their_neighbours_and_leave_no_trace_on_the_path(tmp_path) -> None:
    write(tmp_path / "neighbour_of_reward.py", "VALUE = 3.0\n")
    file = write(
        tmp_path / "mine.py",
        "from dataclasses import dataclass\nfrom neighbour_of_reward import VALUE\n\n"
        "@dataclass\nclass A:\n    x: int = 0\n\n"
        "def score(completions):\n    return [VALUE for _ in completions]\n",
    )
    before = list(sys.path)
    load_reward(f"{file}:score")
    assert sys.path == before
    assert "mine" not in sys.modules


def test_files_of_the_same_name_do_not_meet(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "reward.py", f"def f(completions):\n    return '{name}'\n")
    (first, _), (second, _) = (import_function(f"{tmp_path}/{name}/reward.py:f") for name in ("a", "b"))
    assert [function([]) for function in (first, second)] == ["a", "b"]


def test_modules_from_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "some_package_of_rewards").mkdir()
    write(tmp_path / "some_package_of_rewards" / "length.py", "def f(completions):\n    return []\n")
    write(tmp_path / "some_package_of_rewards" / "broken.py", "x = 1\nimport not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("some_package_of_rewards.length:f").name == "f"
    assert refused("some_package_of_rewards.wrong:f").startswith("no module named 'some_package_of_rewards.wrong'")
    assert refused("nowhere_to_be_found.x:f").startswith("no module named 'nowhere_to_be_found'")
    message = refused("some_package_of_rewards.broken:f")
    assert message.startswith(f"{tmp_path}/some_package_of_rewards/broken.py:2: import failed: ModuleNotFoundError")


def test_missing_files_and_functions(tmp_path) -> None:
    assert refused(f"{tmp_path}/none.py:f") == f"{tmp_path}/none.py: no such file (the reward function's)"
    file = write(
        tmp_path / "mine.py",
        "from math import sqrt\nfrom textwrap import dedent\nLIMIT = 3\nclass Judge: pass\n"
        "def accuracy(completions): ...\ndef length(completions): ...\ndef _own(): ...\n",
    )
    assert refused(f"{file}:acuracy") == (
        f"{file}: no function 'acuracy'; did you mean 'accuracy'? functions present: accuracy, length"
    )
    assert refused(f"{file}:zzz").endswith("no function 'zzz'; functions present: accuracy, length")
    assert "'LIMIT' is an int, not a function" in refused(f"{file}:LIMIT")
    assert "'Judge' is a type, not a function" in refused(f"{file}:Judge")


@pytest.mark.parametrize("source", ["", "mine.py", ":f", "mine.py:"])
def test_the_way_to_write_it_is_said(source) -> None:
    assert "expected FILE.py:function" in refused(source)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = 1\nimport not_there_at_all\n", 2, "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def f(:\n", 1, "SyntaxError"),
        ("import json\n\n\nTABLE = json.loads('{')\n", 4, "JSONDecodeError"),
        ("raise RuntimeError('two\\nlines')\n", 1, "RuntimeError: two lines"),
    ],
)
def test_failed_imports_name_cause_and_line(tmp_path, text, line, words) -> None:
    file = write(tmp_path / "mine.py", text)
    modules = set(sys.modules)
    message = refused(f"{file}:f")
    assert message.startswith(f"{file}:{line}: import failed: ")
    assert words in message
    assert not {name for name in set(sys.modules) - modules if name.startswith("tandem_reward")}
