"""What `fedlora check run.yaml node.yaml` says a node would refuse is what the node refuses, and nothing else."""

from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import load_config, load_node
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig
from fedlora.config.template import NODE_YAML, RUN_YAML
from fedlora.deploy.fit import misfits
from fedlora.deploy.node import DeployedNode
from fedlora.errors import ModelError
from fedlora.federation.work import work
from fedlora.methods import build
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.runs.beginning import first_state, origin
from fedlora.training.load import load_model
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, DpEvent, Refusal, RefusalReason, Reply, TrainRequest


@pytest.fixture
def node(config, tmp_path) -> NodeConfig:
    """With the classes in the order in which a server has them."""
    path = tmp_path / "node.yaml"
    path.write_text(path.read_text().replace("[weather, music, kitchen]", "[kitchen, music, weather]"))
    return load_node(path)


def first_reply(run: RunConfig, node: NodeConfig) -> Reply:
    """What the node says to the first request of this run's server."""
    model = load_model(run.model, run.task, run.lora, tuple(node.classes), run.seed)
    method = build(run.method, run.lora, run.seed)
    own, asked = origin(run, "r"), work(1, run.federation, method)
    state = first_state(run, model, method)
    request = TrainRequest(
        run="r", base_model=own.base_model, code=own.code, round=1, adapters=state.adapters, work=asked
    )
    return decode_reply(DeployedNode(node).answer(encode_request(request)))


def keys(run: RunConfig, node: NodeConfig) -> list[str]:
    return [".".join(one.key) for one in misfits(run, node)]


def test_two_that_fit_work_together(node, tiny_config):
    run = tiny_config()
    assert misfits(run, node) == []
    assert isinstance(first_reply(run, node), ClientUpdate)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lora__r": 3, "lora__lora_alpha": 3}, ["lora.lora_alpha", "lora.r"]),
        ({"lora__lora_alpha": 4}, ["lora.lora_alpha"]),
        ({"lora__target_modules": ["query"]}, ["lora.target_modules"]),
        ({"lora__layers_to_transform": [1]}, ["lora.layers_to_transform"]),
        ({"task__head": "frozen"}, ["task.head"]),
        ({"task__pooler": "identity"}, ["task.pooler"]),
        ({"model__quantization": "int8"}, ["model"]),
        ({"federation__local_steps": 3}, ["work.local_steps"]),
        ({"federation__optimizer__lr": 1.5}, ["work.optimizer.lr"]),
        ({"federation__optimizer__proximal": 0.5}, ["work.optimizer.proximal"]),
        ({"method": {"name": "fedsa"}, "lora__trains": "ab"}, ["lora.trains", "work.own_b"]),
    ],
)
def test_what_a_node_refuses_is_told_before(node, tiny_config, change, key):
    run = tiny_config(**change)
    assert keys(run, node) == key
    reply = first_reply(run, node)
    assert isinstance(reply, Refusal) and reply.reason == RefusalReason.BAD_REQUEST


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"privacy__max_grad_norm": 2.0}, "max_grad_norm"),
        ({"federation__rounds": 4}, "budget.max_participations"),
        ({"federation__ranks": {"site-0": 1}}, "rank"),
    ],
)
def test_what_only_later_rounds_or_the_server_refuse_is_told_too(node, tiny_config, change, key):
    assert keys(tiny_config(**change), node) == [key]


def test_a_frozen_head_needs_the_runs_seed_and_a_trained_one_does_not(node, tiny_config):
    frozen = node.model_copy(update={"task": node.task.model_copy(update={"head": "frozen"})})
    run = tiny_config(task__head="frozen")
    (one,) = misfits(run, frozen)
    assert one.key == ("seed",) and "a head drawn from 0 here, the run has a head drawn from 7" in one.words
    assert isinstance(first_reply(run, frozen), Refusal)
    agreed = frozen.model_copy(update={"seed": run.seed})
    assert misfits(run, agreed) == []
    assert isinstance(first_reply(run, agreed), ClientUpdate)


@pytest.mark.parametrize("key", ["code", "base_model"])
def test_what_a_node_does_not_accept_is_told(node, tiny_config, key):
    strict = node.model_copy(update={"accept": node.accept.model_copy(update={key: ["0" * 64]})})
    assert keys(tiny_config(), strict) == [f"accept.{key}"]
    assert isinstance(first_reply(tiny_config(), strict), Refusal)


def test_classes_in_another_order_are_others(config, tiny_config):
    assert keys(tiny_config(), config) == ["classes"]


def test_the_order_of_names_and_what_a_request_brings_are_no_misfit(node, tiny_config):
    run = tiny_config(lora__target_modules=["value", "query"], lora__init="centred", federation__batch_size=8)
    assert misfits(run, node) == []


def test_what_is_spent_already_counts(node, tiny_config):
    event = DpEvent(noise_multiplier=1.0, sample_rate=0.04, steps=2)
    book = open_ledger(Path(node.ledger), client="site-0", dataset_fingerprint="d", noise_kind="os-entropy")
    book.debit("earlier", 1, "q", (event,), max_grad_norm=1.0, budget=Budget.of(node.budget))
    (one,) = misfits(tiny_config(), node)
    assert "1 left here, but the run asks each node about 2 times" in one.words


def test_base_models_that_differ_by_name_are_compared_by_their_bytes(node, tiny_config, tmp_path):
    link = tmp_path / "same"
    link.symlink_to(node.model.name)
    assert misfits(tiny_config(model__name=str(link)), node) == []
    with pytest.raises(ModelError, match="check where both base models are"):
        misfits(tiny_config(model__name="/nowhere/model"), node)


def test_the_files_of_init_fit_each_other(tmp_path):
    for name, text in (("run.yaml", RUN_YAML), ("node.yaml", NODE_YAML)):
        (tmp_path / name).write_text(text)
    node = load_node(tmp_path / "node.yaml", [f"ledger={tmp_path}/ledger.jsonl"])
    assert misfits(load_config(tmp_path / "run.yaml"), node) == []


def test_the_command_says_fits_or_names_the_lines_of_the_node(node, tiny_config, tmp_path, capsys):
    tiny_config()
    run, own = str(tmp_path / "run.yaml"), str(tmp_path / "node.yaml")
    assert main(["check", run, own]) == 0
    assert capsys.readouterr().out.startswith(f"{own} would take part in {run}")
    assert main(["check", run, own, "--set", "lora.r=3", "--set", "federation.local_steps=9"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{own}:7: lora.r: 2 here, the run has 3; ")
    assert second.startswith(f"{own}:8: work.local_steps: 2 at most here, the run has 9 ")
    assert main(["check", own, run]) == 2
    assert "write fedlora check run.yaml node.yaml" in capsys.readouterr().err
