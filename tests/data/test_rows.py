"""Dataset come from every kind of source, and every fault is named by file, line and column."""

import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tandem.data.rows import load_rows, require_column
from tandem.errors import UserError

ROWS = [{"prompt": "2+2=", "answer": 4}, {"prompt": "3+3=", "answer": 6}]


def refused(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl_skips_empty_lines_and_keeps_line_numbers(tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", '\ufeff{"prompt": "a"}\r\n\n  \n{"prompt": "\u00e9\u2028b"}')
    rows = load_rows(str(file))
    assert list(rows) == [{"prompt": "a"}, {"prompt": "é\u2028b"}]
    assert [rows.where(i) for i in range(2)] == [f"{file}:1", f"{file}:4"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps(ROWS), [1, 1]),
        (json.dumps(ROWS, indent=1), [2, 6]),
        ("\n".join(map(json.dumps, ROWS)), [1, 2]),
        ("\n\n" + "\n".join(json.dumps(r, indent=2) for r in ROWS), [3, 7]),
    ],
)
def test_json_array_or_values_with_the_line_each_begins_on(tmp_path, text, lines) -> None:
    file = write(tmp_path / "a.json", text)
    rows = load_rows(str(file))
    assert list(rows) == ROWS
    assert [rows.where(i) for i in range(2)] == [f"{file}:{line}" for line in lines]


def test_parquet_counts_rows(tmp_path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    rows = load_rows(str(file))
    assert list(rows) == ROWS
    assert rows.where(1) == f"{file} row 2"


def test_globs_are_read_in_order_of_name(tmp_path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name}))
    assert [row["prompt"] for row in load_rows(f"{tmp_path}/*.jsonl")] == ["a", "b"]
    assert "no file matches" in refused(f"{tmp_path}/*.parquet")


def test_a_folder_gives_the_split_asked_for(tmp_path) -> None:
    for name in ("train-0", "train-1", "test", "training_notes"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name}))
    assert [row["prompt"] for row in load_rows(str(tmp_path))] == ["train-0", "train-1"]
    assert [row["prompt"] for row in load_rows(str(tmp_path), split="test")] == ["test"]
    message = refused(tmp_path, split="validation")
    assert "'validation'" in message
    assert "test.jsonl" in message


def test_a_folder_without_splits_is_read_whole(tmp_path) -> None:
    assert "holds no" in refused(tmp_path)
    for name in ("x", "y"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name}))
    assert len(load_rows(str(tmp_path))) == 2


def test_saved_datasets(tmp_path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(load_rows(str(tmp_path / "one"))) == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "many")
    assert list(load_rows(str(tmp_path / "many"))) == ROWS
    assert "splits present: 'train'" in refused(tmp_path / "many", split="dev")


def test_hub_names(monkeypatch) -> None:
    asked = []

    def load_dataset(name, config, *, split, data_dir):
        asked.append((name, config, split, data_dir))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("openai/gsm8k:main", split="test")
    assert list(rows) == ROWS
    load_rows("owner/name@sub")
    assert asked == [("openai/gsm8k", "main", "test", None), ("owner/name", None, "train", "sub")]
    assert rows.where(0) == "openai/gsm8k:main[test] row 1"
    assert refused("nobody/nothing").endswith("Dataset 'nobody/nothing' doesn't exist")


def test_missing_file_names_the_nearest(tmp_path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    assert refused(tmp_path / "trian.jsonl") == (
        f"{tmp_path}/trian.jsonl: no such file; did you mean {tmp_path}/train.jsonl?"
    )
    assert "no such file" in refused(tmp_path / "nowhere" / "x.parquet")
    os.mkfifo(tmp_path / "pipe")  # a shell's <(...) is one as well
    for source in ("/dev/null", tmp_path / "pipe"):
        assert refused(source).startswith(f"{source}: a pipe or a device")


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', 3, "malformed JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "must be a JSON object, not a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', 2, "not UTF-8 (byte 0xe9)"),
        ("a.json", '[{"a": 1},\n {"a" 1}]', 2, "malformed JSON: Expecting ':' delimiter at column 7"),
        ("a.json", '[{"a": 1}\n {"a": 1}]', 2, "Expecting ',' or ']'"),
        ("a.json", '[{"a": 1},\n {"a": 1}', 2, "Expecting ',' or ']'"),
        ("a.json", '[{"a": 1}]\n{"a": 1}', 1, "Extra data after the array"),
        ("a.json", '[{"a": 1},\n"b"]', 2, "must be a JSON object, not a str"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', 2, "not UTF-8 (byte 0xff)"),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, name, text, line, words) -> None:
    message = refused(write(tmp_path / name, text))
    assert message.startswith(f"{tmp_path / name}:{line}: ")
    assert words in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_datasets_are_refused(tmp_path, name, text) -> None:
    assert refused(write(tmp_path / name, text)) == (
        f"{tmp_path / name}: the dataset is empty; it needs at least one row"
    )
    assert "is empty" in refused(write(tmp_path / "b.json", "[]"))


def test_other_unreadable_files(tmp_path) -> None:
    assert "not a readable parquet file" in refused(write(tmp_path / "a.parquet", "no"))
    assert "not a readable arrow file" in refused(write(tmp_path / "a.arrow", "no"))
    assert "not in '.tsv'" in refused(write(tmp_path / "a.tsv", "a b"))


def test_missing_column_names_the_row_and_those_present(tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", '{"prompt": "a", "x": 1}\n\n{"question": "b", "x": 1, "prompt": null}')
    rows = load_rows(str(file))
    require_column(rows[1], "x")
    with pytest.raises(UserError) as caught, rows.at(1) as row:
        require_column(row, "prompt")
    assert str(caught.value) == f"{file}:3: no column 'prompt'; columns present: 'question', 'x'"


def test_a_damaged_saved_dataset_is_one_line(tmp_path) -> None:
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(UserError, match="not a readable saved dataset"):
        load_rows(str(tmp_path))
