"""FedStale's memory on disk: what was last heard of each client, in one SQLite file of records of equal length.

A record belongs to a client and to the round that its update is of. What `keep` writes counts from `commit` on, all of
it or none, whenever the process dies. A record that no checkpoint refers to any more is written over by the next one,
whole, so the file holds one for each client ever heard and those of about two rounds. Only the clients of a round are
touched, and memory holds one update and `CACHE_KIB`, however many clients there are.
"""

import errno
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.disk import make_directory
from fedlora.errors import ConfigError, IncompleteError, ShapeError
from fedlora.federation.record import Codec, Kept
from fedlora.values import Delta

FORMAT = 1
PAGE_BYTES = 32_768
"""Of 4 to 64 KiB the fastest for records of 0.3 to 3 MB (16 to 64 are close), and it wastes half a page a record."""
CACHE_KIB = 16_384
"""What SQLite holds of the file. With 2 MiB replacing records took twice as long, with 32 MiB little less."""
PATIENCE_S = 10.0
"""For somebody who copies the file just now."""

_TABLES = """
CREATE TABLE IF NOT EXISTS layout (format INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS place (
  id INTEGER PRIMARY KEY, client TEXT NOT NULL, at INTEGER NOT NULL, digest INTEGER NOT NULL, UNIQUE (client, at)
);
CREATE TABLE IF NOT EXISTS value (place INTEGER PRIMARY KEY, record BLOB NOT NULL);
"""


