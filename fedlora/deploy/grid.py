"""Flower's grid, but nobody waits for one reply: what is still being uploaded comes with a later pull.

Flower's own waits inside the pull for a reply whose upload broke off, for up to three minutes, and hears nobody else
meanwhile; one node could hold a federation up by it. Read in flwr 1.41.0, like the rest of this room.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
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

from fedlora.deploy.endpoint import GONE


@dataclass(slots=True)
class _Arriving:
    """A reply that is claimed, and what has come of it."""

    message_id: str
    object_ids: list[str]
    objects: dict[str, bytes] = field(default_factory=dict)


class PatientGrid(HttpGrid):
    """See above. Whatever is no reply to a message that was asked for stays where it is."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._arriving: dict[str, _Arriving] = {}

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
        """The reply to this message, or an error in its place if it never will be whole; None while it arrives."""
        reply, run_id = self._arriving[identifier], self.run.run_id
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, run_id)
        try:
            for object_id in reply.object_ids:
                if object_id not in reply.objects:
                    reply.objects[object_id] = pull(object_id)
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            del self._arriving[identifier]
            return self._broken_off(identifier)
        del self._arriving[identifier]
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=reply.message_id)
        )
        message = cast(Message, inflate_object_from_contents(reply.message_id, reply.objects))
        message.metadata.__dict__["_message_id"] = reply.message_id
        return message

    def _broken_off(self, identifier: str) -> Message:
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
        return make_message(metadata=metadata, error=Error(code=GONE, reason="its upload broke off"))
