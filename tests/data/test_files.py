import csv
import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fedlora.config.data import Column, Files, Iid
from fedlora.config.schema import CausalLm, Classification
from fedlora.data import load_corpus
from fedlora.errors import DataError

CLASSIFY = Classification(kind="sequence-classification")
GENERATE = CausalLm(kind="causal-lm")
ROWS = [("a first text", "b"), ("a second, with comma", "a"), ("ünïcödé", "b"), ("the last", "a")]


def write(path, rows=ROWS, names=("text", "label")):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        columns = [list(column) for column in zip(*rows, strict=True)]
        parquet.write_table(pyarrow.table(columns, names=list(names)), path)
        if path.name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
        return str(path)
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        elif kind == "csv":
            csv.writer(stream).writerows([names, *rows])
        else:
            stream.writelines("\t".join(map(str, row)) + "\n" for row in [names, *rows])
    return str(path)


def files(train, test, **changes):
    settings = {"text": "text", "label": "label", "max_length": 8, "partition": Iid(kind="iid", clients=1)}
    return Files(source="files", train=train, test=test, **{**settings, **changes})


def load(path, task=CLASSIFY, **changes):
    return load_corpus(files(str(path), str(path), **changes), task, 0)


def message(path, task=CLASSIFY, **changes):
    with pytest.raises(DataError) as caught:
        load(path, task, **changes)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_every_format_gives_the_same_records(tmp_path, ending, gz):
    corpus = load(write(tmp_path / f"train.{ending}{gz}"))
    assert corpus.train.texts == [text for text, _ in ROWS]
    assert corpus.classes == ("a", "b")
    assert corpus.train.labels.tolist() == [1, 0, 1, 0]
    assert corpus.test.labels.tolist() == [1, 0, 1, 0]


def test_a_lone_quote_or_carriage_return_in_tsv_swallows_no_line(tmp_path):
    rows = [('"an open quote', "a"), ("plain", "b"), ('closed" here', "a"), ("carriage\rreturn", "b")]
    assert load(write(tmp_path / "t.tsv", rows)).train.texts == [text for text, _ in rows]


def test_a_quoted_line_break_in_csv_stays_inside_its_record(tmp_path):
    rows = [("two\nlines", "a"), ('with "quotes"', "b")]
    assert load(write(tmp_path / "t.csv", rows)).train.texts == [text for text, _ in rows]


def test_whole_numbers_sort_as_numbers_whether_text_or_not(tmp_path):
    rows = [(f"text {i}", i) for i in (10, 2, 1)]
    for ending in ("tsv", "jsonl", "parquet"):
        corpus = load(write(tmp_path / f"t.{ending}", rows))
        assert corpus.classes == ("1", "2", "10")
        assert corpus.train.labels.tolist() == [2, 1, 0]


def test_a_pair_stays_a_pair_for_a_classifier_and_is_joined_for_a_language_model(tmp_path):
    path = write(tmp_path / "t.tsv", [("q1", "r1", "x"), ("q2", "r2", "y")], ("one", "two", "label"))
    assert load(path, text=["one", "two"]).train.texts == [("q1", "r1"), ("q2", "r2")]
    joined = load(path, GENERATE, text=["one", "two"], label=None)
    assert joined.train.texts == ["q1\nr1", "q2\nr2"]
    assert joined.train.labels is None
    assert joined.classes == ()


def test_a_language_model_uses_labels_to_deal_records_out_but_asks_none_of_the_test_data(tmp_path):
    train = write(tmp_path / "train.tsv")
    test = write(tmp_path / "test.tsv", [("only text", 1)], ("text", "other"))
    corpus = load_corpus(files(train, test), GENERATE, 0)
    assert corpus.train.labels.tolist() == [1, 0, 1, 0]
    assert corpus.test.labels is None


def test_the_partition_column_is_read_of_the_training_data_only(tmp_path):
    train = write(tmp_path / "train.tsv", [("a", "x", "anna"), ("b", "y", "bob")], ("text", "label", "who"))
    test = write(tmp_path / "test.tsv", [("a", "x"), ("b", "y")])
    corpus = load_corpus(files(train, test, partition=Column(kind="column", column="who")), CLASSIFY, 0)
    assert corpus.train.groups == ["anna", "bob"]


def test_the_cut_test_data_are_a_seeded_subset(tmp_path):
    path = write(tmp_path / "t.tsv", [(f"text {i}", i % 2) for i in range(50)])
    whole = load(path).test
    config = files(path, path, max_test_examples=10)
    cut, again, other = (load_corpus(config, CLASSIFY, seed).test for seed in (1, 1, 2))
    assert len(cut) == 10
    assert cut.texts == again.texts != other.texts
    pairs = set(zip(whole.texts, whole.labels.tolist(), strict=True))
    assert set(zip(cut.texts, cut.labels.tolist(), strict=True)) <= pairs


def test_a_missing_column_names_the_file_the_columns_and_the_nearest(tmp_path):
    for ending in ("tsv", "csv", "jsonl", "parquet"):
        said = message(write(tmp_path / f"t.{ending}"), label="lable")
        assert f"t.{ending}" in said
        assert "'text', 'label'; did you mean 'label'?" in said


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.tsv")
    assert "did you mean 'train.tsv'?" in message(tmp_path / "trian.tsv")
    assert "no directory" in message(tmp_path / "nowhere" / "train.tsv")
    assert message(tmp_path).endswith("a directory; name the file in it, a tsv, csv, jsonl or parquet")