class StaleMemory:
    """The remembered updates of one run. One process at a time, which the run's lock sees to."""

    def __init__(self, path: Path, kept: Kept = "float32") -> None:
        """Binds the memory to a file, made when the first update is to be kept; `kept`: see `record`."""
        self.path = path
        self.kept: Kept = kept
        self._opened: sqlite3.Connection | None = None
        self._codec: Codec | None = None
        # Places that may be written over; those replaced in rounds that a checkpoint is kept of; those of this round.
        self._free: dict[int, None] = {}
        self._waiting: deque[dict[int, None]] = deque()
        self._replaced: dict[int, None] = {}

    def keep(self, client: str, at: int, update: Delta) -> Delta:
        """The client's update of round `at` is remembered from the next `commit` on, in the place of its older one.

        Args:
            client: whatever it is called.
            at: later than the round of the one that is replaced.
            update: in the frame; names, shapes and dtypes as in all others of the run.

        Returns:
            What `recall` will give, bit for bit.

        Raises:
            BasisError, ShapeError: it is no update of this run, or not in the frame.
            ConfigError: the file holds updates that are kept in another way.
            OSError: the file cannot be written.
        """
        with self._explained():
            connection = self._writing()
            codec = self._codec_for(connection, update)
            record = codec.encode(update)
            place = self._place(connection, client, at)
            connection.execute(
                "INSERT OR REPLACE INTO place VALUES (?, ?, ?, ?)",
                (place, client, at, _digest(client, at, record)),
            )
            # Of equal length, so SQLite writes over the old record where it stands.
            if not connection.execute(
                "UPDATE value SET record = ? WHERE place = ?", (record, place)
            ).rowcount:
                connection.execute("INSERT INTO value VALUES (?, ?)", (place, record))
        return codec.rounded(update)

    def recall(self, client: str, at: int) -> Delta:
        """The client's update of round `at`, in the frame.

        Raises:
            IncompleteError: it is missing or damaged.
        """
        with self._explained():
            connection = self._reading()
            found = (
                connection
                and connection.execute(
                    "SELECT digest, record FROM place JOIN value ON value.place = place.id WHERE client = ? AND at = ?",
                    (client, at),
                ).fetchone()
            )
            if connection is None or found is None:
                raise self._unusable(client, at, "missing")
            codec = self._stored_codec(connection)
        digest, record = found
        if codec is None or digest != _digest(client, at, record):
            raise self._unusable(client, at, "damaged")
        try:
            return codec.decode(record)
        except ShapeError as error:
            raise self._unusable(client, at, f"damaged ({error})") from None

    def commit(self) -> None:
        """All that was kept since the last commit is on the disk, together."""
        if self._opened is not None and self._opened.in_transaction:
            with self._explained():
                self._opened.execute("COMMIT")
        self._waiting.append(self._replaced)
        self._replaced = {}

    def prune(self, checkpoints: int) -> None:
        """What was replaced before the last `checkpoints` commits may be written over; no bytes move now."""
        while len(self._waiting) >= checkpoints:
            self._free |= self._waiting.popleft()

    def settle(self, newest: Mapping[str, int], older: Sequence[Mapping[str, int]] = ()) -> None:
        """Whatever no checkpoint refers to may be written over: what a crash left, or another process replaced.

        Args:
            newest: the round remembered of each client by the checkpoint that the run goes on from.
            older: the same of each other checkpoint that is kept.
        """
        self._free, self._waiting, self._replaced = {}, deque(), {}
        with self._explained():
            connection = self._reading()
            if connection is None:
                return
            waiting: dict[int, None] = {}
            for place, client, at in connection.execute("SELECT id, client, at FROM place"):
                if any(words.get(client) == at for words in older) and newest.get(client) != at:
                    waiting[place] = None
                elif newest.get(client) != at:
                    self._free[place] = None
            self._waiting.append(waiting)

    def forget(self, client: str) -> int:
        """No byte of any record of the client is in the file, nor its name; how many records there were. Durable."""
        with self._explained():
            if self._reading() is None:
                return 0
            connection = self._writing()
            gone = [row[0] for row in connection.execute("SELECT id FROM place WHERE client = ?", (client,))]
            for place in gone:
                connection.execute("DELETE FROM value WHERE place = ?", (place,))
                connection.execute("DELETE FROM place WHERE id = ?", (place,))
                self._free.pop(place, None)
            connection.execute("COMMIT")
        return len(gone)

    def close(self) -> None:
        """Nothing is open; what was not committed never was."""
        if self._opened is not None:
            self._opened.close()
        self._opened, self._codec = None, None
        self._free, self._waiting, self._replaced = {}, deque(), {}

    def _place(self, connection: sqlite3.Connection, client: str, at: int) -> int:
        """Where the record goes; the places of the client's other records are noted as replaced."""
        mine = dict(connection.execute("SELECT at, id FROM place WHERE client = ?", (client,)).fetchall())
        if at in mine:  # a round that a crash undid
            place = mine.pop(at)
            for noted in (self._free, *self._waiting):
                noted.pop(place, None)
        elif self._free:
            place, _ = self._free.popitem()
        else:
            (place,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM place").fetchone()
        for other in mine.values():
            if other != place and not any(other in noted for noted in (self._free, *self._waiting)):
                self._replaced[other] = None
        return place

    def _reading(self) -> sqlite3.Connection | None:
        """None where nothing was ever kept."""
        return self._connection() if self._opened is not None or self.path.exists() else None

    def _writing(self) -> sqlite3.Connection:
        connection = self._connection()
        if not connection.in_transaction:
            connection.execute("BEGIN IMMEDIATE")
        return connection

    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            make_directory(self.path.parent)
            connection = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None)
            for pragma in (
                f"page_size = {PAGE_BYTES}",
                f"cache_size = -{CACHE_KIB}",
                # A log written ahead would hold every record a second time, and be read back for each.
                "journal_mode = DELETE",
                # FULL leaves it to chance whether a power cut brings the journal back, and undoes a commit with it.
                "synchronous = EXTRA",
                # What is deleted is overwritten with zeros.
                "secure_delete = ON",
            ):
                connection.execute(f"PRAGMA {pragma}")
            connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
            self._opened = connection
        return self._opened

    def _stored_codec(self, connection: sqlite3.Connection) -> Codec | None:
        if self._codec is None:
            row = connection.execute("SELECT format, text FROM layout").fetchone()
            if row is None:
                return None
            if row[0] > FORMAT:
                raise ConfigError(
                    f"{self.path} has format {row[0]}, this fedlora reads up to {FORMAT}; update fedlora"
                )
            try:
                self._codec = Codec.read(row[1])
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(error) from error
            if self._codec.kept != self.kept:
                raise ConfigError(
                    f"{self.path} keeps updates as {self._codec.kept}, method.stale.dtype says {self.kept}; "
                    "restore the config, or start again in another directory"
                )
        return self._codec

    def _codec_for(self, connection: sqlite3.Connection, delta: Delta) -> Codec:
        codec = self._stored_codec(connection)
        if codec is None:
            codec = self._codec = Codec.of(delta, self.kept)
            connection.execute("INSERT INTO layout VALUES (?, ?)", (FORMAT, codec.text))
        return codec

    def _unusable(self, client: str, at: int, why: str) -> IncompleteError:
        return IncompleteError(
            f"{self.path}: the remembered update of {client!r}, round {at}, is {why}; restore the file, or start "
            "again in another directory"
        )

    def _damaged(self, error: Exception) -> IncompleteError:
        return IncompleteError(
            f"{self.path} is damaged ({error}); restore it, or start again in another directory"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's words become the system's, or ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _OF_THE_SYSTEM:
                raise OSError(_OF_THE_SYSTEM[code], str(error), str(self.path)) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise ConfigError(f"{self.path} is held by another process; stop that one first") from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(error) from error
            raise


_OF_THE_SYSTEM = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
}


def _digest(client: str, at: int, record: bytes) -> int:
    """Of the record and whose it is: a sum against decay and mixed-up pages, which costs a tenth of a SHA-256."""
    return zlib.crc32(record, zlib.crc32(f"{client}\x1f{at}".encode()))
