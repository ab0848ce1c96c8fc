"""Text read as it is needed: each document once in some shard, faults with their line, in little memory."""

import json
import random
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tandem.data import corpus as module
from tandem.data.corpus import Corpus
from tandem.errors import UserError


def texts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return ["".join(rng.choices("abc é日\n", k=rng.randint(1, longest))) for _ in range(count)]


def write(path, rows, end="\n"):
    path.write_bytes(end.join(json.dumps({"text": t}, ensure_ascii=False) for t in rows).encode())
    return str(path)


def whole(corpus):
    return [text for shard in range(corpus.shards) for text in corpus.documents(shard)]


@pytest.mark.parametrize("size", [1, 2, 7, 40, 64, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_each_line_is_in_one_shard_wherever_bytes_are_cut(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(module, "SHARD_BYTES", size)
    rows = texts(30)
    assert whole(Corpus(write(tmp_path / "a.jsonl", rows, end))) == rows
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n")
    assert whole(Corpus(str(tmp_path / "b.jsonl"))) == rows


def test_every_kind_of_source_has_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 7)
    rows = texts(50)
    table = pyarrow.table({"text": rows, "other": list(range(50))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    found = [Corpus(str(tmp_path / "a.parquet")), Corpus(str(tmp_path / "saved")), Corpus(str(arrow))]
    assert [one.shards for one in found] == [5, 8, 8]
    assert [whole(one) for one in found] == [rows] * 3
    write(tmp_path / "c.jsonl", rows)
    several = Corpus(f"{tmp_path / 'a.parquet'},{tmp_path / '*.jsonl'}")
    assert whole(several) == rows * 2


def test_memory_does_not_grow_with_the_file(tmp_path):
    rows = ["x" * 1000] * 8000
    file = write(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=64)
    for source in (file, str(tmp_path / "a.parquet")):
        tracemalloc.start()
        corpus = Corpus(source)
        assert sum(1 for shard in range(corpus.shards) for _ in corpus.documents(shard)) == 8000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000, source


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:31: malformed JSON"),
        ('{"prompt": "a"}', r"a\.jsonl:31: no column 'text'; columns present: 'prompt'"),
        ('{"text": 3}', r"a\.jsonl:31: column 'text' must be a string, not an int"),
        ('["a"]', r"a\.jsonl:31: a row must be a JSON object, not a list"),
        (b'{"text": "\xff"}', r"a\.jsonl:31: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    write(tmp_path / "a.jsonl", texts(30))
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=message):
        whole(Corpus(str(tmp_path / "a.jsonl")))


def test_what_cannot_be_read_from_any_place_on_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    (tmp_path / "empty.jsonl").write_text("")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    for name, message in (
        ("a.json", r"not from '\.json'; write one row a line, as \.jsonl"),
        ("empty.jsonl", "the dataset is empty"),
        ("a.parquet", "no column 'text'; columns present: 'body'"),
        ("none.jsonl", "no such file"),
        ("a.parquet:0.5,empty.jsonl:0.5", "text is read as one stream, so a weight has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            Corpus(",".join(str(tmp_path / one) for one in name.split(",")))
