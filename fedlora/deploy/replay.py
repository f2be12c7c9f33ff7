"""A server's run played again from what lies in its directory: config, roster, plans and the updates it heard."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fedlora.deploy.journal import Journal
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store, state_digest
from fedlora.methods import build
from fedlora.runs.beginning import first_state, origin, require_beginning
from fedlora.runs.forgetting import forgotten
from fedlora.runs.rundir import SPENT, load_roster, run_config
from fedlora.runs.trained import trained_adapters
from fedlora.training.load import load_model
from fedlora.values import Reply, ServerState, TrainRequest


def replay(run_dir: Path) -> Iterator[tuple[int, str]]:
    """Round and `state_sha256` of each round that the run has completed; nothing in the directory is changed.

    Raises:
        ConfigError: the directory holds no run of a server, or what it began from holds other files now.
        IncompleteError: no round is completed, or an update that was heard is missing or damaged.
    """
    config, roster = run_config(run_dir), load_roster(run_dir)
    if roster is None:
        raise ConfigError(f"{run_dir} holds no server's run; a simulation is repeated from its seed")
    if gone := sorted(forgotten(run_dir)):
        raise ConfigError(
            f"{run_dir}: the updates of {gone} are erased, so its rounds cannot be played again; "
            "replay another run"
        )
    require_beginning(config, run_dir)
    _, classes = trained_adapters(run_dir)
    model = load_model(config.model, config.task, config.lora, classes, config.seed)
    method = build(config.method, config.lora, config.seed)
    last, _ = Store(run_dir).load()
    if last.round == 0:
        raise IncompleteError(f"{run_dir}: no round is completed yet; wait for the first")
    with TemporaryDirectory() as scratch:
        store = Store(Path(scratch), kept=config.method.stale.dtype)
        first = first_state(config, model, method)
        store.begin(first, line_zero({}))
        played = rounds(
            first,
            origin=origin(config, roster.run),
            seed=config.seed,
            members=roster.members,
            method=method,
            federation=config.federation,
            cohort=_Heard(Journal(run_dir / SPENT)),
            store=store,
            score=lambda adapters: {},
        )
        for state, _ in _until(played, last.round):
            yield state.round, state_digest(state)


class _Heard:
    """A Cohort that says again what was said."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def ask(self, clients: Sequence[str], request: TrainRequest) -> list[Reply]:
        """See Cohort."""
        return [*self.journal.heard(request.round)]

    def close(self) -> None:
        """See Cohort."""


def _until(played: Iterator[tuple[ServerState, dict]], last: int) -> Iterator[tuple[ServerState, dict]]:
    for state, line in played:
        yield state, line
        if state.round == last:
            return
