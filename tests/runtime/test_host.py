"""One process that plays simulated clients."""

import numpy as np
import pytest

from fedlora.federation.loop import work
from fedlora.runs.rundir import STATES
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import prepare
from fedlora.training.states import with_states
from fedlora.values import ClientUpdate, RefusalReason, TrainRequest


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"model__dtype": "bfloat16"}, True),
        ({"model__dtype": "float32"}, False),
        ({"model__dtype": "bfloat16", "privacy": "none"}, False),
    ],
)
def test_records_of_a_narrow_model_run_alone_since_its_kernels_round_by_one_percent_of_the_bound(
    tiny_config, tmp_path, changes, alone
):
    prepared = prepare(tiny_config(**changes), lambda event: None)
    client = prepared.clients.members[0].client
    assert Host(prepared.save_for_hosts(tmp_path))._node(client).alone is alone


@pytest.mark.parametrize("together", [1, 2])
def test_states_are_those_of_each_record_alone_and_made_for_nobody_who_is_refused(
    tiny_config, tmp_path, together
):
    config = tiny_config(
        lora__layers_to_transform=[1],
        runtime={"kind": "local", "cache_prefix": True, "clients_together": together},
        privacy__max_participations=1,
    )
    prepared = prepare(config, lambda event: None)
    host = Host(prepared.save_for_hosts(tmp_path))
    assert host.setup.together == together
    clients = [member.client for member in prepared.clients.members][:2]
    first = request_of(prepared, 1)
    assert all(isinstance(reply, ClientUpdate) for reply in host.answer(clients, first))
    states = {client: tmp_path / STATES / client for client in clients}
    whole = host._node(clients[0]).states(host.holdings[clients[0]])
    few = whole.select(np.array([3, 1]))
    alone = with_states(
        tmp_path / "few", host.model, host.prefix, host.holdings[clients[0]].select(np.array([3, 1])),
        base_model="", alone=True,
    )  # fmt: skip
    assert np.array_equal(few.states, alone.states)
    for path in states.values():
        path.unlink()
    replies = host.answer(clients, request_of(prepared, 2))
    assert [reply.reason for reply in replies] == [RefusalReason.BUDGET] * 2
    assert not any(path.exists() for path in states.values())


def request_of(prepared, number: int) -> TrainRequest:
    return TrainRequest(
        run=prepared.origin.run,
        base_model=prepared.origin.base_model,
        code=prepared.origin.code,
        round=number,
        adapters=prepared.first_state().adapters,
        work=work(number, prepared.config.federation),
    )
