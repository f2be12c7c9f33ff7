"""A node that is killed at any moment, the server that asks again, and a tap that has every byte in between.

The tap is the judge: whatever it has seen was paid for in the ledger before its first byte left, and no round has been
answered by two different replies.
"""

import hashlib
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.config.node import NodeConfig
from fedlora.deploy import node as node_module
from fedlora.deploy.node import DeployedNode
from fedlora.errors import LedgerError, WireError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_format import Contents, events_of, parse
from fedlora.privacy.outbox import Outbox
from fedlora.training import client as client_module
from fedlora.transport.wire import decode_reply, encode_reply, encode_request
from fedlora.values import ClientUpdate, Refusal, RefusalReason, TrainRequest

CHUNK = 256
"""Bytes that leave at once, so that a reply can be cut off in the middle."""

PARTICIPATIONS = 12
"""A budget that a dozen attempts empty, so that kills meet its end too; the next one has a ledger of its own."""

LINGER_S = 0.003
"""A process waits that long after its last byte, as one does for an acknowledgement: time to be killed in."""

Send = Callable[[bytes], None]
Behaviour = Callable[[DeployedNode, bytes, Send], None]
"""What a node's process does with a request's frame."""


def honest(node: DeployedNode, frame: bytes, send: Send) -> None:
    """The real node."""
    send(node.answer(frame))


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What came of one asking: all bytes that left, and the ledger as it was when the first of them did."""

    round: int
    received: bytes
    ledger: bytes
    killed: bool
    seconds: float

    @property
    def reply(self) -> ClientUpdate | Refusal | None:
        """What was received, if it is whole."""
        try:
            return decode_reply(self.received)
        except WireError:
            return None


class Site:
    """A node with a ledger of its own in `folder`; each asking is answered by a new process forked from this one."""

    def __init__(self, config: NodeConfig, request: TrainRequest, folder: Path, loaded: DeployedNode) -> None:
        """Takes model, records and terms from `loaded`, which a fresh process would need seconds for."""
        folder.mkdir(parents=True)
        self.config = config.model_copy(update={"ledger": str(folder / "ledger.jsonl")})
        self.request = request
        self.node = DeployedNode(self.config)
        for name in ("_model", "_examples", "_fingerprint", "_terms"):
            self.node.__dict__[name] = getattr(loaded, name)
        self.heard: list[Heard] = []

    @property
    def ledger(self) -> Path:
        """The file."""
        return Path(self.config.ledger)

    def contents(self) -> Contents | None:
        """The ledger as a new process would read it, nothing repaired."""
        return parse(self.ledger.read_bytes(), "ledger") if self.ledger.exists() else None

    def ask(
        self,
        number: int,
        *,
        kill_after: float | None = None,
        kill_at: int | None = None,
        prepare: Callable[[], None] = lambda: None,
        behaviour: Behaviour = honest,
    ) -> Heard:
        """Asks for round `number`; the process is killed after so many seconds, or bytes, unless it has ended.

        prepare: is called in the process that answers, before it does.
        """
        frame = encode_request(replace(self.request, round=number))
        read, write = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os.close(read)
                prepare()
                behaviour(self.node, frame, lambda reply: _send(write, reply))
                time.sleep(LINGER_S)
            os._exit(0)
        os.close(write)
        received, ledger = self._tapped(read, child, kill_after, kill_at)
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = Heard(
            round=number,
            received=received,
            ledger=ledger,
            killed=status == -signal.SIGKILL,
            seconds=time.monotonic() - began,
        )
        self.heard.append(found)
        return found

    def _tapped(
        self, read: int, child: int, kill_after: float | None, kill_at: int | None
    ) -> tuple[bytes, bytes]:
        ends = None if kill_after is None else time.monotonic() + kill_after
        received, ledger = b"", b""
        while True:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not select.select([read], [], [], left)[0]:
                os.kill(child, signal.SIGKILL)
                ends = None
                continue
            part = os.read(read, 1 << 16)
            if not part:
                return received, ledger
            if not received and self.ledger.exists():
                ledger = self.ledger.read_bytes()
            received += part
            if kill_at is not None and len(received) >= kill_at:
                os.kill(child, signal.SIGKILL)

    def violations(self) -> list[str]:
        """Every promise that what was heard so far, and what lies on disk now, breaks."""
        found = [words for heard in self.heard if heard.received for words in self._unpaid(heard)]
        for number in {heard.round for heard in self.heard}:
            whole = [h for h in self.heard if h.round == number and isinstance(h.reply, ClientUpdate)]
            if len({heard.received for heard in whole}) > 1:
                found.append(f"round {number} was released twice")
        try:
            contents = self.contents()
        except LedgerError as error:
            return [*found, f"the ledger cannot be read: {error}"]
        return [*found, *_overspent(contents, Budget.of(self.config.budget))]

    def _unpaid(self, heard: Heard) -> list[str]:
        if isinstance(heard.reply, Refusal):
            return []
        paid = self._paid(parse(heard.ledger, "ledger"), heard.round) if heard.ledger else []
        digest = hashlib.sha256(heard.received).hexdigest()
        if heard.reply is not None:
            return [] if digest in paid else [f"round {heard.round} was sent before it was paid and recorded"]
        if any(refusal.startswith(heard.received) for refusal in self._refusals(heard.round)):
            return []
        kept = Outbox(Path(f"{self.config.ledger}.outbox")).find(self.request.run, heard.round)
        if kept is None or kept.payload not in paid or not kept.frame.startswith(heard.received):
            return [f"round {heard.round}: {len(heard.received)} bytes of no recorded reply were sent"]
        return []

    def _paid(self, contents: Contents, number: int) -> list[str]:
        """Digests of all that was released for this round."""
        debits = [
            debit for debit in contents.debits if (debit.run, debit.round) == (self.request.run, number)
        ]
        return [release for debit in debits if (release := contents.released(debit.seq)) is not None]

    def _refusals(self, number: int) -> list[bytes]:
        whose = {"client": self.config.client, "run": self.request.run, "round": number}
        return [encode_reply(Refusal(**whose, reason=reason)) for reason in RefusalReason]


def _overspent(contents: Contents | None, budget: Budget) -> list[str]:
    debits = () if contents is None else contents.debits
    if len(debits) > budget.max_participations:
        return [f"{len(debits)} participations of {budget.max_participations} were paid"]
    spent = epsilon(events_of(debits), budget.target_delta, budget.accountant)
    return [f"epsilon {spent} of {budget.target_epsilon} was spent"] if spent > budget.target_epsilon else []


def _send(pipe: int, reply: bytes) -> None:
    for start in range(0, len(reply), CHUNK):
        os.write(pipe, reply[start : start + CHUNK])
        time.sleep(0.0005)


def die() -> None:
    """No cleaning up, no last word."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies_after(owner: object, name: str, calls: int = 1) -> None:
    """`owner.name` works `calls` times, then the process is gone."""
    real, left = getattr(owner, name), [calls]

    def last(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        left[0] -= 1
        if left[0] == 0:
            die()
        return result

    setattr(owner, name, last)


def dies_half_sent() -> None:
    """The process is gone when half of a reply has left."""
    real, sent = os.write, [0]

    def half(descriptor: int, text: bytes) -> int:
        if len(text) == CHUNK and sent[0] == 6:
            die()
        sent[0] += len(text) == CHUNK
        return real(descriptor, text)

    os.write = half


POINTS: dict[str, Callable[[], None]] = {
    "C1 request received": lambda: dies_after(node_module, "decode_request"),
    "C2 debit durable": lambda: dies_after(Ledger, "debit"),
    "C3 mid-training": lambda: dies_after(client_module, "descend"),
    "C4 payload computed": lambda: dies_after(node_module, "encode_reply"),
    "C5 payload cached": lambda: dies_after(Outbox, "keep"),
    "C5b release recorded": lambda: dies_after(Ledger, "release"),
    "C6 half sent": dies_half_sent,
    "C7 sent": lambda: setattr(os, "_exit", lambda status: die()),
}
"""Where a process can be made to die: what is done in it beforehand."""


def sends_first(node: DeployedNode, frame: bytes, send: Send) -> None:
    """Broken: makes its reply on a copy, sends it, and pays afterwards."""
    ledger, outbox = Path(node.config.ledger), Path(f"{node.config.ledger}.outbox")
    aside = ledger.parent / f"aside-{os.getpid()}"
    aside.mkdir()
    for path in (ledger, Path(f"{ledger}.key")):
        if path.exists():
            shutil.copy2(path, aside)
    if outbox.exists():
        shutil.copytree(outbox, aside / outbox.name)
    _on(node, aside / ledger.name)
    send(node.answer(frame))
    shutil.copytree(aside, ledger.parent, dirs_exist_ok=True)


def never_pays(node: DeployedNode, frame: bytes, send: Send) -> None:
    """Broken: keeps its replies, but its debits go to a ledger that nobody looks at."""
    aside = Path(node.config.ledger).parent / "aside"
    _on(node, aside / "ledger.jsonl")
    send(node.answer(frame))


def _on(node: DeployedNode, ledger: Path) -> None:
    node.__init__(node.config.model_copy(update={"ledger": str(ledger)}))


def keeps_nothing() -> None:
    """Broken: no reply is stored, so the next one is another."""
    Outbox.keep = lambda self, kept: None


def records_nothing() -> None:
    """Broken: the ledger never learns what came of a debit."""
    Ledger.release = lambda self, debit, payload: None


def knows_no_limit() -> None:
    """Broken: no budget is ever spent."""
    from fedlora.privacy import ledger

    for module in (node_module, client_module, ledger):
        module.would_exceed = lambda *anything: False
