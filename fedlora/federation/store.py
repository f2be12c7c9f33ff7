"""What the server knows, on disk: checkpoints, remembered updates, plans and the round log.

checkpoints/round-000012/state.safetensors, state.json   written aside, fsynced, renamed: whole or absent
checkpoints/round-000012-without-001/                    in its place, once a client was forgotten
memory.sqlite                                            FedStale: the update last heard of each client, in the frame
plans/round-000012.json                                  who is asked, on disk before anything is sent
rounds.jsonl                                             one line a round, repaired from the checkpoint on opening
missed.json                                              who stayed away from the last round that too few answered
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.algebra.digest import adapters_of, digest, named_tensors, under
from fedlora.disk import append_durably, fsync, whole_lines, write_durably
from fedlora.errors import ConfigError, GuardError, IncompleteError
from fedlora.federation.absences import MISSED
from fedlora.federation.absorb import Absorbed, forget
from fedlora.federation.memory import StaleMemory
from fedlora.federation.record import Kept
from fedlora.values import FRAME, Delta, Gauges, Own, Recurrence, RoundPlan, RoundReport, ServerState

log = logging.getLogger(__name__)

FORMAT = 1
KEPT_CHECKPOINTS = 2


class Store:
    """The server's memory of one run, in one directory."""

    def __init__(
        self, directory: Path, run: str | None = None, noise: str | None = None, kept: Kept = "float32"
    ) -> None:
        """Binds the store to a directory; with `run`, checkpoints of any other run are refused.

        `noise` is the kind of noise that the clients' updates carry, stamped into every checkpoint; None: unknown.
        `kept`: how remembered updates are kept.
        """
        self.directory = directory
        self.run = run
        self.noise = noise
        self.checkpoints = directory / "checkpoints"
        self.memory = StaleMemory(directory / "memory.sqlite", kept)
        self.log = directory / "rounds.jsonl"

    def is_empty(self) -> bool:
        """No checkpoint was ever written."""
        return not any(self.checkpoints.glob("round-*"))

    def begin(self, state: ServerState, line: dict[str, Any]) -> None:
        """The state before the first round is durable."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._write_checkpoint(state, line)
        self._repair_log(line)

    def save_plan(self, plan: RoundPlan) -> None:
        """The plan is durable, its shares for the cohort alone; nothing may be sent before."""
        words = {
            "run": plan.run,
            "round": plan.round,
            "cohort": plan.cohort,
            "probability": {client: plan.probability[client] for client in plan.cohort},
            "weight": {client: plan.weight[client] for client in plan.cohort},
        }
        (self.directory / "plans").mkdir(exist_ok=True)
        write_durably(self.directory / "plans" / f"{_round(plan.round)}.json", _json(words))

    def commit(self, absorbed: Absorbed, line: dict[str, Any]) -> None:
        """The round is durable as a whole: memory first, then the checkpoint that refers to it, then the log."""
        self.memory.commit()
        self._write_checkpoint(absorbed.state, line)
        append_durably(self.log, _json(line))
        self._prune()

    def save_missed(self, report: RoundReport) -> None:
        """Who stayed away from a round that is not completed is durable, for whoever asks why."""
        answers = {"round": report.round, "asked": report.asked, "answered": report.answered}
        words = {**answers, "refused": dict(report.refused), "rejected": dict(report.rejected)}
        write_durably(self.directory / MISSED, _json(words))

    def close(self) -> None:
        """Nothing is open; what was not committed never was."""
        self.memory.close()

    def load(self) -> tuple[ServerState, dict[str, Any]]:
        """The newest whole checkpoint and its round's line. Reads only.

        Raises:
            IncompleteError: there is none.
        """
        _, state, words = self._newest()
        return state, words["line"]

    def _newest(self) -> tuple[Path, ServerState, dict[str, Any]]:
        for path in sorted(self.checkpoints.glob("round-*"), reverse=True):
            try:
                return path, *self._read_checkpoint(path)
            except (OSError, KeyError, ValueError, SafetensorError) as error:
                log.warning("%s is damaged (%s); falling back to the round before", path, error)
        raise IncompleteError(
            f"no whole checkpoint under {self.checkpoints}; restore one, or start again in another directory"
        )

    def recover(self) -> ServerState:
        """The state to go on from; round log and memory, which a crash may have left behind, agree with it again.

        Raises:
            ConfigError: the log lacks rounds, or another version of fedlora began the run.
            IncompleteError: there is no whole checkpoint.
        """
        if (self.directory / "memory").is_dir():
            raise ConfigError(
                f"{self.directory / 'memory'}: an earlier fedlora kept its updates there; finish this run with that "
                "one, or start again in another directory"
            )
        state, line = self.load()
        self._repair_log(line)
        logged = [line["round"] for line in whole_lines(self.log)]
        if logged != list(range(state.round + 1)):
            lost = sorted(set(range(state.round + 1)) - set(logged))
            raise ConfigError(
                f"{self.log} lacks rounds {lost}; restore it, or start again in another directory"
            )
        self.memory.settle(state.remembered, self._remembered_by_checkpoints())
        return state

    def forget(self, client: str, weight: float, counted: Callable[[int], float] = lambda at: 1.0) -> int:
        """No state and no record of the memory holds anything of the client; how many records there were.

        The newest checkpoint is replaced by one of the same round without it; older ones, and those that a crash left
        by half, are gone. Killed at any moment and done again it ends the same: what the newest checkpoint refers to
        is there throughout.

        Args:
            client: who leaves.
            weight: its share just before it leaves.
            counted: as `absorb.forget` has it, of an update of that round.

        Raises:
            IncompleteError: the newest checkpoint, or what is remembered of the client, is missing or damaged.
        """
        if self.is_empty():
            return 0
        path, state, words = self._newest()
        if path != max(self.checkpoints.glob("round-*")):
            raise IncompleteError(
                f"the newest checkpoint under {self.checkpoints} is damaged; restore it, or resume the run, then forget"
            )
        if words.get("without") != client:
            at = state.remembered.get(client)
            held = None if at is None or not self.memory.path.exists() else self.memory.recall(client, at)
            number = len([*self.checkpoints.glob(f"{_round(state.round)}-without-*")]) + 1
            path = self.checkpoints / f"{_round(state.round)}-without-{number:03d}"
            kept = {name: words[name] for name in ("run", "noise", "line")}
            without = forget(state, client, held, weight, counted=1.0 if at is None else counted(at))
            self._write(path, without, {**kept, "without": client})
        for other in {*self.checkpoints.glob("round-*"), *self.checkpoints.glob(".round-*.part")} - {path}:
            shutil.rmtree(other)
        fsync(self.checkpoints)
        return self.memory.forget(client)

    def _remembered_by_checkpoints(self) -> list[dict[str, int]]:
        """What each kept checkpoint remembers, as far as it can be read: one that cannot is no place to go back to."""
        found = []
        for path in sorted(self.checkpoints.glob("round-*")):
            with suppress(OSError, KeyError, ValueError):
                found.append(json.loads((path / "state.json").read_text())["remembered"])
        return found

    def _write_checkpoint(self, state: ServerState, line: dict[str, Any]) -> None:
        words = {"run": self.run, "noise": self.noise, "line": line}
        self._write(self.checkpoints / _round(state.round), state, words)

    def _write(self, target: Path, state: ServerState, words: Mapping[str, Any]) -> None:
        aside = target.with_name(f".{target.name}.part")
        for stale in (aside, target):
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()
        save_file(_state_tensors(state), aside / "state.safetensors")
        fsync(aside / "state.safetensors")
        write_durably(aside / "state.json", _json({**_state_words(state), **words}))
        self._require_saved(aside)
        aside.rename(target)
        fsync(self.checkpoints)

    def _require_saved(self, aside: Path) -> None:
        """Passes a checkpoint that gives back the state it was written of, by the digest taken of that one.

        Raises:
            GuardError: it does not, so it must not stand in for an older one.
        """
        try:
            self._read_checkpoint(aside)
        except (KeyError, ValueError, SafetensorError) as error:
            raise GuardError(
                f"{aside} does not give back what was saved ({error}); the checkpoint before it is kept: look after "
                "the disk and the installed safetensors, then go on with the run"
            ) from error

    def _read_checkpoint(self, path: Path) -> tuple[ServerState, dict[str, Any]]:
        words = json.loads((path / "state.json").read_text())
        if words["format"] > FORMAT:
            raise ConfigError(
                f"{path} has format {words['format']}, this fedlora reads up to {FORMAT}; update fedlora"
            )
        if self.run is not None and words["run"] != self.run:
            raise ConfigError(
                f"{path} belongs to run {words['run']}, config.yaml says {self.run}: it was changed since; restore it"
            )
        tensors = load_file(path / "state.safetensors")
        state = ServerState(
            round=words["round"],
            adapters=adapters_of(tensors, basis=words["basis"], scale=words["scale"]),
            frame=under(tensors, "frame:"),
            gauges=tuple(Gauges(basis=n, sites=under(tensors, f"gauge:{n}:")) for n in words["gauges"]),
            memory=_delta(tensors, "memory:"),
            remembered=words["remembered"],
            recurrence=Recurrence(**words.get("recurrence", {})),  # earlier versions had none
            own={
                client: Own(recurrence=Recurrence(product=product, energy=energy), beta=beta)
                for client, (product, energy, beta) in words.get("own", {}).items()
            },
            moments=tuple(_delta(tensors, f"moment:{n + 1}:") for n in range(words.get("moments", 0))),
        )
        if digest(_state_tensors(state)) != words["sha256"]:
            raise ValueError("its tensors do not match their digest")
        return state, words

    def _repair_log(self, last: dict[str, Any]) -> None:
        lines = [line for line in whole_lines(self.log) if line["round"] < last["round"]]
        write_durably(self.log, "".join(_json(line) for line in [*lines, last]))

    def _prune(self) -> None:
        for path in sorted(self.checkpoints.glob("round-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(path)
        self.memory.prune(KEPT_CHECKPOINTS)


def state_digest(state: ServerState) -> str:
    """`state_sha256`: equal for equal seeds in every runtime and after any interruption."""
    return digest(named_tensors(state.adapters), "state", state.round, state.adapters.basis)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True) + "\n"


def _round(number: int) -> str:
    return f"round-{number:06d}"


def _delta_tensors(delta: Delta, prefix: str = "") -> dict[str, Tensor]:
    tensors = {f"{prefix}b:{site}": value.contiguous() for site, value in delta.sites.items()}
    return tensors | {f"{prefix}head:{name}": value.contiguous() for name, value in delta.head.items()}


def _delta(tensors: Mapping[str, Tensor], prefix: str) -> Delta:
    return Delta(basis=FRAME, sites=under(tensors, f"{prefix}b:"), head=under(tensors, f"{prefix}head:"))


def _state_tensors(state: ServerState) -> dict[str, Tensor]:
    tensors = dict(named_tensors(state.adapters)) | _delta_tensors(state.memory, "memory:")
    for number, moment in enumerate(state.moments, start=1):
        tensors |= _delta_tensors(moment, f"moment:{number}:")
    tensors |= {f"frame:{site}": value for site, value in state.frame.items()}
    tensors |= {f"gauge:{g.basis}:{site}": value for g in state.gauges for site, value in g.sites.items()}
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _state_words(state: ServerState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "round": state.round,
        "basis": state.adapters.basis,
        "scale": state.adapters.scale,
        "gauges": [gauges.basis for gauges in state.gauges],
        "remembered": dict(sorted(state.remembered.items())),
        "recurrence": asdict(state.recurrence),
        "own": {
            client: (own.recurrence.product, own.recurrence.energy, own.beta)
            for client, own in sorted(state.own.items())
        },
        "moments": len(state.moments),
        "sha256": digest(_state_tensors(state)),
    }
