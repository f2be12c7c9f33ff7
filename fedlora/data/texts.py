"""What a record says, before a model reads it: a text, a pair, a prompt with what should follow, a conversation; or
shows, an image.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image, not yet decoded. content: of its file, or where that lies. where: the record, as messages name it."""

    content: bytes | Path
    where: str

    def encoded(self) -> bytes:
        """The bytes of its file; OSError where it is gone."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


Text: TypeAlias = str | tuple[str, str] | Instruction | Conversation | Preference | Picture
"""One text, a pair that the tokenizer joins in its own way, something with completions, or an image."""


def as_json(text: object) -> object:
    """What `json.dumps` makes of a text that it does not know; of an image, the digest of its file."""
    if isinstance(text, Picture):
        return {"image": hashlib.sha256(text.encoded()).hexdigest()}
    assert isinstance(text, Instruction | Conversation | Preference)
    return asdict(text)
