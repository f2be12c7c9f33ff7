"""A client's own B between the rounds of a run, for methods that share A alone.

Whatever lies here is as noised and as paid for as what the client sends: it is private to its owner by habit, not by
need, and may be exported or shown. A file a round, `RUN-000012.safetensors`, RUN the digest of the run's name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedlora.algebra.digest import digest
from fedlora.disk import make_directory, write_durably
from fedlora.errors import ConfigError, GuardError
from fedlora.privacy.outbox import run_stem
from fedlora.values import Adapters, Site, TrainRequest

KEPT_ROUNDS = 3
"""A server whose newest checkpoint is lost does that round and the one then under way again: the first of the two goes
on from the B before both."""

WORDS = "own b"
"""Under which a file says whose, of which round and with which digest it is."""

MEND = "restore it, or begin the run anew in another directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnB:
    """A client's B of every site as its work in `round` left it. began: the round whose B it went on from; 0: zero."""

    round: int
    began: int
    sites: Mapping[Site, Tensor]

    def in_place_of(self, adapters: Adapters) -> Adapters:
        """The same adapters with this B.

        Raises:
            ConfigError: it is of other sites or shapes.
        """
        theirs = {site: tuple(b.shape) for site, b in self.sites.items()}
        needed = {site: tuple(factors.b.shape) for site, factors in adapters.sites.items()}
        if theirs != needed:
            strange = sorted(theirs.items() ^ needed.items())[:2]
            raise ConfigError(f"the B kept of round {self.round} is of another adapter ({strange}); {MEND}")
        sites = {site: replace(f, b=self.sites[site].to(f.b)) for site, f in adapters.sites.items()}
        return replace(adapters, sites=sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a client works on. request: with its own B in the place of the server's, where it has one of its own.

    round: the one that left it that B; 0: it has worked in none before.
    """

    request: TrainRequest
    round: int


class Personal:
    """What one client keeps, in one directory; one process at a time writes there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def newest(self, run: str, before: int) -> int:
        """The last round of the run before `before` whose B is kept; 0: there is none."""
        return max((kept for kept in self._rounds(run) if kept < before), default=0)

    def own(self, run: str, before: int) -> OwnB | None:
        """The client's B before its work in round `before`, however often that is done; None: it is zero still.

        Raises:
            ConfigError: the file is damaged, or the one that is needed is no longer there.
        """
        newest = self.newest(run, before)
        later = min((kept for kept in self._rounds(run) if kept >= before), default=None)
        if later is not None and (began := self._read(run, later).began) != newest:
            raise ConfigError(
                f"{self.directory}: the B of round {began} is gone, from which round {later} of run {run!r} went on "
                f"(here are {self._rounds(run)}); {MEND}"
            )
        return self._read(run, newest) if newest else None

    def require(self, run: str, before: int, answered: int) -> None:
        """Passes a client whose B is of the last round before `before` that it answered, or of a later one.

        Raises:
            ConfigError: it is not there.
        """
        if (newest := self.newest(run, before)) < answered:
            raise ConfigError(
                f"{self.directory}: the B of round {answered} of run {run!r}, which was answered, is gone (the newest "
                f"here is of round {newest}); {MEND}"
            )

    def start(self, request: TrainRequest) -> Start:
        """What the request is worked on: A and head as sent, and the client's own B, at first zero.

        Raises:
            ConfigError: see `own`; or that B fits no such adapters.
        """
        own = self.own(request.run, request.round)
        if own is None:
            sites = {site: torch.zeros_like(f.b) for site, f in request.adapters.sites.items()}
            own = OwnB(round=0, began=0, sites=sites)
        own_request = replace(request, adapters=own.in_place_of(request.adapters))
        return Start(request=own_request, round=own.round)

    def keep(self, run: str, own: OwnB) -> None:
        """The B is durable, readable by its owner only, in place of an earlier attempt's; very old ones are gone.

        Raises:
            GuardError: it is not finite, so that no later round could go on from it; nothing is changed.
        """
        for site, b in own.sites.items():
            if not bool(torch.isfinite(b).all()):
                raise GuardError(
                    f"B of {site!r} is not finite after round {own.round}, so the round is void; lower the "
                    "learning rate"
                )
        make_directory(self.directory)
        sites = {site: own.sites[site].detach().cpu().contiguous() for site in sorted(own.sites)}
        words = {"run": run, "round": own.round, "began": own.began}
        words["sha256"] = _digest(run, replace(own, sites=sites))
        # One word, since several have no order of their own there: equal B's are equal bytes.
        text = json.dumps(words, sort_keys=True)
        write_durably(self._path(run, own.round), save(sites, {WORDS: text}), mode=0o600)
        for old in self._rounds(run)[:-KEPT_ROUNDS]:
            if old != own.round:  # a server may ask for an early round late
                self._path(run, old).unlink()

    def _read(self, run: str, round_: int) -> OwnB:
        path = self._path(run, round_)
        try:
            with safe_open(path, "pt") as file:
                words = json.loads(file.metadata()[WORDS])
                sites = {site: file.get_tensor(site) for site in sorted(file.keys())}
            own = OwnB(round=words["round"], began=words["began"], sites=sites)
            if own.round != round_ or words["sha256"] != _digest(run, own):
                raise ValueError("it is not what was kept")
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ConfigError(f"{path} is damaged ({error}); {MEND}") from error
        return own

    def _rounds(self, run: str) -> list[int]:
        """Those whose B is kept, ascending."""
        numbers = (
            path.stem.rpartition("-")[2] for path in self.directory.glob(f"{run_stem(run)}-*.safetensors")
        )
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _path(self, run: str, round_: int) -> Path:
        return self.directory / f"{run_stem(run)}-{round_:06d}.safetensors"


def _digest(run: str, own: OwnB) -> str:
    return digest(own.sites, "own b", run, own.round, own.began)
