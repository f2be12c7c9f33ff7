"""The services of the project's compose file, started: what a test may do to them, however they run."""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

RUN = "/var/lib/fedlora/run"
LEDGER = "/var/lib/fedlora/ledger.jsonl"


class Deployment(ABC):
    """A copy of the project in `folder`, with certs/ provisioned there. Paths are those inside the service."""

    kind: str
    """How the services run, in words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def roots(self) -> Path:
        """Of the deployment's own authority."""
        return self.folder / "certs" / "ca.crt"

    @abstractmethod
    def start(self, *services: str) -> None:
        """They run, and what they depend on; without names, all of the profile cpu."""

    @abstractmethod
    def kill(self, service: str) -> None:
        """kill -9 of all that runs in the service: what a crash looks like, so that it is started again."""

    @abstractmethod
    def starts(self, service: str) -> int:
        """How often it was started again."""

    @abstractmethod
    def is_healthy(self, service: str) -> bool:
        """Whether its own health check says so."""

    @abstractmethod
    def read(self, service: str, path: str) -> str:
        """The file's text; empty while it is not there, or the service is not."""

    @abstractmethod
    def copy(self, service: str, path: str, target: Path) -> None:
        """File or directory is at `target` on this machine."""

    @abstractmethod
    def said(self, service: str) -> str:
        """Its log."""

    @abstractmethod
    def address(self, service: str, port: int) -> str:
        """HOST:PORT by which this machine reaches that port."""

    def rounds(self) -> list[dict[str, Any]]:
        """The finished rounds; none while the server is away."""
        *lines, _ = self.read("server", f"{RUN}/rounds.jsonl").split("\n")  # the last one may be half written
        return [json.loads(line) for line in lines][1:]

    def debits(self, client: str) -> int:
        return self.read(client, LEDGER).count('"kind":"debit"')

    def trainings(self, client: str) -> list[float]:
        """Seconds in which the executor answered each request to train, its reply's quantum included."""
        found = re.findall(r"'train' message answered in ([0-9.]+) s", self.said(client))
        return [float(seconds) for seconds in found]
