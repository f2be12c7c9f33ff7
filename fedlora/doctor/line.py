"""One thing that `fedlora doctor` looked at, and the guard around looking."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from fedlora.errors import ConfigError, FedLoraError, PrivacyError, without_records

State: TypeAlias = Literal["ok", "warn", "fail"]
LIMIT_S = 3.0
"""How long anything is waited for that may never answer: a network, a mounted disk."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What was found under one name. mend: what to do about it; empty where all is well.

    exit_status: 0 unless it failed; then that of a config error, or of a ledger that does not hold.
    """

    name: str
    state: State
    found: str
    mend: str = ""
    exit_status: int = 0


def ok(name: str, found: str) -> Line:
    """All is well."""
    return Line(name=name, state="ok", found=found)


def warn(name: str, found: str, mend: str) -> Line:
    """It works, but somebody should know."""
    return Line(name=name, state="warn", found=found, mend=mend)


def fail(name: str, found: str, mend: str, exit_status: int = ConfigError.exit_status) -> Line:
    """It cannot work so."""
    return Line(name=name, state="fail", found=found, mend=mend, exit_status=exit_status)


def failed(name: str, error: FedLoraError, mend: str = "") -> Line:
    """Our own error: its text ends in the mend, behind the last semicolon."""
    found, _, said = str(error).rpartition("; ")
    status = PrivacyError.exit_status if isinstance(error, PrivacyError) else ConfigError.exit_status
    return fail(name, found or said, mend or (said if found else "mend what it names"), status)


def looked(name: str, look: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """The lines of one check; whatever it raises is a failed line, and the next check goes on."""
    try:
        yield from look()
    except FedLoraError as error:
        yield failed(name, error)
    except ImportError as error:
        yield fail(name, f"cannot be told: {error}", "install fedlora again: pip install fedlora")
    except TimeoutError:
        yield fail(name, f"no answer in {LIMIT_S:g} s", "look for a disk or network that hangs")
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        yield fail(
            name, f"{what}{error.strerror or type(error).__name__}", "let the user of this process reach it"
        )
    except Exception as error:
        yield fail(name, f"cannot be told: {without_records(error)}", "report this, it is a fault of fedlora")


def within(look: Callable[[], _T], limit_s: float = LIMIT_S) -> _T:
    """What `look` returns or raises; TimeoutError if it does neither in time. It then goes on by itself, unheard.

    In a thread, because resolving a name and writing to a hanging mount know no time limit of their own.
    """
    found: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(look())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError
    return found[0]
