"""What keeps a server's run going: submits it, starts its process, and submits it again until it is finished.

Safe to kill at any moment: what has to be remembered is on the disk before it is acted on, the process that works on
the run outlives its supervisor, and which runs are ours is read off the SuperLink's own list.
"""

import hashlib
import json
import logging
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.deploy.superlink import Control, Submitted, SuperLink, SuperLinkAwayError
from fedlora.deploy.worker import LOG, Worker
from fedlora.disk import whole_lines, write_durably
from fedlora.errors import ConfigError, IncompleteError, PrivacyError
from fedlora.provision.node_keys import nodes_to_register

log = logging.getLogger(__name__)

POLL_S = 0.5
"""How often the run's state is asked for; nothing that waits for it is faster."""
AWAY_S = 5.0
"""The longest between two looks for a SuperLink that is away."""
BACKOFF_S = (1.0, 30.0)
"""Before a run is submitted again: the first time, and at most; doubled each time without a new round."""
ATTEMPTS = 6
"""Runs in a row without a new round, after which somebody has to look."""
GRACE_S = 10.0
"""What a process gets to find out by itself that its run is over."""
SUBMITTED = "submitted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What outlives the supervisor, in submitted.json.

    name marks our bundles; fabs are their digests, each written before a run with it is submitted, so that no run of
    ours is ever unknown to us; run_id and series_id are those of the newest run, for people to read.
    """

    name: str
    fabs: tuple[str, ...] = ()
    run_id: int | None = None
    series_id: int | None = None


class Supervisor:
    """One run directory, one SuperLink, which serves nothing else meanwhile."""

    def __init__(
        self,
        run_dir: Path,
        superlink: SuperLink,
        *,
        worker: Worker,
        order: Callable[[str], dict[str, Any]],
        bundle: Callable[[str], bytes],
        nodes: Path | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Reads what an earlier supervisor remembered.

        Args:
            run_dir: exists, and no other supervisor works on it.
            superlink: where the run goes.
            worker: starts the process that works on a run.
            order: what that process is told, from the token of its task.
            bundle: the FAB of a run, from its name.
            nodes: a nodes.json, whose keys are registered and no others, and again when it changes.
            attempts: see ATTEMPTS.
        """
        self.run_dir = run_dir
        self.superlink = superlink
        self.worker = worker
        self.order = order
        self.nodes = nodes
        self.attempts = attempts
        self.memory = _load_memory(run_dir) or Memory(name=secrets.token_hex(8))
        self.fab = bundle(self.memory.name)
        self.keys = {} if nodes is None else nodes_to_register(nodes)
        self._keys_of: tuple[int, int] | None = None
        self._watched: int | None = None
        self._ended: int | None = None
        self._rounds = self._count_rounds()
        self._told = self._rounds
        self._idle_runs = 0
        self._not_before = 0.0
        self._orphan_since: float | None = None

    def run(self) -> None:
        """The run is finished: its summary.json is there, and nobody works on it any more.

        Raises:
            ConfigError, PrivacyError: what the server's process found wrong; no second attempt would mend it.
            IncompleteError: too many attempts in a row without a new round.
        """
        attached: bool | None = None
        wait = POLL_S
        with self.superlink.connected() as control:
            while not self._is_finished():
                self._tell_rounds()
                try:
                    if attached is not True:
                        self._keys_of = None  # a SuperLink that came back may have forgotten them
                    self._step(control)
                except SuperLinkAwayError as error:
                    if attached is not False:
                        log.warning("waiting for the SuperLink at %s: %s", self.superlink.address, error)
                    attached, wait = False, min(2 * wait, AWAY_S)
                else:
                    if attached is not True:
                        log.info("attached to the SuperLink at %s", self.superlink.address)
                    attached, wait = True, POLL_S
                time.sleep(wait)

    def _tell_rounds(self) -> None:
        if (rounds := self._count_rounds()) > self._told:
            log.info("round %d is done", rounds - 1)
            self._told = rounds

    def _step(self, control: Control) -> None:
        self._register(control)
        newest = self._newest(control)
        if newest is None or newest.finished:
            self._submit_again(control, newest)
            return
        if self._watched != newest.run_id:
            log.info("following run %d", newest.run_id)
            self._watched = newest.run_id
        if newest.pending:
            self._take(control, newest)
        elif not self.worker.is_at_work() and (now := control.run(newest.run_id)) is not None:
            # Asked anew, since a process tells how it ended before it ends. One that was killed told nothing: its run
            # is left to expire (60 s), for a SuperNode that is just receiving a message when the run is stopped
            # keeps half of it, and is of no use for minutes (flwr 1.41, _pull_and_store_message).
            self._submit_again(control, now)

    def _register(self, control: Control) -> None:
        if self.nodes is None:
            return
        try:
            stat = self.nodes.stat()
            version = (stat.st_mtime_ns, stat.st_ino)
            if self._keys_of == version:
                return
            self.keys = nodes_to_register(self.nodes)
        except (ConfigError, OSError) as error:
            version = (0, 0)
            if self._keys_of == version:
                return
            log.error("%s; the nodes known before stay", error)
        new = [name for name, key in self.keys.items() if control.register(name, key)]
        if new:
            log.info("registered: %s", ", ".join(sorted(new)))
        if gone := control.unregister_others(self.keys.values()):
            log.info("not registered any more: %s", ", ".join(sorted(gone)))
        if barred := control.barred(self.keys.values()):
            log.error(
                "%s: taken off the list once, and a SuperLink takes no key twice; have new keys made under new names",
                ", ".join(sorted(barred)),
            )
        self._keys_of = version

    def _newest(self, control: Control) -> Submitted | None:
        """The newest run of ours that the SuperLink knows."""
        if self._watched is not None and (found := control.run(self._watched)) is not None:
            return found
        return next((run for run in control.runs() if run.fab in self.memory.fabs), None)

    def _take(self, control: Control, run: Submitted) -> None:
        if self.worker.is_at_work():
            return
        if (task := control.acquire()) is None:
            return
        run_id, token = task
        if run_id != run.run_id:
            log.warning(
                "run %d is not the one to work on, and nothing of it is run here: it is stopped", run_id
            )
            control.stop(run_id)
            return
        self.worker.start(self.order(token))
        log.info("process %s works on run %d; it says what it does in %s", self.worker.pid(), run_id, LOG)

    def _submit_again(self, control: Control, ended: Submitted | None) -> None:
        if self.worker.is_at_work():
            self._end_orphan()
            return
        self._orphan_since = None
        if self._is_finished():
            return
        if ended is not None and ended.run_id == self._watched and ended.run_id != self._ended:
            self._ended = ended.run_id
            self._judge(ended)
        if time.monotonic() < self._not_before:
            return
        digest = hashlib.sha256(self.fab).hexdigest()
        if digest not in self.memory.fabs:
            self._remember(replace(self.memory, fabs=(*self.memory.fabs, digest)))
        if ended is None and self.memory.series_id is not None:
            log.warning("the SuperLink has forgotten series %d; a new one begins", self.memory.series_id)
        run_id, series_id = control.submit(self.fab, None if ended is None else ended.series_id)
        self._watched = run_id
        self._remember(replace(self.memory, run_id=run_id, series_id=series_id))
        log.info("run %d submitted, in series %d", run_id, series_id)

    def _judge(self, ended: Submitted) -> None:
        """How long to wait after a run that ended unfinished, or that there is no sense in another one."""
        if ended.exit_status == ConfigError.exit_status:
            raise ConfigError(ended.words)
        if ended.exit_status == PrivacyError.exit_status:
            raise PrivacyError(ended.words)
        before, self._rounds = self._rounds, self._count_rounds()
        self._idle_runs = 1 if self._rounds > before else self._idle_runs + 1
        if self._idle_runs >= self.attempts:
            raise IncompleteError(
                f"{self._idle_runs} runs in a row ended without a new round, the last one so: {ended.words}; look into "
                f"{self.run_dir / LOG}, then give the same command again: it goes on after round {self._rounds - 1}"
            )
        first, most = BACKOFF_S
        wait = min(first * 2 ** (self._idle_runs - 1), most)
        self._not_before = time.monotonic() + wait
        log.warning("run %d ended unfinished (%s); again in %.0f s", ended.run_id, ended.words, wait)

    def _end_orphan(self) -> None:
        """Our process, whose run is over, is ended if it does not notice."""
        now = time.monotonic()
        self._orphan_since = self._orphan_since or now
        if now > self._orphan_since + 2 * GRACE_S:
            self.worker.end(signal.SIGKILL)
        elif now > self._orphan_since + GRACE_S:
            self.worker.end(signal.SIGTERM)

    def _is_finished(self) -> bool:
        # Its being there is enough, since it is written durably.
        return (self.run_dir / "summary.json").exists() and not self.worker.is_at_work()

    def _count_rounds(self) -> int:
        return len(whole_lines(self.run_dir / "rounds.jsonl"))

    def _remember(self, memory: Memory) -> None:
        words = {"name": memory.name, "fabs": memory.fabs, "run": memory.run_id, "series": memory.series_id}
        write_durably(self.run_dir / SUBMITTED, json.dumps(words, indent=2) + "\n")
        self.memory = memory


def _load_memory(run_dir: Path) -> Memory | None:
    path = run_dir / SUBMITTED
    if not path.exists():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return Memory(
            name=str(words["name"]),
            fabs=tuple(words["fabs"]),
            run_id=words["run"],
            series_id=words["series"],
        )
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is damaged; remove it: a new run is then submitted, which goes on after the last round"
        ) from None
