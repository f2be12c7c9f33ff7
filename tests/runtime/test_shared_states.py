"""Runs side by side on the same records: the frozen layers' states, computed once for all of them."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import ConfigError
from fedlora.federation.events import Event
from fedlora.runs.rundir import HOLDINGS
from fedlora.runs.trained import trained_adapters
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import Prepared, Shared, prepare
from fedlora.runtime.simulate import simulate
from fedlora.training.prefix import Prefix, frozen_prefix
from fedlora.training.states import shared_states, with_states
from fedlora.training.tasks import evaluate
from fedlora.training.together import _packed

OFTEN = 1e6
"""Draws that pay for any corpus here."""


def unheard(event: Event) -> None:
    """Nobody listens."""


def upper(tiny_config, **changes):
    """A run that adapts the upper of two layers, in float64."""
    return tiny_config(lora__layers_to_transform=[1], model__dtype="float64", **changes)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def numbers(run_dir: Path) -> dict[str, torch.Tensor]:
    """All that was trained."""
    adapters, _ = trained_adapters(run_dir)
    return {**{site: factors.b for site, factors in adapters.sites.items()}, **adapters.head}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("privacy", [True, False])
def test_a_run_that_shares_states_ends_as_one_that_computes_all_layers(
    tiny_config, tmp_path, privacy, together
):
    changes = {} if privacy else {"privacy": "none"}
    config = upper(tiny_config, runtime__clients_together=together, **changes)
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    simulate(config, tmp_path / "alone", unheard)
    simulate(config, tmp_path / "with", unheard, shared=shared)
    made = files(shared.directory)
    assert len(made) == 2  # of training and of test records
    whole, short = numbers(tmp_path / "alone"), numbers(tmp_path / "with")
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-2
    # float64: six steps over some hundred records; a noised sum may fall on the next of its multiples, of 1e-9 or less
    assert_close(short, whole, rtol=1e-8, atol=1e-8)
    assert not (tmp_path / "with" / HOLDINGS).exists()


def test_runs_of_any_seed_method_and_split_find_the_same_files_and_other_data_have_their_own(
    tiny_config, tmp_path, topic_files
):
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    prepared = prepare(upper(tiny_config), unheard, shared)
    made = files(shared.directory)
    other = upper(
        tiny_config, seed=8, method={"name": "ffa"}, task__head="frozen", lora__init="kaiming", privacy="none"
    )
    again = prepare(other, unheard, shared)
    assert files(shared.directory) == made
    mine, theirs = prepared.clients, again.clients
    assert mine.examples.bounds.tolist() != theirs.examples.bounds.tolist()
    own = tmp_path / "own"
    for client, held in [*mine.examples.items(), *theirs.examples.items()]:
        states = with_states(
            own / client, again.model, prefix_of(again), held, base_model="", alone=True
        ).states
        assert np.array_equal(held.states.of(held.offsets), states.of(held.offsets))
    iid = {"kind": "iid", "clients": 3}
    scored_on_itself = {"data__train": str(topic_files[1]), "privacy": "none"}
    prepare(upper(tiny_config, **scored_on_itself, data__partition=iid), unheard, shared)
    assert len(files(shared.directory)) == len(made) + 1


def prefix_of(prepared: Prepared) -> Prefix:
    prefix = frozen_prefix(prepared.model)
    assert prefix is not None
    return prefix


def test_no_rows_are_copied_for_a_run_a_host_or_a_draw(tiny_config, tmp_path):
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    prepared = prepare(upper(tiny_config), unheard, shared)
    setup = prepared.save_for_hosts(tmp_path / "run")
    host = Host(setup)
    rows = [shared.directory / name for name in files(shared.directory)]
    kept = max(path.stat().st_size for path in rows)
    assert sum(path.stat().st_size for path in setup.holdings.iterdir()) < kept / 10
    client = prepared.clients.members[0].client
    node = host._node(client)
    assert node.states is None
    for examples in (
        prepared.clients.examples[client],
        node.examples,
        node.examples.select(np.array([2, 0])),
    ):
        assert isinstance(examples.states.rows, np.memmap)
        assert Path(examples.states.rows.filename) in rows
    drawn = [torch.tensor([0, 1])] * 2
    held = [host._node(member.client).examples for member in prepared.clients.members[:2]]
    assert held[0].states.rows is held[1].states.rows
    for _, run in _packed(host.model, held, drawn, 1.0):
        assert run.args[1].states.rows is held[0].states.rows


def test_the_test_records_are_scored_from_their_states(tiny_config, tmp_path):
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    prepared, plain = prepare(upper(tiny_config), unheard, shared), prepare(upper(tiny_config), unheard)
    passes = counted(prepared.model)
    with torch.no_grad():
        for model in (prepared.model, plain.model):
            for number, parameter in enumerate(model.trained.values()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / (1 + number))
    found, whole = (evaluate(run.model, run.clients.test) for run in (prepared, plain))
    assert found.loss == pytest.approx(whole.loss, rel=1e-12) and found.value == whole.value
    assert passes == []


def counted(model) -> list[int]:
    """Grows by the records of every pass through the lowest layer's first product, from here on."""
    passes: list[int] = []
    product = model.peft_model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    product.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    return passes


