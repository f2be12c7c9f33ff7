"""An update is as long as the noise that it says is in it."""

from dataclasses import replace

import pytest
import torch

from fedlora.config.schema import AdamW, Federation, Sgd
from fedlora.deploy.node import DeployedNode
from fedlora.deploy.soundness import Soundness
from fedlora.privacy import gaussian
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, Delta

pytestmark = pytest.mark.fault("F31")


def federation(optimizer: Sgd | AdamW) -> Federation:
    return Federation(rounds=9, cohort=1, local_steps=2, batch_size=16, optimizer=optimizer)


SGD = Soundness(federation=federation(Sgd(name="sgd", lr=1.0)), max_grad_norm=1.0)


@pytest.fixture
def update(config, request_one) -> ClientUpdate:
    """Of a real node."""
    reply = decode_reply(DeployedNode(config).answer(encode_request(request_one)))
    assert isinstance(reply, ClientUpdate)
    return reply


def scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    delta = Delta(
        basis=update.delta.basis,
        sites={site: factor * tensor for site, tensor in update.delta.sites.items()},
        head={name: factor * tensor for name, tensor in update.delta.head.items()},
    )
    return replace(update, delta=delta)


def test_a_real_update_is_as_long_as_it_says_and_a_turned_one_is_too(update):
    assert SGD.objection(update) is None
    assert SGD.objection(scaled(update, -1.0)) is None  # no length tells


@pytest.mark.parametrize("factor", [1000.0, 0.3, 0.0])
def test_an_update_that_is_too_long_or_lacks_noise_is_found_out(update, factor):
    assert "its length is" in (SGD.objection(scaled(update, factor)) or "")


def test_a_server_refuses_an_update_of_which_one_tensor_lacks_its_noise(update):
    """The whole is as long as it should be; a layer of it is not."""
    site = max(update.delta.sites)
    quiet = {**update.delta.sites, site: 0.01 * update.delta.sites[site]}
    assert f"'{site}' is" in (SGD.objection(replace(update, delta=replace(update.delta, sites=quiet))) or "")
    assert SGD.objection(update) is None


def test_a_node_that_adds_no_noise_is_found_out(config, request_one, monkeypatch):
    monkeypatch.setattr(gaussian, "_noise_like", lambda total, *more: torch.zeros_like(total))
    loud = config.model_copy(update={"min_noise_multiplier": 5.0})
    reply = decode_reply(DeployedNode(loud).answer(encode_request(request_one)))
    assert isinstance(reply, ClientUpdate)
    assert "compare max_grad_norm" in (SGD.objection(reply) or "")


@pytest.mark.parametrize("clip", [0.02, 5.0])
def test_a_node_that_clips_at_another_norm_is_found_out(update, clip):
    assert SGD.objection(update) is None
    assert replace(SGD, max_grad_norm=clip).objection(update) is not None


def test_where_no_length_is_known_none_is_asked_for(update):
    adam = Soundness(federation=federation(AdamW(name="adamw", lr=1.0)), max_grad_norm=1.0)
    for blind in (adam, replace(SGD, max_grad_norm=None)):
        assert blind.objection(scaled(update, 1000.0)) is None


def test_the_rate_is_that_of_the_round_that_was_answered(update):
    halving = Soundness(federation=federation(Sgd(name="sgd", lr=1.0, decay="linear")), max_grad_norm=1.0)
    last = replace(update, round=9)  # a ninth of the first rate
    assert halving.objection(update) is None
    assert halving.objection(last) is not None
    assert halving.objection(scaled(last, 1 / 9)) is None


@pytest.mark.parametrize(
    "claim",
    [
        {"expected_batch": None, "max_draw": None},
        {"expected_batch": None},
        {"max_draw": None},
        *({"expected_batch": batch} for batch in (0.0, -1.0, 1e308)),
        *({"max_draw": most} for most in (-5, 3)),
    ],
)
def test_an_update_that_does_not_say_what_it_drew_is_found_out(update, claim):
    (event,) = update.spent
    assert SGD.objection(replace(update, spent=(replace(event, **claim),))) is not None


def test_a_proximal_term_shortens_the_noise_of_all_steps_but_the_last(update):
    """At lr * proximal 1 only the last of the two steps is left, of length 1 / sqrt(2)."""
    pulled = Soundness(federation=federation(Sgd(name="sgd", lr=1.0, proximal=1.0)), max_grad_norm=1.0)
    shortest = next(n / 100 for n in range(100) if SGD.objection(scaled(update, n / 100)) is None)
    shorter = scaled(update, 0.8 * shortest)
    assert SGD.objection(shorter) is not None
    assert pulled.objection(shorter) is None
    assert pulled.objection(scaled(update, 0.6 * shortest)) is not None


def test_a_node_that_trains_fewer_columns_than_the_run_counts_on_is_found_out(config, request_one):
    lower = config.model_copy(update={"rank": 1})
    reply = decode_reply(DeployedNode(lower).answer(encode_request(request_one)))
    assert isinstance(reply, ClientUpdate)
    assert all(not b[:, 1].any() and bool(b[:, 0].all()) for b in reply.delta.sites.values())
    assert "compare rank in its node.yaml" in (SGD.objection(reply) or "")
    agreed = replace(SGD, federation=SGD.federation.model_copy(update={"ranks": {"site-0": 1}}))
    assert agreed.objection(reply) is None


def test_the_noise_of_fewer_columns_is_shorter(update):
    agreed = replace(SGD, federation=SGD.federation.model_copy(update={"ranks": {update.client: 1}}))

    def most(soundness: Soundness) -> float:
        said = soundness.objection(scaled(update, 1000.0)) or ""
        return float(said.split("it is from ")[1].split(" ")[0])

    assert most(agreed) < most(SGD)
