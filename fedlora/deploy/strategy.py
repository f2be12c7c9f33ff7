"""The method as a Flower Strategy, for people who have a ServerApp of their own.

`fedlora.deploy.server.serve` is the whole server. This is its arithmetic alone, under `Strategy.start`, and has its
limits: `start` waits in `send_and_receive`, which looks for replies every 3 s and forgets those that miss its
timeout, so nothing late ever counts; no checkpoint, so a run that stops begins anew, while its nodes have paid; no
journal, so nothing is kept of what nodes say they spent, and a ledger that was put back is not noticed here, only by
its node, to which this process echoes what it remembers.

    config = load_config("run.yaml")                         # data: the public test records
    nodes = Nodes(grid, lambda hello: hello.classes == classes)
    meet(nodes, lambda hellos: len(hellos) >= 3)
    model = load_model(config.model, config.task, config.lora, classes, config.seed)
    method = build(config.method, config.lora, config.seed)
    strategy = FedLoraStrategy(
        nodes,
        first_state(config, model, method),
        origin=origin(config, secrets.token_hex(8)),         # a new name a run: a node answers a round of a run once
        seed=config.seed,
        method=method,
        federation=config.federation,
    )
    strategy.start(grid, strategy.arrays(), config.federation.rounds, timeout=config.federation.deadline_s)
"""

import logging
from collections.abc import Iterable, Mapping

from fedlora.transport.flower_client import (
    TRAIN,
    frame_content,
    frame_of,
)  # first: it sets what flwr reads once

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.algebra.digest import named_tensors
from fedlora.config.schema import Federation
from fedlora.errors import ConfigError, IncompleteError, WireError
from fedlora.federation.absences import require_enough
from fedlora.federation.absorb import absorb
from fedlora.federation.gather import gather
from fedlora.federation.plan import plan, require_plannable
from fedlora.federation.remembered import Remembered
from fedlora.federation.work import request_of
from fedlora.methods import Method
from fedlora.transport.flower_nodes import Nodes
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import (
    ClientUpdate,
    Member,
    Origin,
    Refusal,
    RefusalReason,
    Reply,
    RoundPlan,
    RoundReport,
    ServerState,
    Witness,
)

log = logging.getLogger(__name__)


