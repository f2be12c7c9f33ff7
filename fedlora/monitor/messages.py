"""The monitor's messages from and to what rounds.jsonl and `fedlora status` hold. Anything else is left out."""

from collections.abc import Mapping
from typing import Any

from fedlora.monitor.proto.monitor_pb2 import Round, RunStatus, Spent
from fedlora.runs.rundir import NEWEST

SERVICE = "fedlora.monitor.v1.Monitor"
MESSAGE_BYTES = 32 << 20
"""The status of some 500,000 clients."""
GREETING = (("fedlora-monitor", "v1"),)
"""Metadata at the head of a stream: a follower knows that it was heard, though no round is done yet."""
REQUEST_BYTES = 1024
"""No request has more than one number."""

_STATUS = tuple(field.name for field in RunStatus.DESCRIPTOR.fields)
_ROUND = tuple(field.name for field in Round.DESCRIPTOR.fields)
_REPEATED = ("asked", "answered")
_MAPS = ("participations", "refusals_by_reason", "refused", "rejected", "accuracy_told")


def status_message(found: Mapping[str, Any]) -> RunStatus:
    """The message of what `View.status` found."""
    spent = {
        _text(client): Spent(epsilon=epsilon)
        for client, epsilon in (found.get("epsilon_by_client") or {}).items()
    }
    newest = None if found.get("newest") is None else round_message(found["newest"])
    return RunStatus(epsilon_by_client=spent, newest=newest, **_given(found, _STATUS))


def status_words(message: RunStatus) -> dict[str, Any]:
    """What the message says, under the names of `fedlora status RUN_DIR --format json`; None: unknown."""
    words = _words(message, _STATUS)
    told = {
        client: _optional(spent, "epsilon") for client, spent in sorted(message.epsilon_by_client.items())
    }
    newest = round_words(message.newest) if message.HasField("newest") else None
    return {
        **words,
        "epsilon_by_client": told if message.private else None,
        "newest": newest and {name: newest[name] for name in NEWEST},
    }


def round_message(line: Mapping[str, Any]) -> Round:
    """The message of a line of rounds.jsonl."""
    return Round(**_given(line, _ROUND))


def round_words(message: Round) -> dict[str, Any]:
    """The line of rounds.jsonl that the message was made of."""
    return _words(message, _ROUND)


def _given(words: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    present = {name: words[name] for name in names if words.get(name) is not None}
    for message in ("epsilon_by_client", "newest"):
        present.pop(message, None)
    return {name: _sound(value) for name, value in present.items()}


def _sound(value: Any) -> Any:
    match value:
        case str():
            return _text(value)
        case list():
            return [_sound(entry) for entry in value]
        case dict():
            return {_text(key): _sound(entry) for key, entry in value.items()}
        case _:
            return value


def _text(value: str) -> str:
    """JSON may hold half a surrogate pair, protobuf refuses it."""
    return value.encode("utf-8", "replace").decode()


def _words(message: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _optional(message, name) for name in names}


def _optional(message: Any, name: str) -> Any:
    if name in _REPEATED:
        return list(getattr(message, name))
    if name in _MAPS:
        return dict(sorted(getattr(message, name).items()))
    field = message.DESCRIPTOR.fields_by_name[name]
    return None if field.has_presence and not message.HasField(name) else getattr(message, name)
