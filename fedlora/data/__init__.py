"""Text or images in, arrays out: sources, partitions, tokens."""

from typing import assert_never

import numpy as np

from fedlora.config.columns import form_of, read_columns
from fedlora.config.data import Data, Docstrings, Files, HuggingFace
from fedlora.config.task import Task
from fedlora.data.corpus import Columns, Corpus, corpus_from
from fedlora.data.docstrings import docstring_corpus
from fedlora.data.files import load_table
from fedlora.data.huggingface import load_split
from fedlora.data.records import Examples, Records
from fedlora.seeds import seed_for

__all__ = ["Corpus", "Examples", "Records", "load_corpus"]


def load_corpus(data: Data, task: Task, seed: int) -> Corpus:
    """The training and test records that the config names; of the latter at most max_test_examples.

    Raises:
        DataError: a source is not there or does not hold what the config says.
    """
    causal = task.causal
    match data:
        case Files():
            columns = _columns(data)
            train = load_table(data.train, columns.names(), apart_from=data.test)
            test = load_table(data.test, columns.test_names(causal=causal), apart_from=data.train)
            corpus = corpus_from(train, test, columns, causal=causal)
        case HuggingFace():
            columns = _columns(data)
            train = load_split(data, data.train_split, columns.names(), data.max_train_examples)
            most = data.max_test_examples if data.streaming else None
            test = load_split(data, data.test_split, columns.test_names(causal=causal), most)
            corpus = corpus_from(train, test, columns, causal=causal)
        case Docstrings():
            corpus = docstring_corpus(data, seed, causal=causal)
        case _:
            assert_never(data)
    return _with_test_cut(corpus, data.max_test_examples, seed)


def _columns(data: Files | HuggingFace) -> Columns:
    group = data.partition.column if data.partition.kind == "column" else None
    return Columns(text=read_columns(data), label=data.label, group=group, form=form_of(data))


def _with_test_cut(corpus: Corpus, most: int | None, seed: int) -> Corpus:
    if most is None or most >= len(corpus.test):
        return corpus
    shuffle = np.random.Generator(np.random.Philox(seed_for(seed, "test examples")))
    chosen = np.sort(shuffle.permutation(len(corpus.test))[:most])
    return Corpus(train=corpus.train, test=corpus.test.select(chosen), classes=corpus.classes)
