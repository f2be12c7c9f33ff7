"""Flower's grid, but nobody waits for one reply: what is still being uploaded comes with a later pull.

Flower's own waits inside the pull for a reply whose upload broke off, for up to three minutes, and hears nobody else
meanwhile; one node could hold a federation up by it. Read in flwr 1.41.0, like the rest of this room.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid

log = logging.getLogger(__name__)

ROOM = 1 << 20
"""Bytes of a message without its numbers."""
MOST_OBJECTS = 4096
"""Parts of one message: Flower cuts an array every 5 MiB."""


@dataclass(slots=True)
class _Arriving:
    """A reply that is claimed, and what has come of it."""

    message_id: str
    object_ids: list[str]
    objects: dict[str, bytes] = field(default_factory=dict)


class PromptGrid(HttpGrid):
    """Flower's grid, that hands over whole replies and leaves the others for a later pull."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._arriving: dict[str, _Arriving] = {}
        self._most = ROOM

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See Grid. No reply may be larger than the largest message that was sent."""
        sent = list(messages)
        self._most = max([self._most, *(ROOM + _size(message) for message in sent)])
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See Grid."""
        wanted = set(message_ids)
        if unclaimed := wanted - self._arriving.keys():
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unclaimed))
            for words, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                parts = [part.object_id for part in iterate_object_tree(tree)]
                self._arriving[words.metadata.reply_to_message_id] = _Arriving(
                    words.metadata.message_id, parts
                )
        arrived = [self._arrived(identifier) for identifier in sorted(wanted & self._arriving.keys())]
        return [message for message in arrived if message is not None]

    def _arrived(self, identifier: str) -> Message | None:
        """The reply to this message, or an error in its place if it never will be one; None while it arrives."""
        reply, run_id = self._arriving[identifier], self.run.run_id
        try:
            if not self._pull_parts(reply):
                return self._error(
                    identifier, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "it is larger than any reply"
                )
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            return self._error(identifier, ErrorCode.MESSAGE_UNAVAILABLE, "its upload broke off")
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=reply.message_id)
        )
        try:
            message = cast(Message, inflate_object_from_contents(reply.message_id, reply.objects))
            if not message.has_error():
                message.content.items()
        except Exception as error:
            # Flower looks at the hash of an object and not at what is in it: a node can put anything there.
            log.warning("a reply is no message: %s", type(error).__name__)
            return self._error(identifier, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "it is no message")
        del self._arriving[identifier]
        message.metadata.__dict__["_message_id"] = reply.message_id
        return message

    def _pull_parts(self, reply: _Arriving) -> bool:
        """All parts are here; False if they are more or larger than those of any reply."""
        if len(reply.object_ids) > MOST_OBJECTS:
            return False
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self.run.run_id)
        for object_id in reply.object_ids:
            if object_id not in reply.objects:
                reply.objects[object_id] = pull(object_id)
                if sum(map(len, reply.objects.values())) > self._most:
                    return False
        return True

    def _error(self, identifier: str, code: int, reason: str) -> Message:
        del self._arriving[identifier]
        metadata = Metadata(
            run_id=self.run.run_id,
            message_id="",
            src_node_id=self.node.node_id,
            dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=identifier,
            created_at=now().timestamp(),
        )
        return make_message(metadata=metadata, error=Error(code=code, reason=reason))


def _size(message: Message) -> int:
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(len(array.data) for record in records for array in record.values())
