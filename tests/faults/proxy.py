"""A TCP link that can be made slow, cut, reset, held, lossy, flipped, refused or doubled, and is well again when told.

In user space, in a thread of its own, without any right. What is random in it follows from the seed, the number of the
connection and the direction, never from how the bytes happened to be cut into pieces.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, TypeAlias, TypeVar

Way: TypeAlias = Literal["up", "down"]
"""up: from who connects to the target; down: its answers."""
BOTH: tuple[Way, Way] = ("up", "down")
PIECE = 1 << 16
WAIT_S = 10.0
"""The loop answers at once; a test is not to hang where it does not."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What is wrong with the link now; nothing, as it stands."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate: float | None = None
    held: frozenset[Way] = frozenset()
    lost: frozenset[Way] = frozenset()
    cut_after: tuple[Way, int] | None = None
    flipped: tuple[Way, int] | None = None
    refused: bool = False
    doubled: bool = False


@dataclass(eq=False, slots=True)
class _Link:
    """One connection: both ends of it, and a third where it is doubled."""

    number: int
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    shadow: asyncio.StreamWriter | None = None

    def reset(self) -> None:
        for writer in (self.near, self.far, self.shadow):
            if writer is not None:
                _reset(writer)


@dataclass(slots=True)
class _Stream:
    """One direction of one connection: how far it has come, and which bits will flip."""

    way: Way
    draw: Random
    passed: int = 0
    next_flip: int = -1
    gap: int = field(default=0)

    def flip(self, piece: bytes, every: int) -> bytes:
        """About one bit in so many bytes is another, at places that only the seed decides."""
        changed = bytearray(piece)
        if self.gap != every:
            self.gap, self.next_flip = every, self.draw.randrange(every)
        while self.next_flip < self.passed + len(piece):
            if self.next_flip >= self.passed:
                changed[self.next_flip - self.passed] ^= 1 << self.draw.randrange(8)
            self.next_flip += 1 + self.draw.randrange(2 * every)
        return bytes(changed)


