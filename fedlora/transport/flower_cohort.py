"""Clients behind Flower: a Cohort over any Grid, deployed or simulated.

Our loop over push_messages and pull_messages takes the place of send_and_receive, whose poll of 3 s cannot be
set and which forgets replies that miss the deadline.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict

from fedlora.errors import WireError
from fedlora.federation.events import ClientDone, Listener, outcome
from fedlora.transport.flower_client import TRAIN, frame_content, frame_of
from fedlora.transport.flower_nodes import AGAIN_S, POLL_S, Nodes, Watch, pull, push
from fedlora.transport.wire import HEADER_ROOM, decode_reply, encode_request
from fedlora.values import ClientUpdate, Refusal, RefusalReason, Reply, TrainRequest, Witness

log = logging.getLogger(__name__)

SILENCE = 0.5
"""Share of a deadline after which a client that says nothing is asked once more: a SuperLink that dies while it hands
a message out has booked it as delivered, and nobody hears of it. A client at work answers both with the same bytes."""
RETURN_S = 60.0
"""How long a client whose message was lost is waited for: as long as Flower refuses a node that died and came back."""

_FAILED = RefusalReason.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request on its way. most: bytes of its reply: no more than the request, which has A too, and a header."""

    client: str
    node: int
    run: str
    round: int
    most: int
    at: float


@dataclass(slots=True, kw_only=True)
class _Turn:
    """A client that is to be asked: how often still, not before when, and until when it is waited for while away."""

    left: int
    at: float = -math.inf
    until: float = -math.inf


