"""Where records come from, and how a simulation deals them out to its clients."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedlora.config.columns import RecordColumns
from fedlora.config.section import Section

Clients = Annotated[int, Field(ge=1, description="How many; they are named client-0, client-1 and so on.")]


class Iid(Section):
    """Records dealt out at random, sizes equal within one."""

    kind: Literal["iid"]
    clients: Clients


class Dirichlet(Section):
    """Each label's records shared out by a draw from Dirichlet(alpha) over the clients."""

    kind: Literal["dirichlet"]
    clients: Clients
    alpha: Annotated[float, Field(gt=0)]
    """Small: each client holds few labels. Large: approaches iid."""
    min_examples: Annotated[int, Field(ge=1)] = 1
    """The draw is repeated until every client holds at least so many."""


class Pathological(Section):
    """Each client holds only a few labels (McMahan et al. 2017)."""

    kind: Literal["pathological"]
    clients: Clients
    classes_per_client: Annotated[int, Field(ge=1)]
    """Labels that a client holds records of."""


class Shards(Section):
    """Records sorted by label and cut into equal shards, dealt out at random: the federation of McMahan et al. 2017."""

    kind: Literal["shards"]
    clients: Clients
    shards_per_client: Annotated[int, Field(ge=1)] = 2
    """Two is the paper's: most clients then hold one or two labels. Many: approaches iid."""


class Quantity(Section):
    """Sizes by a draw from Dirichlet(alpha) over the clients; which records is chance, so labels are alike."""

    kind: Literal["quantity"]
    clients: Clients
    alpha: Annotated[float, Field(gt=0)]
    """Small: few clients hold most records. Large: sizes approach each other."""
    min_examples: Annotated[int, Field(ge=1)] = 1
    """The draw is repeated until every client holds at least so many."""


class Column(Section):
    """One client for each value of a column: the natural federation."""

    kind: Literal["column"]
    column: str
    """Its name; a client has the name of its value."""
    clients: ClassVar = None
    """As many as there are values: not known before these are read."""


Partition = Annotated[
    Iid | Dirichlet | Pathological | Shards | Quantity | Column, Field(discriminator="kind")
]


class _Data(Section):
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens kept of each record; of a pair of completions, of each of both. null for images, and only there."""
    max_test_examples: Annotated[int, Field(ge=1)] | None = None
    """Score on the first so many test records of a seeded shuffle; null: all."""
    partition: Partition


class _Columns(RecordColumns, _Data):
    public: str | None = None
    """A file of labelled records that are public, with the columns named here, for `lora.init: gradients`; no epsilon
    covers them. In a deployment the server alone reads it. null: there is none."""


class Files(_Columns):
    """Local tsv, csv, jsonl or parquet files, also gzipped."""

    source: Literal["files"]
    train: str
    """Path, relative to the working directory."""
    test: str
    """Public test data: scored at the server."""


class HuggingFace(_Columns):
    """A data set of the hub, or its cached copy; needs the extra `fedlora[huggingface]`."""

    source: Literal["huggingface"]
    path: str
    """Its id on the hub, such as `glue`, or a local copy."""
    name: str | None = None
    """Its configuration, such as `sst2`; null: the only one."""
    train_split: str = "train"
    """The private records."""
    test_split: str = "test"
    """Public test data: scored at the server."""
    streaming: bool = False
    """Reads rows as they come instead of downloading the whole set first; needs `max_train_examples`."""
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    """The first so many rows of the training split, and no more, are read; null: all. Of a test split that streams,
    the first `max_test_examples` are."""


class Docstrings(_Data):
    """Built in and offline: docstrings of the Python packages installed here; the label is the package
    that wrote it."""

    source: Literal["docstrings"]
    packages: Annotated[list[str], Field(min_length=2)] | None = None
    """Top-level packages to tell apart (`stdlib` is the standard library); null: a fixed set that fedlora
    itself installs."""
    max_per_class: Annotated[int, Field(ge=10)] = 4000
    """At most so many records a label, so that no package drowns the others."""


Data = Annotated[Files | HuggingFace | Docstrings, Field(discriminator="source")]
