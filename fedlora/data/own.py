"""A data owner's own records, as node.yaml names them."""

from fedlora.config.columns import form_of, read_columns
from fedlora.config.node import NodeConfig, NodeDocstrings, NodeFiles
from fedlora.config.task import Task
from fedlora.data import load_corpus
from fedlora.data.corpus import Columns, corpus_from, labelled_records
from fedlora.data.files import load_table
from fedlora.data.partition import partition
from fedlora.data.records import Records
from fedlora.errors import ConfigError, DataError


def own_records(config: NodeConfig) -> Records:
    """The node's records, labels as indices into `classes`.

    Raises:
        DataError: they are not there, or not what node.yaml says.
    """
    if isinstance(config.data, NodeDocstrings):
        corpus = load_corpus(config.data, config.task, config.data.seed)
        if config.classes and corpus.classes != tuple(config.classes):
            raise DataError(
                f"classes are {config.classes}, the docstrings have {list(corpus.classes)}; list those"
            )
        parts = partition(corpus.train, config.data.partition, config.data.seed)
        if config.data.part not in parts:
            raise ConfigError(f"data.part {config.data.part!r} is none of {sorted(parts)}; name one of them")
        return corpus.train.select(parts[config.data.part])
    return _file_records(config.data, config.task, config.classes)


def _file_records(data: NodeFiles, task: Task, classes: list[str]) -> Records:
    causal = task.causal
    label = None if causal else data.label
    columns = Columns(text=read_columns(data), label=label, form=form_of(data))
    table = load_table(data.train, columns.names())
    if causal:
        return corpus_from(table, table, columns, causal=True).train
    return labelled_records(table, columns, tuple(classes))