class FlowerCohort:
    """A Cohort of Flower nodes. A client still at work on an earlier round is asked only if no update comes of that."""

    def __init__(
        self,
        nodes: Nodes,
        *,
        deadline_s: float,
        ttl_s: float,
        listener: Listener,
        echo: Callable[[str], Witness | None] = lambda client: None,
        watch: Watch = lambda error: None,
        asks: int = 1,
    ) -> None:
        """Binds the cohort to nodes that have said hello.

        Args:
            nodes: who is where.
            deadline_s: how long a round waits.
            ttl_s: how long Flower keeps a request and its reply: the longest staleness that is of use.
            listener: told of every reply.
            echo: how far each client's ledger is known to have come.
            watch: see Watch.
            asks: how often a client is asked in a round whose messages Flower loses, as it does when a process dies.
        """
        self.nodes = nodes
        self.deadline_s = deadline_s
        self.ttl_s = ttl_s
        self.listener = listener
        self.echo = echo
        self.watch = watch
        self.asks = asks
        self._waiting: dict[str, _Asked] = {}
        self._pulled: deque[Message] = deque()

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. A refusal waits while an update may still come of another message to the same client."""
        frame = encode_request(request)
        began = time.monotonic()
        ends = began + self.deadline_s
        self._forget_moved(self.nodes.online())
        turns = {client: _Turn(left=self.asks) for client in clients}
        unsent = list(clients)
        refused: dict[str, Refusal] = {}  # each until no update can come of its client's other messages
        while True:
            self.watch(None)
            silent = self._silent(turns, request)
            unsent += [client for client in silent if client not in unsent and client not in refused]
            for client in self._send_due(unsent, turns, frame, request, began):
                refused.setdefault(client, _refused(client, request, _FAILED))
            # What is pulled is gone from Flower, and whoever asks may leave after any reply: the rest is kept.
            if not self._pulled:
                self._pulled.extend(pull(self.nodes.grid, self._waiting))
            while self._pulled:
                message = self._pulled.popleft()
                if (asked := self._waiting.pop(message.metadata.reply_to_message_id, None)) is None:
                    continue  # a second reply to the same message
                client, in_time = asked.client, asked.round == request.round
                reply = self._reply(
                    asked, message, turns[client] if in_time and client not in refused else None
                )
                if reply is None:
                    unsent.append(client)
                    continue
                if in_time or isinstance(reply, ClientUpdate):
                    # It stands for this round; another one would be paid for, and counted in its place.
                    unsent = [other for other in unsent if other != client]
                if isinstance(reply, Refusal) and in_time:
                    refused.setdefault(client, reply)
                    continue
                if isinstance(reply, ClientUpdate):
                    refused.pop(client, None)
                    self._forget_answered(asked)
                yield self._told(reply, request)
            outstanding = {asked.client for asked in self._waiting.values() if asked.round == request.round}
            over = not (unsent or outstanding) or time.monotonic() >= ends
            for client in [client for client in refused if over or client not in outstanding]:
                yield self._told(refused.pop(client), request)
            if over:
                return
            time.sleep(POLL_S)

    def close(self) -> None:
        """See Cohort: the nodes are not ours to stop."""

    def _silent(self, turns: Mapping[str, _Turn], request: TrainRequest) -> list[str]:
        """Clients that were asked in this round, may be asked again, and have said nothing for too long."""
        last: dict[str, float] = {}
        for asked in self._waiting.values():
            if asked.round == request.round:
                last[asked.client] = max(asked.at, last.get(asked.client, -math.inf))
        limit = time.monotonic() - SILENCE * self.deadline_s
        return [client for client, at in last.items() if at < limit and turns[client].left > 0]

    def _send_due(
        self,
        unsent: list[str],
        turns: Mapping[str, _Turn],
        frame: bytes,
        request: TrainRequest,
        began: float,
    ) -> Iterator[str]:
        """Whoever of `unsent` is free is asked, and off the list; yields those who cannot be reached."""
        now = time.monotonic()
        limit = now - SILENCE * self.deadline_s
        busy = {
            asked.client
            for asked in self._waiting.values()
            if self.asks == 1 or limit <= (asked.at if asked.round == request.round else began)
        }
        due = [client for client in unsent if client not in busy and turns[client].at <= now]
        online = self.nodes.online() if due else {}
        for client in due:
            if self._send(client, online.get(client), frame, request):
                turns[client].left -= 1
            elif now < turns[client].until:
                turns[client].at = now + AGAIN_S
                continue
            else:
                yield client
            unsent.remove(client)

    def _reply(self, asked: _Asked, message: Message, turn: _Turn | None) -> Reply | None:
        """What the message says; None: the client is to be asked once more, where `turn` lets it."""
        if not message.has_error():
            return _received(asked, message.content)
        return None if self._is_lost(asked, message.error, turn) else _refused(asked.client, asked, _FAILED)

    def _is_lost(self, asked: _Asked, error: Error, turn: _Turn | None) -> bool:
        """Whether the client is to be asked once more, since Flower has no reply of it and never will."""
        log.warning("%s: Flower's error %d in round %d", asked.client, error.code, asked.round)
        self.watch(error)
        if turn is None or turn.left < 1:
            return False
        now = time.monotonic()
        turn.at, turn.until = now + AGAIN_S, now + RETURN_S
        return True

    def _send(self, client: str, node: int | None, frame: bytes, request: TrainRequest) -> bool:
        if node is None:
            return False
        content = frame_content(frame, self.echo(client))
        identifier = push(self.nodes.grid, content, node, TRAIN, self.ttl_s)
        if not identifier:
            return False
        self._waiting[identifier] = _Asked(
            client=client,
            node=node,
            run=request.run,
            round=request.round,
            most=len(frame) + HEADER_ROOM,
            at=time.monotonic(),
        )
        return True

    def _told(self, reply: Reply, request: TrainRequest) -> Reply:
        self.listener(ClientDone(round=request.round, client=reply.client, outcome=outcome(reply)))
        return reply

    def _forget_answered(self, answered: _Asked) -> None:
        """What else the client was asked for that round or before would be the same bytes, or of no use."""
        self._waiting = {
            identifier: asked
            for identifier, asked in self._waiting.items()
            if asked.client != answered.client or asked.round > answered.round
        }

    def _forget_moved(self, online: dict[str, int]) -> None:
        """A node that came back under a new id never answers what its old id was asked."""
        pulled = {message.metadata.reply_to_message_id for message in self._pulled}
        self._waiting = {
            identifier: asked
            for identifier, asked in self._waiting.items()
            if identifier in pulled or online.get(asked.client, asked.node) == asked.node
        }


def _received(asked: _Asked, content: RecordDict) -> Reply:
    """What a client answered; if that is no reply of this client, a refusal in its place, and none of it is used."""
    try:
        frame = frame_of(content)
        if len(frame) > asked.most:
            raise WireError(f"{len(frame)} bytes, a reply has at most {asked.most}")
        reply = decode_reply(frame)
    except WireError as error:
        log.warning("%s: malformed reply in round %d: %s", asked.client, asked.round, error)
        return _refused(asked.client, asked, RefusalReason.MALFORMED)
    if reply.client != asked.client:
        log.warning("%s: its reply in round %d bears another name", asked.client, asked.round)
        return _refused(asked.client, asked, RefusalReason.MALFORMED)
    # Which round a refusal is of is known better here: a late one must not pass for one of this round.
    return _refused(asked.client, asked, reply.reason) if isinstance(reply, Refusal) else reply


def _refused(client: str, asked: _Asked | TrainRequest, reason: RefusalReason) -> Refusal:
    return Refusal(client=client, run=asked.run, round=asked.round, reason=reason)