class FedLoraStrategy(Strategy):
    """The server's state, moved by `plan` before a round and by `absorb` after it. One instance is one run."""

    def __init__(
        self,
        nodes: Nodes,
        state: ServerState,
        *,
        origin: Origin,
        seed: int,
        method: Method,
        federation: Federation,
    ) -> None:
        """Binds the run to the nodes that have said hello by now: they are its members to the end.

        Args:
            nodes: of the grid that `start` gets; `meet` waits for them.
            state: before the first round.
            origin: what every request says of where it comes from.
            seed: of the cohorts.
            method: mixing and subspace.
            federation: as in a run.yaml; `rounds` is what a linear decay ends at.

        Raises:
            ConfigError: no round can be planned for these members.
        """
        self.nodes = nodes
        self.state = state
        self.origin = origin
        self.seed = seed
        self.method = method
        self.federation = federation
        self.members = tuple(
            Member(client=client, examples=hello.records) for client, hello in sorted(nodes.hellos.items())
        )
        self.reports: list[RoundReport] = []
        require_plannable(self.members, federation)
        self._plan: RoundPlan | None = None
        self._asked: dict[int, str] = {}
        self._memory = Remembered()
        self._ledgers: dict[str, Witness] = {}

    def arrays(self) -> ArrayRecord:
        """The adapters as they stand, for `initial_arrays`, `evaluate_fn` and the result; nodes get a frame instead.

        Names are those of the wire: `a:SITE` (r, d_in), `b:SITE` (d_out, r), `head:NAME`.
        """
        tensors = named_tensors(self.state.adapters)
        return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A request for everybody in the plan who is online. `config` is not sent: `federation` says what is asked.

        Raises:
            ConfigError: `arrays` are not the state's, or `start` was called a second time.
        """
        if server_round != self.state.round + 1:
            raise ConfigError(
                f"round {server_round} was asked for, but {self.state.round} rounds are done; one strategy is one run, "
                "so make a new one"
            )
        if arrays != self.arrays():
            raise ConfigError(
                f"the arrays of round {server_round} are not those of this strategy, which would ignore them; give "
                "start(initial_arrays=strategy.arrays())"
            )
        self._plan = plan(
            self.state, self.members, run=self.origin.run, federation=self.federation, seed=self.seed
        )
        request = request_of(self.origin, self._plan.round, self.state.adapters, self.federation, self.method)
        # Only who is online: for any other node the deployed grid has no message to wait for, and waits all the same.
        online = self.nodes.online()
        self._asked = {online[client]: client for client in self._plan.cohort if client in online}
        frame = encode_request(request)
        return [
            Message(frame_content(frame, self._ledgers.get(client)), node, TRAIN)
            for node, client in self._asked.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The state has absorbed the round; its report is the last of `reports`.

        Raises:
            IncompleteError: fewer than federation.min_clients answered, or no round was begun; the state is kept.
            PrivacyError: fewer did, since their budgets are spent.
        """
        if self._plan is None or self._plan.round != server_round:
            raise IncompleteError(
                f"round {server_round} was not begun; call configure_train({server_round}, ...) first"
            )
        memory = Remembered(self._memory.updates)  # a copy: the round may yet be found incomplete
        gathered = gather(
            self.state,
            self._plan,
            self._heard(self._plan, replies),
            memory=memory,
            method=self.method,
            federation=self.federation,
        )
        kept = f"the state of round {server_round - 1} is kept in strategy.state"
        require_enough(
            gathered.report, self.federation, f"{kept}, and fedlora.deploy.server.serve can resume"
        )
        absorbed = absorb(self.state, gathered, method=self.method, federation=self.federation)
        self.state, self._plan, self._memory = absorbed.state, None, memory
        self.reports.append(absorbed.report)
        return self.arrays(), _figures(absorbed.report)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody: a score of private records is paid for by a node's ledger or not told. See `evaluate_fn`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """One line in the log."""
        log.info(
            "run %s: %d members, cohort %s, %s",
            self.origin.run,
            len(self.members),
            self.federation.cohort,
            self.method.name,
        )

    def _heard(self, planned: RoundPlan, messages: Iterable[Message]) -> list[Reply]:
        """One reply for each client of the cohort: who is absent, late or unintelligible is a refusal."""
        heard = {
            client: Refusal(client=client, run=planned.run, round=planned.round, reason=RefusalReason.FAILED)
            for client in planned.cohort
        }
        replies: Mapping[str, Reply] = heard | {
            reply.client: reply for message in messages if (reply := self._reply(message)) is not None
        }
        for client, reply in replies.items():
            if isinstance(reply, ClientUpdate) and reply.ledger is not None:
                known = self._ledgers.get(client)
                if known is None or known.seq < reply.ledger.seq:
                    self._ledgers[client] = reply.ledger
        return list(replies.values())

    def _reply(self, message: Message) -> Reply | None:
        client = self._asked.get(message.metadata.src_node_id)
        if client is None or message.has_error():
            log.warning("%s: no answer in this round", client)
            return None
        try:
            reply = decode_reply(frame_of(message.content))
        except WireError as error:
            log.warning("%s: malformed reply: %s", client, error)
            return None
        if reply.client != client:
            log.warning("%s: its reply bears another name", client)
            return None
        return reply


def _figures(report: RoundReport) -> MetricRecord:
    return MetricRecord(
        {
            "asked": len(report.asked),
            "answered": len(report.answered),
            "refused": len(report.refused),
            "rejected": len(report.rejected),
        }
    )
