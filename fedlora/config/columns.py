"""Which columns of the data make a record, and which of them a task asks for."""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedlora.config.section import Section
from fedlora.config.task import CausalLm, Dpo, Task

Form: TypeAlias = Literal["text", "image", "completion", "messages", "preference"]
"""What a record is: a text or a pair of texts; an image; a prompt and its completion; a conversation; a prompt and two
completions."""


class RecordColumns(Section):
    """The columns of a source, by what they hold; a task says which of them it needs."""

    text: str | Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """The text column, or a list of two for pairs."""
    image: str | None = None
    """The column of images, for image-classification: paths from the file's own folder (csv, tsv, jsonl), or of parquet
    and huggingface the bytes of image files, alone or as {bytes, path}; needs the extra `fedlora[images]`."""
    prompt: str | None = None
    """The column of prompts, for causal-lm with `completion` and for dpo."""
    completion: str | None = None
    """The column of what the model shall answer."""
    messages: str | None = None
    """The column of conversations, each a list of {role, content} that ends with the assistant; jsonl, parquet or
    huggingface."""
    chosen: str | None = None
    """The column of the preferred completions, for dpo."""
    rejected: str | None = None
    """The column of the others, for dpo."""
    label: str | None = None
    """The label column; for causal-lm and dpo it only deals records out, and is null where nothing does."""


NAMES: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("image",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
}
"""The keys of each form."""

FORMS: dict[str, tuple[Form, ...]] = {
    "sequence-classification": ("text",),
    "image-classification": ("image",),
    "causal-lm": ("text", "completion", "messages"),
    "dpo": ("preference",),
}
"""What each task reads: one of these."""


def form_of(columns: RecordColumns) -> Form:
    """The form whose keys are set; `column_conflicts` has seen to it that it is one."""
    written = _written(columns)
    for form, names in NAMES.items():
        if written == set(names):
            return form
    return "text"


def read_columns(columns: RecordColumns) -> tuple[str, ...]:
    """The columns that make a record, in the order of `NAMES`."""
    values = [getattr(columns, name) for name in NAMES[form_of(columns)]]
    return tuple(name for value in values for name in ([value] if isinstance(value, str) else value or ()))


def column_conflicts(data: object, task: Task) -> Iterator[str]:
    """What is wrong between a source and a task, a run's or a node's, as `key: what; what to write instead`."""
    columns = data if isinstance(data, RecordColumns) else None
    yield from _of_sources(columns, task)
    yield from _of_length(getattr(data, "max_length", None), task)
    if not isinstance(task, CausalLm | Dpo):
        return
    form = "text" if columns is None else form_of(columns)
    yield from _of_template(task.template, form)
    if isinstance(task, CausalLm):
        yield from _of_supervision(task, form)


def _of_sources(columns: RecordColumns | None, task: Task) -> Iterator[str]:
    forms = FORMS[task.kind]
    if columns is None:
        if "text" not in forms:
            yield f"task.kind: {task.kind}, but this source holds texts only; write source: files, with {_told(forms)}"
        return
    written = _written(columns)
    if any(written == set(NAMES[form]) for form in forms):
        return
    if not written:
        yield f"data.{NAMES[forms[0]][0]}: missing, but task.kind is {task.kind}; write {_told(forms)}"
        return
    found = [name for name in dict.fromkeys(chain(*NAMES.values())) if name in written]
    yield f"data.{found[0]}: {', '.join(found)} together, but {task.kind} reads {_told(forms)}; write one of these"


def _of_length(max_length: int | None, task: Task) -> Iterator[str]:
    if "image" in FORMS[task.kind]:
        if max_length is not None:
            yield f"data.max_length: {max_length}, but an image has the size that its model reads; leave the key out"
    elif max_length is None:
        yield "data.max_length: missing; write how many tokens are kept of each record, such as 64"


def _of_template(template: str | None, form: Form) -> Iterator[str]:
    if template is None:
        return
    if form == "text":
        yield f"task.template: {template!r}, but data.text has no prompt to put into it; write null"
    elif form == "messages" and template != "chat":
        yield f"task.template: {template!r} holds one prompt, data.messages are many turns; write chat, or null"
    elif template not in ("chat", "plain") and "{prompt}" not in template:
        yield f"task.template: {template!r} does not hold {{prompt}}; write chat, plain, or a text with {{prompt}}"


def _of_supervision(task: CausalLm, form: Form) -> Iterator[str]:
    if task.packing:
        yield (
            "task.packing: true would put several records into one sequence, whose gradient cannot be clipped record "
            "by record; write false: records of like length share a batch anyway, with little padding"
        )
    if task.loss_on == "completion" and form == "text":
        yield "task.loss_on: completion, but data.text has none; write all, or name data.prompt and data.completion"
    if task.samples and form == "text":
        yield "task.samples: data.text has no prompts to go on from; write 0, or name data.prompt and data.completion"


def _written(columns: RecordColumns) -> set[str]:
    return {name for name in chain(*NAMES.values()) if getattr(columns, name) is not None}


def _told(forms: tuple[Form, ...]) -> str:
    return ", or ".join(" and ".join(f"data.{name}" for name in NAMES[form]) for form in forms)
