"""The nodes behind Flower's ids: who they say they are, and one message at a time to them and from them."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import WireError
from fedlora.transport.flower_client import HELLO, Hello, hello_of

log = logging.getLogger(__name__)

POLL_S = 0.1
HELLO_TTL_S = 300.0
GREET_AGAIN_S = 10.0
AGAIN_S = 2.0
"""Between a message that was lost and the next try."""

Watch = Callable[[Error | None], None]
"""Called at every poll and with every error message; raises where the transport itself cannot go on."""


class Nodes:
    """Who is behind which node id: learnt from hellos, kept up to date as nodes come back under new ids.

    Where nodes join by a registered key, the key's name is the only client that its node can be.
    """

    def __init__(self, grid: Grid, accepts: Callable[[Hello], bool]) -> None:
        self.grid = grid
        self.accepts = accepts
        self.hellos: dict[str, Hello] = {}
        self._ids: dict[str, int] = {}
        self._greet_at: dict[int, float] = {}
        self._asked: dict[str, int] = {}

    def online(self) -> dict[str, int]:
        """Node id of every client that can be reached now. Nodes seen for the first time are sent a hello."""
        online = {node.node_id: node.name for node in self.grid.get_nodes()}
        now = time.monotonic()
        for node in sorted(node for node in online if self._greet_at.get(node, now) <= now):
            if identifier := push(self.grid, RecordDict(), node, HELLO, HELLO_TTL_S):
                self._asked[identifier] = node
                self._greet_at[node] = math.inf
        for message in pull(self.grid, self._asked):
            if (node := self._asked.pop(message.metadata.reply_to_message_id, None)) is not None:
                self._meet(node, message, online)
        return {client: node for client, node in self._ids.items() if node in online}

    def _meet(self, node: int, message: Message, online: Mapping[int, str]) -> None:
        if message.has_error():
            self._greet_at[node] = time.monotonic() + AGAIN_S  # it may have been starting still
            return
        # Whoever cannot be taken for what it says may be mended and started again.
        self._greet_at[node] = time.monotonic() + GREET_AGAIN_S
        try:
            hello = hello_of(message.content)
        except WireError as error:
            log.warning("node %d sent %s", node, error)
            return
        if (name := online.get(node)) and name != hello.client:
            log.warning(
                "the node with the key of %r says it is %.200r; it is ignored: write client: %s into its node.yaml, "
                "or register its key under the other name",
                name,
                hello.client,
                name,
            )
            return
        if self._ids.get(hello.client, node) in online.keys() - {node}:
            # The other may be gone and not known to be yet.
            log.warning(
                "node %d says it is %r, as another one online does; it is ignored", node, hello.client
            )
        elif self.accepts(hello):
            self._greet_at[node] = math.inf
            self._ids[hello.client] = node
            self.hellos[hello.client] = hello


def meet(nodes: Nodes, ready: Callable[[dict[str, Hello]], bool], watch: Watch = lambda error: None) -> None:
    """Enough nodes have said hello for `ready` to agree; waits as long as that takes."""
    while True:
        watch(None)
        online = nodes.online()
        if ready({client: nodes.hellos[client] for client in online}):
            return
        time.sleep(POLL_S)


def push(grid: Grid, content: RecordDict, node: int, kind: str, ttl_s: float) -> str | None:
    """The id of the message, now on its way; None if Flower does not know the node."""
    # One at a time: for an unknown node the deployed grid answers '' in its place, the simulated one nothing.
    identifiers = list(grid.push_messages([Message(content, node, kind, ttl=ttl_s)]))
    return (identifiers[0] or None) if identifiers else None


def pull(grid: Grid, waiting: Collection[str]) -> list[Message]:
    """Replies to messages we wait for; one that is pulled is gone from Flower."""
    if not waiting:
        return []
    messages = list(grid.pull_messages(list(waiting)))
    return [message for message in messages if message.metadata.reply_to_message_id in waiting]