def test_of_two_runs_that_begin_at_once_one_computes_and_the_other_waits(tiny_config, tmp_path):
    runs = [prepare(upper(tiny_config), unheard) for _ in range(2)]
    passes = [counted(run.model) for run in runs]
    prefixes = [prefix_of(run) for run in runs]
    for seen in passes:
        seen.clear()  # of the probe
    records = runs[0].clients.examples.examples
    gate, found = threading.Barrier(2), []

    def begin(number: int) -> None:
        gate.wait()
        model, prefix = runs[number].model, prefixes[number]
        found.append(shared_states(tmp_path / "s", model, prefix, records, base_model="w", alone=True))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and len(files(tmp_path / "s")) == 1
    assert sorted(sum(seen) for seen in passes) == [0, len(records)]
    assert np.array_equal(*(examples.states.of(examples.offsets) for examples in found))


@pytest.mark.parametrize(
    ("changes", "draws"), [({}, 2 * 360 - 1), ({"lora__layers_to_transform": None}, OFTEN)]
)
def test_nothing_is_kept_where_it_does_not_pay_or_no_layer_lies_below(tiny_config, tmp_path, changes, draws):
    shared = Shared(directory=tmp_path / "states", draws=draws)
    config = tiny_config(**{"lora__layers_to_transform": [1], "privacy": "none", **changes})
    prepared = prepare(config, unheard, shared)
    assert prepared.clients.examples.examples.states is None and prepared.clients.test.states is None
    assert not shared.directory.exists()


def test_a_disk_without_room_is_told_before_a_byte_is_written(tiny_config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    config = upper(tiny_config, privacy="none")
    with pytest.raises(
        ConfigError, match=r"360 records need [\d,]+ bytes in .*, where 1,000 are free;.*cache_prefix: false"
    ):
        prepare(config, unheard, Shared(directory=tmp_path / "states", draws=OFTEN))
    assert files(tmp_path / "states") == []


def test_only_the_owner_reads_what_runs_share(tiny_config, tmp_path):
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    prepare(upper(tiny_config, privacy="none"), unheard, shared)
    assert shared.directory.stat().st_mode & 0o777 == 0o700
    assert {(shared.directory / name).stat().st_mode & 0o777 for name in files(shared.directory)} == {0o600}


@pytest.mark.parametrize("init", ["centred", "activations"])
def test_the_first_a_is_the_same_where_the_last_layer_is_cut_short_later(tiny_config, tmp_path, init):
    """Inputs of what follows attention are looked at for every token."""
    sites = {"lora__init": init, "lora__target_modules": ["query", "output.dense"]}
    config = upper(tiny_config, **sites)
    simulate(config, tmp_path / "alone", unheard)
    simulate(config, tmp_path / "with", unheard, shared=Shared(directory=tmp_path / "states", draws=OFTEN))
    whole, short = numbers(tmp_path / "alone"), numbers(tmp_path / "with")
    assert_close(short, whole, rtol=1e-8, atol=1e-8)


def test_other_settings_of_one_base_model_have_states_of_their_own(tiny_config, tiny_encoder, tmp_path):
    shared = Shared(directory=tmp_path / "states", draws=OFTEN)
    prepare(upper(tiny_config), unheard, shared)
    made = files(shared.directory)
    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    words = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**words, "hidden_act": "relu"}))
    prepare(upper(tiny_config, model__name=str(other)), unheard, shared)
    assert len(files(shared.directory)) == 2 * len(made)
