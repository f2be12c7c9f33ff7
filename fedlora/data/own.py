"""Records of one file by themselves: a data owner's own, as node.yaml names them, and public ones."""

from fedlora.config.columns import RecordColumns, form_of, read_columns
from fedlora.config.node import NodeConfig, NodeDocstrings
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
    return file_records(config.data.train, config.data, config.task, tuple(config.classes))


def file_records(path: str, names: RecordColumns, task: Task, classes: tuple[str, ...]) -> Records:
    """All records of one file.

    Args:
        path: of the file.
        names: of its columns.
        task: what records are for.
        classes: into which labels are indices; a causal LM has none.

    Raises:
        DataError: they are not there, or not what the columns or the classes say.
    """
    causal = task.causal
    columns = Columns(text=read_columns(names), label=None if causal else names.label, form=form_of(names))
    table = load_table(path, columns.names())
    if causal:
        return corpus_from(table, table, columns, causal=True).train
    return labelled_records(table, columns, classes)
