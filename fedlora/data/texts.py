"""What a record says, before a model reads it: a text, a pair, a prompt with what should follow, a conversation."""

from dataclasses import asdict, dataclass
from typing import TypeAlias

ROLES = ("system", "user", "assistant")
"""Who may speak in a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A prompt and what the model shall answer."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one of ROLES says."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns, of which the assistant's are learned; the last is one of these."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt and two completions, of which the first is preferred."""

    prompt: str
    chosen: str
    rejected: str


Text: TypeAlias = str | tuple[str, str] | Instruction | Conversation | Preference
"""One text, a pair that the tokenizer joins in its own way, or something with completions."""


def as_json(text: object) -> object:
    """What `json.dumps` makes of a text that it does not know."""
    assert isinstance(text, Instruction | Conversation | Preference)
    return asdict(text)
