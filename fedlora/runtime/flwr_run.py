"""What `flwr run` does in Flower's simulation: a whole run on the nodes of an engine that Flower started.

Nodes have no node.yaml here. The ServerApp reads the config that `[tool.flwr.app.config]` names, deals out its
records as every simulation does, and leaves them in the run's scene on this machine; a node plays the client whose
number is its partition-id. No server can make a node of a real federation play one: there, no scene is.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fedlora.config.load import load_config, require_same
from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.cohort import Cohort
from fedlora.federation.events import ClientDone, Event, Listener, Note, RoundDone, Stage
from fedlora.federation.loop import Stored
from fedlora.runs.rundir import finished_summary, run_config
from fedlora.runtime import flower
from fedlora.runtime.host import HostSetup
from fedlora.runtime.simulate import resume, simulate
from fedlora.transport.flower_client import Hello
from fedlora.values import Reply, TrainRequest, Witness

log = logging.getLogger(__name__)


def named(words: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The config's path and its overrides, as Flower's run config has them under `config` and `set`.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(str(words.get("config", "")))
    if not path.is_file():
        raise ConfigError(
            f"config: {str(path)!r} is no file in {Path.cwd()}, where Flower's SuperLink was started; "
            "give its absolute path: --run-config 'config=\"/.../run.yaml\"'"
        )
    return path, [*str(words.get("set", "")).split(), "runtime.kind=flower"]


def simulate_on(grid: Grid, config: RunConfig, stored: Stored = lambda state: None) -> Path:
    """The directory of the finished run of `config`. Goes on with it where it was interrupted.

    Args:
        grid: of Flower's simulation, with a node for each client.
        config: as `fedlora simulate` would have it; `runtime.kind` is flower.
        stored: see `federation.loop`.

    Raises:
        ConfigError: the grid is a real federation's or has another number of nodes, or the directory holds another run.
    """
    if not isinstance(grid, InMemoryGrid):
        raise ConfigError(
            "these are the nodes of a real federation, which nothing is simulated on; use fedlora serve, "
            "or set FEDLORA_CONFIG to the path of the run's YAML for this ServerApp"
        )
    run_dir = Path(config.output)
    start = partial(LentCohort, grid)
    if (run_dir / "config.yaml").exists() and finished_summary(run_dir) is None:
        require_same(run_config(run_dir), config, run_dir)
        return resume(run_dir, say, start, stored=stored)
    return simulate(config, run_dir, say, start, stored=stored)


def greet(context: Context) -> Hello:
    """The hello of a simulated node."""
    return flower.greet(_scene(context), context)


def answer(context: Context, frame: bytes, echo: Witness | None) -> bytes:
    """The reply's frame of a simulated node."""
    return flower.answer(_scene(context), context, frame, echo)


class LentCohort:
    """A Cohort on nodes of an engine that is not ours to stop. Its scene is gone when it is closed."""

    def __init__(self, grid: Grid, setup: HostSetup, listener: Listener) -> None:
        self._scene = setup.run_dir / flower.SCENE
        flower.write_scene(self._scene, setup)
        try:
            watch = partial(flower.watch_workers, self._scene)
            self._cohort: Cohort = flower.cohort_on(grid, setup, listener, watch)
        except BaseException:
            self.close()
            raise

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterable[Reply]:
        """See Cohort."""
        return self._cohort.ask(clients, request)

    def close(self) -> None:
        """See Cohort."""
        shutil.rmtree(self._scene, ignore_errors=True)


def say(event: Event) -> None:
    """What `flwr log` shows of a run."""
    match event:
        case Stage(name=name):
            log.info("%s", name)
        case Note(words=words):
            log.warning("%s", words)
        case ClientDone(round=number, client=client, outcome=outcome) if outcome != "answered":
            log.warning("round %d: %s: %s", number, client, outcome)
        case RoundDone(round=line):
            score = "" if line["score"] is None else f", score {line['score']:.3f}"
            log.info(
                "round %d: %d answered, %.1f s%s",
                line["round"],
                len(line["answered"]),
                line["seconds"],
                score,
            )


def _scene(context: Context) -> str:
    """Where the ServerApp of this run, on this machine, left the records of its clients."""
    return str(Path(load_config(*named(context.run_config)).output).absolute() / flower.SCENE)
