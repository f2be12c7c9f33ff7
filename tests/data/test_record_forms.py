"""Prompts, conversations and preferences out of every kind of file; a bad one is told by row, column and mend."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from fedlora.config.data import Column, Dirichlet, Files, HuggingFace, Iid
from fedlora.config.schema import Dpo
from fedlora.config.task import CausalLm
from fedlora.data import load_corpus
from fedlora.data.huggingface import _streamed
from fedlora.data.texts import Conversation, Instruction, Preference, Turn
from fedlora.errors import DataError

SFT, DPO = CausalLm(kind="causal-lm"), Dpo(kind="dpo")
ASKED = [{"q": "one, two?", "a": "three", "who": "x"}, {"q": "", "a": "ünïcödé", "who": "y"}]
PAIRS = [{"q": "one?", "good": "three", "bad": "four"}, {"q": "two?", "good": "four", "bad": "three"}]
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def write(path, rows):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        if path.name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
        return str(path)
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = [list(rows[0]), *(list(row.values()) for row in rows)]
            csv.writer(stream, delimiter="\t" if kind == "tsv" else ",").writerows(table)
    return str(path)


def files(path, **columns):
    columns.setdefault("partition", Iid(kind="iid", clients=1))
    return Files(source="files", train=str(path), test=str(path), max_length=8, **columns)


def message(path, task=SFT, **columns):
    with pytest.raises(DataError) as caught:
        load_corpus(files(path, **columns), task, 0)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet", "jsonl.gz", "parquet.gz"])
def test_prompts_and_completions_come_out_of_every_kind_of_file(tmp_path, ending):
    data = files(
        write(tmp_path / f"t.{ending}", ASKED),
        prompt="q",
        completion="a",
        partition=Column(kind="column", column="who"),
    )
    corpus = load_corpus(data, SFT, 0)
    wanted = [Instruction(prompt=row["q"], completion=row["a"]) for row in ASKED]
    assert corpus.train.texts == corpus.test.texts == wanted
    assert corpus.train.groups == ["x", "y"]
    assert corpus.classes == () and corpus.train.labels is None


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_preferences_come_out_of_every_kind_of_file(tmp_path, ending):
    data = files(write(tmp_path / f"t.{ending}", PAIRS), prompt="q", chosen="good", rejected="bad")
    wanted = [Preference(prompt=row["q"], chosen=row["good"], rejected=row["bad"]) for row in PAIRS]
    assert load_corpus(data, DPO, 0).train.texts == wanted


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_conversations_come_out_of_files_that_can_hold_them(tmp_path, ending):
    data = files(write(tmp_path / f"t.{ending}", [{"m": TALK}, {"m": TALK[1:]}]), messages="m")
    turns = tuple(Turn(**message) for message in TALK)
    assert load_corpus(data, SFT, 0).train.texts == [Conversation(turns=turns), Conversation(turns=turns[1:])]


def test_a_label_deals_records_out_and_is_no_part_of_them(tmp_path):
    data = files(
        write(tmp_path / "t.jsonl", ASKED),
        prompt="q",
        completion="a",
        label="who",
        partition=Dirichlet(kind="dirichlet", clients=1, alpha=1.0),
    )
    assert load_corpus(data, SFT, 0).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"q": "x", "a": " "}, "t.jsonl:3: column 'a' holds an empty completion, .*; drop the row"),
        ({"q": None, "a": "x"}, "t.jsonl:3: column 'q' holds NoneType, not text; drop the row"),
        ({"q": "x", "a": ["x"]}, "t.jsonl:3: column 'a' holds list, not text"),
        ({"q": "x"}, "t.jsonl:3: no column 'a'"),
    ],
)
def test_a_bad_instruction_is_told_by_row_and_column(tmp_path, bad, said):
    path = write(tmp_path / "t.jsonl", [*ASKED, bad])
    with pytest.raises(DataError, match=said):
        load_corpus(files(path, prompt="q", completion="a"), SFT, 0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("hello", r"t.jsonl:2: column 'm' holds text, need a list of {role, content}; only jsonl, parquet"),
        ({"role": "user"}, "column 'm' holds dict, need a list"),
        ([], "column 'm' holds no message; write at least one"),
        (TALK[:1], "column 'm' ends with 'user'; the last message must be the assistant's, cut the rest"),
        ([*TALK, "x"], "message 3 is no {role, content}; write both"),
        (
            [{"role": "robot", "content": "x"}],
            "message 1 has role 'robot'; write one of system, user, assistant",
        ),
        ([{"role": ["s"], "content": "x"}], "message 1 has role list"),
        ([{"role": "assistant", "content": None}], "message 1 holds NoneType as content; write text"),
        ([TALK[0], {"role": "assistant", "content": "\n"}], "without words; drop the row"),
    ],
)
def test_a_bad_conversation_is_told_by_row_and_column(tmp_path, bad, said):
    path = write(tmp_path / "t.jsonl", [{"m": TALK}, {"m": bad}])
    with pytest.raises(DataError, match=said):
        load_corpus(files(path, messages="m"), SFT, 0)


def test_a_bad_pair_is_told_by_row_and_column(tmp_path):
    path = write(tmp_path / "t.csv", [*PAIRS, {"q": "x", "good": "", "bad": "y"}])
    said = message(path, DPO, prompt="q", chosen="good", rejected="bad")
    assert "t.csv:4: column 'good' holds an empty completion" in said


def test_no_message_quotes_a_record(tmp_path):
    secret = "a secret that nobody may read, and longer than any name"
    for bad in ([{"role": secret, "content": "x"}], [{"role": "user", "content": secret}], secret):
        assert secret not in message(write(tmp_path / "t.jsonl", [{"m": bad}]), messages="m")
    said = message(write(tmp_path / "t.jsonl", ASKED), prompt="q", completion="a", label="q")
    assert "data.label: 'q' is a column of the records themselves (data.prompt, data.completion)" in said


def test_a_stream_is_read_up_to_its_cap_and_no_further():
    def rows():
        yield {"q": "one", "a": "1", "more": 1}
        yield {"q": "two", "a": "2", "more": 2}
        raise AssertionError("asked for a third row")

    assert _streamed(rows(), "hub", ["q", "a"], 2) == {"q": ["one", "two"], "a": ["1", "2"]}
    with pytest.raises(DataError, match=r"hub: the stream broke after 2 rows: .*; try again"):
        _streamed(rows(), "hub", ["q", "a"], 3)
    with pytest.raises(DataError, match="hub: no column 'b'"):
        _streamed(rows(), "hub", ["q", "b"], 2)


def test_a_streamed_data_set_gives_what_a_whole_one_gives(tmp_path):
    pytest.importorskip("datasets", reason="the datasets library is not installed")
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"m": TALK, "who": str(i)} for i in range(6)])

    def load(**changes):
        data = HuggingFace(
            source="huggingface", path=str(tmp_path), messages="m", max_length=8,
            partition=Column(kind="column", column="who"), **changes,
        )  # fmt: skip
        return load_corpus(data, SFT, 0)

    whole, some = load(), load(max_train_examples=4)
    streamed = load(streaming=True, max_train_examples=4, max_test_examples=2)
    assert len(whole.train) == 6 and whole.train.texts[:4] == some.train.texts == streamed.train.texts
    assert streamed.train.groups == ["0", "1", "2", "3"] and len(streamed.test) == 2