def test_a_training_label_that_the_test_data_lack_names_file_line_and_label_and_makes_no_class(tmp_path):
    train = write(tmp_path / "train.tsv", [*ROWS, ("new", "c" * 40)])
    with pytest.raises(
        DataError, match=r"train\.tsv:6: label '(c{30})…'.*'a', 'b'; correct it, or add a test"
    ):
        load_corpus(files(train, write(tmp_path / "test.tsv")), CLASSIFY, 0)


def test_classes_are_the_labels_of_the_test_data_whatever_training_holds(tmp_path):
    train, few = write(tmp_path / "train.tsv"), write(tmp_path / "few.tsv", ROWS[:1])
    test = write(tmp_path / "test.tsv", [*ROWS, ("a third", "aa")])
    for path, labels in ((train, [2, 0, 2, 0]), (few, [2])):
        corpus = load_corpus(files(path, test, max_test_examples=1), CLASSIFY, 0)
        assert corpus.classes == ("a", "aa", "b")
        assert corpus.train.labels.tolist() == labels


def test_no_message_quotes_a_text(tmp_path):
    secret = "a secret that nobody may read"
    rows = [(secret, "a"), (f"{secret}, again", "b")]
    path = write(tmp_path / "t.tsv", rows)
    for changes in ({"label": "text"}, {"partition": Column(kind="column", column="text")}):
        said = message(path, **changes)
        assert "secret" not in said and "is a column of data.text" in said
    headless = write(tmp_path / "headless.tsv", rows[1:], rows[0])
    said = message(headless)
    assert "secret" not in said and "1 that look like no names; is the header line missing?" in said
    listed = tmp_path / "t.jsonl"
    listed.write_text(json.dumps({"text": "one", "label": [secret]}) + "\n")
    assert "secret" not in message(listed) and "holds list" in message(listed)


def test_a_message_quotes_three_labels_at_most_each_cut(tmp_path):
    test = write(tmp_path / "test.tsv", [(f"text {i}", f"{i}{'x' * 50}") for i in range(9)])
    with pytest.raises(DataError) as caught:
        load_corpus(files(write(tmp_path / "train.tsv"), test), CLASSIFY, 0)
    said = str(caught.value)
    assert "x" * 31 not in said and said.count("xxx…") == 3 and "9 classes" in said and "and 6 more" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.tsv", b"text\tlabel\none\ta\ntwo\n", "t.tsv:3: 1 field, but the header has 2"),
        ("t.tsv", b"text\tlabel\none\ta\ntwo\t\n", "t.tsv:3: column 'label' holds ''"),
        ("t.tsv", b"text\tlabel\none\ta\ntwo\ta\n", "one label only, 'a'"),
        ("t.tsv", b"text\tlabel\n", "no records"),
        ("t.tsv", b"", "no column 'text'; it has none"),
        ("t.tsv", b"text\tlabel\n\xff\ta\n", "not UTF-8"),
        ("t.csv", b"text;label\none;a\n", "its columns are separated by semicolons; save it with commas"),
        ("t.csv", b'text,label\n"open,a\ntwo,b\n', "not csv"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n{"text"\n', "t.jsonl:2: not JSON"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n[1]\n', "t.jsonl:2: holds list"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n\n{"text": "two"}\n', "t.jsonl:3: no column 'label'"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n{"text": null, "label": 2}\n', "t.jsonl:2: column 'text'"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n{"text": "two", "label": 0.5}\n', "t.jsonl:2: .* 0.5"),
        ("t.jsonl", b'{"text": "one", "label": 1}\n{"text": "\\ud83d", "label": 2}\n', "half a character"),
        ("t.csv", b"text,text,label\none,two,a\n", "2 columns are called 'text'; give each its own name"),
        ("t.parquet", b"no parquet", "not a parquet file"),
        ("t.tsv.gz", b"no gzip", "cannot be read"),
        ("t.tsv.gz", gzip.compress(b"text\tlabel\none\ta\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("t.txt", b"text", "unknown format"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_where_and_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / name)


def test_a_text_may_be_as_long_as_it_likes(tmp_path):
    (tmp_path / "t.csv").write_text(f"text,label\n{'x' * 200_000},a\ntwo,b\n")
    assert len(load(tmp_path / "t.csv").train.texts[0]) == 200_000


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    (tmp_path / "t.tsv").write_bytes("﻿text\tlabel\r\none\ta\r\ntwo\tb\r\n".encode())
    corpus = load(tmp_path / "t.tsv")
    assert corpus.train.texts == ["one", "two"]
    assert np.array_equal(corpus.train.labels, [0, 1])


@pytest.mark.parametrize(
    ("train", "test", "meant"),
    [
        ("tran.csv", "test.csv", "train.csv"),
        ("train.tsv", "test.csv", "train.csv"),
        ("tests.csv", "test.csv", None),  # what is scored on is not to be trained on
        ("tests.csv", "./test.csv", None),
        ("own.csv", "test.csv", None),  # near by its ending alone
        ("trains.yaml", "test.csv", "train.csv"),
        ("train.csv", "tets.csv", "test.csv"),
        ("train.csv", "trian.csv", None),
    ],
)
def test_what_is_suggested_for_a_file_that_is_not_there_can_be_meant(
    tmp_path, monkeypatch, train, test, meant
):
    monkeypatch.chdir(tmp_path)
    for name in ("train.csv", "test.csv"):
        write(tmp_path / name)
    (tmp_path / "trains.yml").write_text("a: config")
    with pytest.raises(DataError) as caught:
        load_corpus(files(train, test), CLASSIFY, 0)
    told = str(caught.value)
    assert told.endswith(f"; did you mean {meant!r}?") if meant else "did you mean" not in told
