"""What can go wrong, and the exit status each kind ends the command with.

Every message shows the offending values and the next move; none carries a record.
"""

import traceback


class FedLoraError(Exception):
    """Anything fedlora refuses to do. Subclasses say why; `exit_status` is what the command line returns."""

    exit_status = 1


class ConfigError(FedLoraError):
    """The YAML, the command line or a file they name is wrong: nothing was written, mend the text and go again."""

    exit_status = 2


class DataError(ConfigError):
    """Records, labels or partitions are not what the config says they are."""


class ModelError(ConfigError):
    """The base model is not there, or has no such modules."""


class PrivacyError(FedLoraError):
    """Refused for privacy: budget spent, delta too large for the data, or a noise that cannot be had."""

    exit_status = 3


class LedgerError(PrivacyError):
    """A ledger cannot be trusted or cannot be written, so nothing may be released."""


class IncompleteError(FedLoraError):
    """The run stopped before its last round; the message says how to go on."""

    exit_status = 4


class GuardError(FedLoraError):
    """The run did not do what it says it does, so it stopped; the last good round is kept."""


class ShapeError(FedLoraError):
    """Tensors do not fit together."""


class BasisError(FedLoraError):
    """A B-shaped value was combined with factors of another basis."""


class WireError(FedLoraError):
    """Bytes from outside are not a well-formed message."""


def without_records(error: BaseException) -> str:
    """What a log may hold of an error: our own words, or only the kind and place of anybody else's.

    The text of an exception that a library raised over a record can quote it.
    """
    if isinstance(error, FedLoraError):
        return str(error)
    places = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
    return f"{type(error).__name__} in {' > '.join(places)}"
