"""Server and node must compute the same loss: a node that would compute another stays away, and pays nothing."""

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import BertModel

from fedlora.config.node import NodeConfig
from fedlora.config.task import CausalLm, Task
from fedlora.deploy.node import DeployedNode
from fedlora.training.agreed import OF_NO_LOSS, agreed_digest, drawn
from fedlora.training.checkpoints import weights_digest
from fedlora.training.load import load_model
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, RefusalReason
from tests.deploy.nodes import debits, first_request, reason, without_records

CLASSIFIES, PREDICTS, PREFERS = "sequence-classification", "causal-lm", "dpo"


def with_task(config: NodeConfig, **keys: object) -> NodeConfig:
    return config.model_copy(update={"task": TypeAdapter(Task).validate_python(keys)})


def seeded(config: NodeConfig, seed: int) -> NodeConfig:
    return config.model_copy(update={"seed": seed})


def refused_unread(ours: NodeConfig, theirs: NodeConfig) -> bool:
    """Whether a node of `ours` refuses the first request of an honest server with the settings of `theirs`."""
    answered = without_records(ours).answer(encode_request(first_request(theirs)))
    assert debits(ours) == 0
    return {RefusalReason.BAD_REQUEST: True, RefusalReason.FAILED: False}[reason(answered)]


def test_a_frozen_head_of_another_seed_is_refused_before_a_record_is_read(config, caplog):
    frozen = with_task(config, kind=CLASSIFIES, head="frozen")
    assert refused_unread(frozen, seeded(frozen, 1)) and "seed agree with the run's" in caplog.text
    assert not refused_unread(seeded(frozen, 1), seeded(frozen, 1))
    agreed = first_request(seeded(frozen, 1))
    assert isinstance(
        decode_reply(DeployedNode(seeded(frozen, 1)).answer(encode_request(agreed))), ClientUpdate
    )
    assert debits(frozen) == 1


def test_the_seed_of_a_trained_head_is_each_sides_own(config):
    assert not refused_unread(config, seeded(config, 1))
    assert agreed_digest(seeded(config, 1)) == weights_digest(config.model.name)


def test_a_pooler_that_the_checkpoint_lacks_is_of_one_seed(config, tmp_path):
    name = tmp_path / "without-pooler"
    BertModel.from_pretrained(config.model.name, add_pooling_layer=False).save_pretrained(name)
    for file in Path(config.model.name).glob("*token*"):
        (name / file.name).write_bytes(file.read_bytes())
    lacking = config.model_copy(update={"model": config.model.model_copy(update={"name": str(name)})})
    assert refused_unread(lacking, seeded(lacking, 1)) and not refused_unread(lacking, lacking)
    wide, narrow = (
        lacking.model_copy(update={"model": lacking.model.model_copy(update={"dtype": dtype})})
        for dtype in ("float64", "bfloat16")
    )
    assert agreed_digest(lacking) == agreed_digest(narrow) != agreed_digest(wide)
    heads = [with_task(one, kind=CLASSIFIES, head="frozen") for one in (lacking, narrow, wide)]
    assert agreed_digest(heads[0]) == agreed_digest(heads[1]) != agreed_digest(heads[2])
    own = with_task(lacking, kind=CLASSIFIES, pooler="identity")
    assert not refused_unread(own, seeded(own, 1))


def test_what_the_seed_draws_and_nothing_else_differs_between_models_of_two_seeds(config):
    for task in ({"head": "trained"}, {"head": "frozen"}, {"pooler": "identity"}):
        told = with_task(config, kind=CLASSIFIES, **task)
        one, two = (
            dict(load_model(told.model, told.task, told.lora, ("a", "b"), seed).peft_model.state_dict())
            for seed in (0, 1)
        )
        # A is drawn, too, but comes with each request
        differs = any(not torch.equal(one[name], two[name]) for name in one if "lora_A" not in name)
        assert differs == (drawn(told) is not None)


def test_a_pooler_that_one_side_alone_replaces_is_refused_before_a_record_is_read(config):
    own = with_task(config, kind=CLASSIFIES, pooler="identity")
    assert refused_unread(config, own) and refused_unread(own, config) and not refused_unread(own, own)


def test_each_key_that_a_loss_depends_on_is_in_the_digest(config):
    tasks = [
        {"kind": PREDICTS},
        {"kind": PREDICTS, "loss_on": "all"},
        {"kind": PREDICTS, "template": "chat"},
        {"kind": PREFERS},
        {"kind": PREFERS, "beta": 0.2},
        {"kind": PREFERS, "template": "chat"},
        {"kind": CLASSIFIES, "pooler": "identity"},
        {"kind": CLASSIFIES, "head": "frozen"},
    ]
    assert len({agreed_digest(with_task(config, **keys)) for keys in tasks}) == len(tasks)
    plain = weights_digest(config.model.name)
    for told in ({"samples": 3, "sample_tokens": 5}, {"packing": False}, {"template": None}):
        assert agreed_digest(with_task(config, kind=PREDICTS, **told)) == plain
    assert CausalLm.model_fields.keys() > set(OF_NO_LOSS)


def test_a_type_only_rounds_and_is_each_sides_own(config, request_one):
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    assert not refused_unread(narrow, config)
    assert replace(request_one, base_model=agreed_digest(narrow)) == request_one
