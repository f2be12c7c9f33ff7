"""One process that plays simulated clients."""

import resource

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.errors import ConfigError, LedgerError
from fedlora.federation.work import work
from fedlora.runs.rundir import STATES
from fedlora.runtime.host import Host, ledger_path, shared_passes
from fedlora.runtime.prepare import prepare
from fedlora.training.load import load_model
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
    assert np.array_equal(few.states.of(few.offsets), alone.states.of(alone.offsets))
    for path in states.values():
        path.unlink()
    replies = host.answer(clients, request_of(prepared, 2))
    assert [reply.reason for reply in replies] == [RefusalReason.BUDGET] * 2
    assert not any(path.exists() for path in states.values())


@pytest.mark.parametrize(
    ("changes", "shared", "why"),
    [
        ({}, 2, None),
        ({"model__dtype": "bfloat16"}, 1, "records that must run alone"),
        ({"model__dtype": "bfloat16", "privacy": "none"}, 2, None),
        ({"privacy__engine": "opacus"}, 1, "an engine other than direct"),
        ({"runtime__kind": "flower"}, 1, None),
    ],
)
def test_clients_that_cannot_share_a_pass_have_their_own_from_the_start(
    tiny_config, tmp_path, caplog, changes, shared, why
):
    # No classifier's head: at narrow types that carries hooks, which is a reason too.
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "llama")
    config = tiny_config(
        model__name=str(tmp_path / "llama"), task={"kind": "causal-lm"}, lora__target_modules=["q_proj"],
        runtime__clients_together=2, **changes,
    )  # fmt: skip
    model = load_model(config.model, config.task, config.lora, (), config.seed)
    caplog.clear()
    assert shared_passes(config, model) == shared
    told = f"runtime.clients_together 2: {why}; clients train one by one"
    assert caplog.messages == ([] if why is None else [told])


def test_clients_of_a_model_whose_layers_cannot_be_copied_have_passes_of_their_own(tiny_config, caplog):
    prepared = prepare(tiny_config(runtime__clients_together=2), lambda event: None)
    assert shared_passes(prepared.config, prepared.model) == 2
    for layer in prepared.model.peft_model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.requires_grad:
            layer.register_forward_pre_hook(lambda *_: None)
    assert shared_passes(prepared.config, prepared.model) == 1
    assert "carries hooks" in caplog.text


ANSWERS = {"one by one": 1, "together": 2}


@pytest.fixture(params=ANSWERS.values(), ids=ANSWERS)
def host(request, tiny_config, tmp_path):
    """A host whose clients keep their states, the run it is of, and the two clients that a test asks."""
    config = tiny_config(
        lora__layers_to_transform=[1],
        runtime={"kind": "local", "cache_prefix": True, "clients_together": request.param},
    )
    prepared = prepare(config, lambda event: None)
    host = Host(prepared.save_for_hosts(tmp_path))
    assert host.setup.together == request.param and host.prefix is not None
    return host, prepared, [member.client for member in prepared.clients.members][:2]


def test_a_disk_without_room_for_states_is_the_owner_s_to_hear_and_no_client_s_failure(host, caplog):
    host, prepared, clients = host
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a ledger fits, the states do not
    try:
        with pytest.raises(ConfigError, match=r"mend that, or write runtime\.cache_prefix: false"):
            host.answer(clients, request_of(prepared, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text == ""  # nobody is called a failure, nor asked a second time


def test_a_place_for_states_that_is_no_directory_is_the_owner_s_to_hear_and_no_client_s_failure(host, caplog):
    host, prepared, clients = host
    (host.setup.run_dir / STATES).write_text("")
    with pytest.raises(ConfigError, match=r"Not a directory; mend that"):
        host.answer(clients, request_of(prepared, 1))
    assert caplog.text == ""


def test_a_ledger_that_cannot_be_trusted_is_the_owner_s_to_hear_and_no_client_s_failure(host, caplog):
    host, prepared, clients = host
    host.answer(clients, request_of(prepared, 1))
    other, broken = (ledger_path(host.setup.run_dir, client) for client in clients)
    broken.write_text(broken.read_text().replace('"steps":', '"leaps":'))
    paid = other.read_bytes()
    with pytest.raises(LedgerError, match=f"{broken}"):
        host.answer(clients, request_of(prepared, 2))
    assert caplog.text == ""
    # Asked before it, one by one; together, nobody has paid.
    assert (other.read_bytes() == paid) == (host.setup.together == 2)


def request_of(prepared, number: int) -> TrainRequest:
    return TrainRequest(
        run=prepared.origin.run,
        base_model=prepared.origin.base_model,
        code=prepared.origin.code,
        round=number,
        adapters=prepared.first_state().adapters,
        work=work(number, prepared.config.federation),
    )