class FaultProxy:
    """Stands on a port of its own before a target on loopback; every fault may come and go while it runs."""

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        """Listens at once, at `port`, and passes everything on."""
        self.target_port = target_port
        self.seed = seed
        self.accepted = 0
        """Connections ever taken, refused ones included."""
        self.passed = dict.fromkeys(BOTH, 0)
        """Bytes handed on, each way."""
        self._faults = Faults()
        self._armed: tuple[bytes, Faults] | None = None
        self._links: set[_Link] = set()
        self._free_at = dict.fromkeys(BOTH, 0.0)
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._relay, "127.0.0.1", 0, limit=PIECE))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Each piece comes so much later, and up to `jitter` more."""
        self._set(delay_s=seconds, jitter_s=jitter)

    def slow(self, rate: float) -> None:
        """So many bytes a second go each way, all connections together."""
        self._set(rate=rate)

    def hold(self, *ways: Way) -> None:
        """A partition: nothing comes through, and all of it once the link is well, as TCP would see to."""
        self._set(held=frozenset(ways or BOTH))

    def lose(self, *ways: Way) -> None:
        """A black hole: what is sent is taken and gone, and its connections are of no use afterwards."""
        self._set(lost=frozenset(ways or BOTH))

    def cut(self, after: int, way: Way) -> None:
        """Each connection ends when so many of its bytes have gone this way: who sent them sees a reset."""
        self._set(cut_after=(way, after))

    def flip(self, every: int, way: Way) -> None:
        """About one bit in so many bytes arrives as another."""
        self._set(flipped=(way, every))

    def refuse(self) -> None:
        """New connections are reset as soon as they are made; those that are there stay."""
        self._set(refused=True)

    def double(self) -> None:
        """What is sent over a new connection reaches the target twice; the second answers go nowhere."""
        self._set(doubled=True)

    def reset(self) -> None:
        """Every connection that is there ends with RST on both sides."""
        self._call(self._reset())

    def arm(self, mark: bytes, *, held: Sequence[Way] = (), lost: Sequence[Way] = ()) -> None:
        """As these bytes go up, and before they arrive, the link becomes held or lossy in these directions."""
        self._armed = mark, Faults(held=frozenset(held), lost=frozenset(lost))

    @property
    def struck(self) -> bool:
        """Whether what `arm` waited for has come."""
        return self._armed is None

    def retarget(self, port: int) -> None:
        """New connections go to another port, as when a name gets another address."""
        self.target_port = port

    def heal(self) -> None:
        """No fault is left, and none is armed."""
        self._armed = None
        self._call(self._change(Faults()))

    def close(self) -> None:
        """Nothing listens any more, no connection is left, and the thread is gone."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def _set(self, **changes: Any) -> None:
        self._call(self._change(replace(self._faults, **changes)))

    async def _change(self, faults: Faults) -> None:
        self._faults = faults
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reset(self) -> None:
        for link in [*self._links]:
            link.reset()

    async def _close(self) -> None:
        self._server.close()
        await self._change(Faults())
        await self._reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.accepted += 1
        number = self.accepted
        if self._faults.refused:
            _reset(near)
            return
        shadow = None
        try:
            answers, far = await asyncio.open_connection("127.0.0.1", self.target_port, limit=PIECE)
            if self._faults.doubled:
                dropped, shadow = await asyncio.open_connection("127.0.0.1", self.target_port)
                asyncio.ensure_future(_drain(dropped))  # noqa: RUF006 - it ends with its connection
        except OSError:
            _reset(near)
            return
        link = _Link(number, near, far, shadow)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, reader, (far, *([] if shadow is None else [shadow])), "up"),
                self._pump(link, answers, (near,), "down"),
            )
        except (OSError, asyncio.CancelledError):
            link.reset()
        finally:
            self._links.discard(link)
            for writer in (near, far, shadow):
                if writer is not None:
                    writer.close()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writers: tuple[asyncio.StreamWriter, ...], way: Way
    ) -> None:
        stream = _Stream(way, Random(f"{self.seed} {link.number} {way}"))
        while piece := await reader.read(self._piece()):
            if way == "up" and self._armed is not None and self._armed[0] in piece:
                (_, faults), self._armed = self._armed, None
                await self._change(faults)
            await self._linger(stream, len(piece))
            await self._until(lambda: way not in self._faults.held)
            faults = self._faults
            size = len(piece)
            if faults.flipped is not None and faults.flipped[0] == way:
                piece = stream.flip(piece, faults.flipped[1])
            stream.passed += size
            if way in faults.lost:
                continue
            over = 0
            if faults.cut_after is not None and faults.cut_after[0] == way:
                over = stream.passed - faults.cut_after[1]
                piece = piece[: max(0, size - over)] if over > 0 else piece
            for writer in writers:
                writer.write(piece)
                await writer.drain()
            self.passed[way] += len(piece)
            if over >= 0 and faults.cut_after is not None and faults.cut_after[0] == way:
                # What has passed arrives: an RST could overtake it.
                for writer in writers:
                    writer.close()
                _reset(link.near if way == "up" else link.far)
                return
        await self._until(lambda: way not in self._faults.held)
        for writer in writers:
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()

    def _piece(self) -> int:
        """Small enough that a slow link moves a little all the time, as a real one does."""
        rate = self._faults.rate
        return PIECE if rate is None else max(1, min(PIECE, int(rate / 20)))

    async def _linger(self, stream: _Stream, size: int) -> None:
        faults = self._faults
        if faults.delay_s or faults.jitter_s:
            await asyncio.sleep(faults.delay_s + faults.jitter_s * stream.draw.random())
        if faults.rate is not None:
            begins = max(self._loop.time(), self._free_at[stream.way])
            self._free_at[stream.way] = begins + size / faults.rate
            await asyncio.sleep(self._free_at[stream.way] - self._loop.time())

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            await self._changed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST, not FIN: what is under way is lost, and the other end is told so."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _drain(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(PIECE):
            pass
    except OSError:
        pass
