"""Several sources at once, with their weights; and every other way to say where rows are."""

import csv
import io
import json
from fractions import Fraction

import datasets
import pytest

from tandem.data.rows import load_rows
from tandem.data.sources import DataSource, parse_sources
from tandem.errors import UserError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prompts(source, **options):
    return [row["prompt"] for row in load_rows(str(source), **options)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", None)]),
        ("a.jsonl:0.4,b.jsonl:0.6", [("a.jsonl", "2/5"), ("b.jsonl", "3/5")]),
        ("a.jsonl, b.jsonl", [("a.jsonl", None), ("b.jsonl", None)]),
        ("own/set:main:3,json@./x:1e-1", [("own/set:main", 3), ("json@./x", "1/10")]),
        ("own/set:2,b.jsonl:1", [("own/set", 2), ("b.jsonl", 1)]),
        ("own/set:2020", [("own/set:2020", None)]),
        ("own/set:main", [("own/set:main", None)]),
        ("C:\\x\\a.jsonl", [("C:\\x\\a.jsonl", None)]),
        ("C:/x/a.jsonl:2,D:\\b.jsonl:1", [("C:/x/a.jsonl", 2), ("D:\\b.jsonl", 1)]),
    ],
)
def test_what_data_names(text, expected):
    assert parse_sources(text) == [DataSource(name, None if w is None else Fraction(w)) for name, w in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jsonl:much,b.jsonl:1", "a.jsonl:much: the weight 'much' is no number"),
        ("a.jsonl:0,b.jsonl:1", "a.jsonl:0: a weight must be a finite number above 0, not 0"),
        ("a.jsonl:-1,b.jsonl:1", "above 0, not -1"),
        ("a.jsonl:nan,b.jsonl:1", "above 0, not nan"),
        ("a.jsonl:1e999,b.jsonl:1", "above 0, not 1e999"),
        ("a.jsonl:1,b.jsonl", "b.jsonl: the other sources have weights and it has none"),
        ("a.jsonl:1", "a.jsonl:1: the weight of the only source has no effect"),
        ("a.jsonl:,b.jsonl:1", "the weight '' is no number"),
        ("a.jsonl,,b.jsonl", "a comma with no source beside it"),
        ("a.jsonl:1,a.jsonl:2", "a.jsonl: named twice among the sources"),
        ("a.jsonl,./a.jsonl", "a.jsonl and ./a.jsonl: named twice among the sources"),
        ("json@data/b,hub/name,json@data/../data/b/", "json@data/b and json@data/../data/b/: named twice"),
    ],
)
def test_what_is_no_weight(text, words):
    with pytest.raises(UserError) as caught:
        parse_sources(text)
    assert words in str(caught.value)


def test_a_name_with_a_colon_or_a_comma_that_exists_is_one_file(tmp_path):
    assert prompts(write(tmp_path / "a:0.5,b:0.5.jsonl", "x")) == ["x"]
    odd, plain = write(tmp_path / "a.jsonl:2", "x"), write(tmp_path / "b.jsonl", "y")
    assert parse_sources(f"{odd}:1,{plain}:3") == [
        DataSource(str(odd), Fraction(1)),
        DataSource(str(plain), Fraction(3)),
    ]
    many = ",".join(f"file-{i}.jsonl:0.5" for i in range(200))
    assert len(parse_sources(many)) == 200, "longer than a path may be"


def test_rows_of_several_sources_keep_their_places_and_parts(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "1", "2", "3"), write(tmp_path / "b.jsonl", "4", "5")
    rows = load_rows(f"{a}:1,{b}:3")
    assert [row["prompt"] for row in rows] == list("12345")
    assert [(part.name, part.rows, part.weight) for part in rows.parts] == [(str(a), 3, 1), (str(b), 2, 3)]
    assert rows.where(4) == f"{b}:2"
    assert prompts(f"{a},{b}", max_samples=2) == list("1245")
    assert prompts(a, max_samples=9) == list("123")
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        load_rows(f"{a}:1,{tmp_path}/none.jsonl:1")


def test_files_of_one_type_in_a_folder(tmp_path):
    """``json@./data`` of OpenRLHF: its train and its test files."""
    write(tmp_path / "train.jsonl", "a")
    write(tmp_path / "my-test.json", "b")
    (tmp_path / "train.csv").write_text("prompt\nc\n", encoding="utf-8")
    assert prompts(f"json@{tmp_path}") == ["a"]
    assert prompts(f"json@{tmp_path}", split="test") == ["b"]
    assert prompts(f"csv@{tmp_path}") == ["c"]
    for source, words in (
        (f"parquet@{tmp_path}", "holds no .parquet file"),
        (f"json@{tmp_path}x", "no such folder as"),
        ("json@", "no such folder as nothing"),
        ("jsn@/data", "'jsn' is no type of files; those are json, csv, parquet, arrow"),
    ):
        with pytest.raises(UserError, match=words):
            load_rows(source)


def test_splits_are_words_of_names_or_folders(tmp_path):
    write(tmp_path / "a" / "maths_train_0.jsonl", "a")
    write(tmp_path / "a" / "maths_test_0.jsonl", "b")
    write(tmp_path / "a" / "retraining.jsonl", "c")
    assert prompts(tmp_path / "a") == ["a"]
    assert prompts(tmp_path / "a", split="test") == ["b"]
    write(tmp_path / "b" / "train" / "part.jsonl", "d")
    write(tmp_path / "b" / "test" / "part.jsonl", "e")
    assert prompts(tmp_path / "b") == ["d"]
    assert prompts(tmp_path / "b", split="test") == ["e"]


def test_csv_and_arrow(tmp_path):
    long = "x" * 200_000
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["prompt", "answer"], ["a,\nb \u2028", "007"], ["c", ""], [long, "1"]])
    file = tmp_path / "a.csv"
    file.write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
    rows = load_rows(str(file))
    assert list(rows) == [
        {"prompt": "a,\nb \u2028", "answer": "007"},
        {"prompt": "c", "answer": ""},
        {"prompt": long, "answer": "1"},
    ]
    assert [rows.where(i) for i in range(3)] == [f"{file}:2", f"{file}:4", f"{file}:5"]
    assert csv.field_size_limit() == 131072
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert prompts(arrow.rename(tmp_path / "a.arrow")) == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,answer\na,b\nc\n", ":3: 1 values for the 2 columns"),
        ("prompt,prompt\na,b\n", ":1: the column 'prompt' is named twice"),
        ('prompt\n"a" b\n', ":2: malformed CSV"),
    ],
)
def test_malformed_csv(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path / "a.csv"))
    assert words in str(caught.value)
