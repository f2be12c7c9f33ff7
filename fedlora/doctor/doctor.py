"""Looks over a machine, a config, a server's address and a kit, and says of each thing what it is and what mends it.

Nothing is changed, downloaded or trained. What may hang is waited for a few seconds, so that every line comes.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedlora.doctor.line import Line, looked
from fedlora.doctor.machine import disk, machine_lines, torch_probe


def examine(
    config: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    server: str | None = None,
    root_certificates: Path | None = None,
    kit: Path | None = None,
) -> Iterator[Line]:
    """One line a finding, as it is found: the machine first, then whatever was named.

    Args:
        config: a run.yaml or a node.yaml.
        overrides: `dotted.key=value`, of the config.
        server: HOST:PORT as nodes reach it.
        root_certificates: PEM of who vouches for the server; None: whom this machine trusts.
        kit: a directory of `fedlora provision`.

    Raises:
        ConfigError: `server` is no HOST:PORT.
    """
    where = None
    if server is not None:
        from fedlora.doctor.server import address

        where = address(server, root_certificates)
    torch = torch_probe()
    yield from machine_lines(torch)
    if config is None:
        yield from looked("disk", lambda: disk("disk", Path.cwd()))
    else:
        from fedlora.doctor.config import config_lines

        yield from looked("config", lambda: config_lines(config, torch, overrides))
    if kit is not None:
        from fedlora.doctor.server import kit_lines

        yield from looked("kit", lambda: kit_lines(kit, where and where.host))
    if where is not None:
        from fedlora.doctor.server import server_lines

        yield from looked("server", lambda: server_lines(where))


def exit_status(lines: Iterable[Line]) -> int:
    """0 if nothing failed; 3 if a ledger does not hold; else 2."""
    return max((line.exit_status for line in lines), default=0)
