import importlib.util
import json
from types import SimpleNamespace

import pytest

from fedlora.config.data import HuggingFace, Iid
from fedlora.config.schema import Classification
from fedlora.data import load_corpus
from fedlora.data.corpus import Columns, corpus_from
from fedlora.data.huggingface import _named
from fedlora.data.table import Table
from fedlora.errors import DataError

UNLABELLED = SimpleNamespace(names=["a", "b"])
CLASSIFY = Classification(kind="sequence-classification")
INSTALLED = importlib.util.find_spec("datasets") is not None


def settings(path, **changes):
    return HuggingFace(
        source="huggingface", path=str(path), text="text", label="label", max_length=8,
        partition=Iid(kind="iid", clients=1), **changes,
    )  # fmt: skip


@pytest.mark.skipif(INSTALLED, reason="the datasets library is installed")
def test_without_the_library_the_message_names_the_extra():
    with pytest.raises(DataError, match=r"fedlora\[huggingface\]"):
        load_corpus(settings("imdb"), CLASSIFY, 0)


@pytest.mark.skipif(not INSTALLED, reason="the datasets library is not installed")
def test_a_local_folder_loads_like_a_data_set_of_the_hub(tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"{split} {i}", "label": "ab"[i % 2]}) for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    corpus = load_corpus(settings(tmp_path), CLASSIFY, 0)
    assert corpus.classes == ("a", "b")
    assert corpus.train.texts[0] == "train 0"
    assert corpus.test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.skipif(not INSTALLED, reason="the datasets library is not installed")
def test_a_data_set_that_is_not_there_is_an_error_without_a_wait(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no-such/data-set"):
        load_corpus(settings("no-such/data-set"), CLASSIFY, 0)


def test_an_unlabelled_record_of_the_hub_is_refused_and_no_class():
    def table(origin, labels):
        columns = {"text": ["t"] * len(labels), "label": _named(labels, UNLABELLED)}
        return Table(origin=origin, columns=columns, lines=range(1, len(labels) + 1))

    train, test = table("train", [0, 1]), table("test", [0, 1, -1])
    with pytest.raises(DataError, match="test:3: column 'label' holds None"):
        corpus_from(train, test, Columns(text=("text",), label="label"), causal=False)
