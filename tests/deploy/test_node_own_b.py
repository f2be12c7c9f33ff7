"""A data owner's node that goes on from its own B: where that lies, and that no other one ever stands in for it."""

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedlora.config.load import load_node
from fedlora.deploy.node import DeployedNode
from fedlora.errors import ConfigError
from fedlora.training.personal import Personal
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, RefusalReason
from tests.deploy.nodes import debits, first_request, node_config, reason, without_records


@pytest.fixture
def own(tmp_path, tiny_encoder, topic_files):
    """A node of three participations that keeps its own B."""
    config = node_config(tmp_path, tiny_encoder, topic_files[0], participations=3)
    lora, work = (
        config.lora.model_copy(update={"trains": "ab"}),
        config.work.model_copy(update={"own_b": True}),
    )
    return config.model_copy(update={"lora": lora, "work": work})


def request(config, number=1, b=0.0, **changes):
    """b: what every number of the server's B is. changes: of the work."""
    first = first_request(config)
    sites = {site: replace(f, b=torch.full_like(f.b, b)) for site, f in first.adapters.sites.items()}
    work = replace(first.work, **{"side": "both", "own_b": True, **changes})
    return replace(first, round=number, adapters=replace(first.adapters, sites=sites), work=work)


def place(config) -> Path:
    return Path(f"{config.ledger}.personal")


def kept(config, number: int):
    return Personal(place(config)).own("r", number + 1).sites


def answered(config, asked):
    reply = decode_reply(DeployedNode(config).answer(encode_request(asked)))
    assert isinstance(reply, ClientUpdate)
    return reply.delta.sites


def test_a_node_goes_on_from_the_b_it_was_left_with_whatever_the_server_sends(own):
    first = answered(own, request(own))
    assert all(torch.equal(b, first[site]) for site, b in kept(own, 1).items())  # it began at zero
    second = answered(own, request(own, 2, b=5.0))
    for site, b in kept(own, 2).items():
        assert_close(b, first[site] + second[site], rtol=1e-5, atol=1e-6)
        assert bool((second[site] != 0).all())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in place(own).iterdir()}
    assert modes == {0o600} and debits(own) == 2


def test_a_lost_reply_is_made_again_from_the_same_b_and_paid_again(own):
    first = answered(own, request(own))
    asked = request(own, 2)
    once = answered(own, asked)
    assert answered(own, asked).keys() == once.keys() and debits(own) == 2  # it has the reply still
    max(Path(f"{own.ledger}.outbox").glob("*-000002.reply")).unlink()
    again = answered(own, asked)
    assert debits(own) == 3
    for site, b in kept(own, 2).items():
        assert not torch.equal(once[site], again[site])
        assert_close(b, first[site] + again[site], rtol=1e-5, atol=1e-6)


def test_another_request_for_a_paid_round_is_refused_though_only_a_b_differs_that_nobody_reads(own):
    answered(own, request(own))
    other = encode_request(request(own, b=1.0))
    assert reason(DeployedNode(own).answer(other)) == RefusalReason.BAD_REQUEST
    next(Path(f"{own.ledger}.outbox").glob("*.reply")).unlink()
    assert reason(without_records(own).answer(other)) == RefusalReason.BAD_REQUEST
    assert debits(own) == 1


def test_nodes_that_keep_a_b_and_those_that_keep_none_take_part_in_their_own_runs_only(own):
    none = own.model_copy(update={"work": own.work.model_copy(update={"own_b": False})})
    for config, own_b in ((own, False), (none, True)):
        frame = encode_request(request(config, own_b=own_b))
        assert reason(without_records(config).answer(frame)) == RefusalReason.BAD_REQUEST
    assert not Path(own.ledger).exists() and not place(own).exists()


def test_without_the_b_of_a_round_it_answered_a_node_does_not_work(own, caplog):
    answered(own, request(own))
    path = next(place(own).iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    asked = encode_request(request(own, 2))
    assert reason(DeployedNode(own).answer(asked)) == RefusalReason.FAILED
    assert f"{path} is damaged" in caplog.text
    shutil.rmtree(place(own))
    assert reason(DeployedNode(own).answer(asked)) == RefusalReason.FAILED
    assert "the B of round 1 of run 'r', which was answered, is gone" in caplog.text
    assert debits(own) == 1
    other = replace(request(own), run="another")
    assert answered(own, other).keys() == own_sites(own)  # of which it has answered nothing


def own_sites(config):
    return first_request(config).adapters.sites.keys()


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            "lora: {r: 2, lora_alpha: 2, target_modules: [query]}",
            r"work\.own_b: true, but lora\.trains is b; write ab",
        ),
        (
            "lora: {r: 2, lora_alpha: 2, target_modules: [query], trains: ab, from_adapter: x}",
            r"lora\.from_adapter: x, but a node's own B begins at zero; write null",
        ),
    ],
)
def test_a_b_of_ones_own_goes_with_an_a_that_is_trained_and_a_start_at_zero(config, tmp_path, lora, says):
    text = (tmp_path / "node.yaml").read_text()
    lines = [lora if line.startswith("lora:") else line for line in text.splitlines()]
    told = "\n".join(lines).replace("local_steps: 2,", "local_steps: 2, own_b: true,")
    (tmp_path / "own.yaml").write_text(told + "\n")
    with pytest.raises(ConfigError, match=says):
        load_node(tmp_path / "own.yaml")
