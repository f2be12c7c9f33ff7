"""From the rows of a table to what records say or show: a text, a pair, a prompt with what should follow, a
conversation, an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.config.columns import Form
from fedlora.data.table import HALF, Table, is_text, quoted
from fedlora.data.texts import ROLES, Conversation, Instruction, Picture, Preference, Text, Turn
from fedlora.errors import DataError


def texts_of(table: Table, names: tuple[str, ...], form: Form, *, causal: bool) -> list[Text]:
    """The record of every row, out of its columns.

    Args:
        table: that has them.
        names: of the columns, in the order of the form's keys.
        form: what they make together.
        causal: whether a pair becomes one text, for a language model.

    Raises:
        DataError: FILE:ROW, the column, what is wrong there and the mend; of the first bad row.
    """
    make: dict[Form, Callable[[Sequence[_Cell]], Text]] = {
        "text": _joined if causal else _plain,
        "image": _picture,
        "completion": _instruction,
        "messages": _conversation,
        "preference": _preference,
    }
    return [make[form]([_Cell(table, name, row) for name in names]) for row in range(len(table.lines))]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One value of a table, and where it stands."""

    table: Table
    name: str
    row: int

    @property
    def value(self) -> object:
        return self.table.columns[self.name][self.row]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.bad(f"holds {_kind(self.value)}, not text; drop the row or name another column")
        if not is_text(self.value):
            raise self.bad(HALF)
        return self.value

    def completion(self) -> str:
        if not self.text().strip():
            raise self.bad("holds an empty completion, from which nothing can be learned; drop the row")
        return self.text()

    def bad(self, wrong: str) -> DataError:
        return DataError(f"{self.table.where(self.row)}: column {self.name!r} {wrong}")


def _plain(cells: Sequence[_Cell]) -> Text:
    first, *rest = (cell.text() for cell in cells)
    return (first, rest[0]) if rest else first


def _picture(cells: Sequence[_Cell]) -> Text:
    (cell,) = cells
    value, where = cell.value, f"{cell.table.where(cell.row)}: what column {cell.name!r} holds or names"
    if isinstance(value, dict):  # as the Image feature of Hugging Face datasets writes it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Picture(content=value, where=where)
    if not isinstance(value, str) or not value:
        raise cell.bad(
            f"holds {_kind(value)}, need the path or the bytes of an image file; mend or drop the row"
        )
    path = cell.table.directory / value
    if not _is_file(path):
        raise cell.bad(
            f"names {quoted(value)}, but no such file lies in {str(cell.table.directory)!r}; paths begin where the "
            "table lies"
        )
    return Picture(content=path, where=where)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for one, such as a text's, which the error would quote whole
        return False


def _joined(cells: Sequence[_Cell]) -> Text:
    return "\n".join(cell.text() for cell in cells)


def _instruction(cells: Sequence[_Cell]) -> Text:
    prompt, completion = cells
    return Instruction(prompt=prompt.text(), completion=completion.completion())


def _preference(cells: Sequence[_Cell]) -> Text:
    prompt, chosen, rejected = cells
    return Preference(prompt=prompt.text(), chosen=chosen.completion(), rejected=rejected.completion())


def _conversation(cells: Sequence[_Cell]) -> Text:
    (cell,) = cells
    messages = cell.value
    if not isinstance(messages, list):
        mend = "; only jsonl, parquet and huggingface can hold it" if isinstance(messages, str) else ""
        raise cell.bad(f"holds {_kind(messages)}, need a list of {{role, content}}{mend}")
    if not messages:
        raise cell.bad("holds no message; write at least one, the assistant's")
    turns = tuple(_turn(cell, number, message) for number, message in enumerate(messages, 1))
    if turns[-1].role != "assistant":
        last = turns[-1].role
        raise cell.bad(f"ends with {last!r}; the last message must be the assistant's, cut the rest")
    if not all(turn.content.strip() for turn in turns if turn.role == "assistant"):
        raise cell.bad("holds an assistant's message without words; drop the row or write them")
    return Conversation(turns=turns)


def _turn(cell: _Cell, number: int, message: object) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise cell.bad(f"message {number} is no {{role, content}}; write both of each message")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise cell.bad(f"message {number} has role {quoted(role)}; write one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise cell.bad(f"message {number} holds {_kind(content)} as content; write text")
    if not is_text(content):
        raise cell.bad(f"message {number} {HALF}")
    return Turn(role=role, content=content)


def _kind(value: object) -> str:
    return "text" if isinstance(value, str) else type(value).__name__
