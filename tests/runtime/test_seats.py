"""How many workers share a card, and where they sit."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import prepare
from fedlora.runtime.probe import largest_batch, largest_step
from fedlora.runtime.seats import (
    FILLED,
    GpuNode,
    Peak,
    gpu_nodes,
    model_holders,
    on_cards,
    side_by_side,
    slots,
    worker_count,
)
from fedlora.runtime.simulate import simulate
from fedlora.training.tasks import TOKEN_BUDGET
from fedlora.training.tokens import TokenIntake

GB = 10**9


def cuda(**changes) -> Runtime:
    return Runtime(kind="ray", device="cuda", **changes)


def test_as_many_workers_as_the_config_says():
    def count(**runtime):
        return worker_count(Runtime(kind="ray", **runtime), cores=8)

    assert (count(), count(threads=2), count(threads=16), count(workers=3)) == (8, 4, 1, 3)


def test_every_worker_holds_a_model_and_so_does_the_process_that_asks_them():
    spread, here = Runtime(kind="ray", workers=3), Runtime(kind="local", workers=3)
    assert (side_by_side(spread, cores=8), model_holders(spread, cores=8)) == (3, 4)
    assert (side_by_side(here, cores=8), model_holders(here, cores=8)) == (1, 1)


def test_a_card_carries_as_many_workers_as_nine_tenths_of_its_memory_hold():
    assert slots(Peak(taken=3 * GB, total=80 * GB)) == 24
    assert slots(Peak(taken=72 * GB, total=80 * GB)) == 1
    assert slots(Peak(taken=73 * GB, total=80 * GB)) == 0


def test_unequal_machines_carry_unequal_shares():
    nodes = [
        GpuNode(node="large", kind="H100", cards=2, cores=64),
        GpuNode(node="small", kind="T4", cards=1, cores=64),
        GpuNode(node="few cores", kind="H100", cards=1, cores=5),
    ]
    peaks = {"H100": Peak(taken=8 * GB, total=80 * GB), "T4": Peak(taken=7 * GB, total=16 * GB)}
    seats = on_cards(nodes, peaks, cuda(threads=2), clients=1000)
    assert Counter(seat.node for seat in seats) == {"large": 18, "small": 2, "few cores": 2}
    assert {seat.node: seat.gpus for seat in seats} == {"large": 0.1111, "small": 0.5, "few cores": 0.5}


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 99), st.integers(1, 90)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 200),
)
def test_no_card_is_filled_beyond_its_memory_and_no_machine_beyond_its_cores(machines, threads, clients):
    nodes = [
        GpuNode(node=str(place), kind=str(place), cards=cards, cores=cores)
        for place, (cards, cores, _) in enumerate(machines)
    ]
    peaks = {str(place): Peak(taken=taken, total=100) for place, (_, _, taken) in enumerate(machines)}
    if all(cores < threads for _, cores, _ in machines):
        with pytest.raises(ConfigError):
            on_cards(nodes, peaks, cuda(threads=threads), clients)
        return
    seats = on_cards(nodes, peaks, cuda(threads=threads), clients)
    assert 1 <= len(seats) <= clients
    for node in nodes:
        here = [seat for seat in seats if seat.node == node.node]
        assert sum(seat.cpus for seat in here) <= node.cores
        if here:
            on_one = int(1 / here[0].gpus)
            assert on_one * peaks[node.kind].taken <= FILLED * 100
            assert len(here) <= on_one * node.cards


def test_a_card_that_no_worker_fits_on_is_said_with_the_bytes():
    nodes = [GpuNode(node="small", kind="T4", cards=1, cores=8)]
    with pytest.raises(ConfigError, match="15,000,000,000 of 16,000,000,000 bytes"):
        on_cards(nodes, {"T4": Peak(taken=15 * GB, total=16 * GB)}, cuda(), clients=9)
    with pytest.raises(ConfigError, match="no node has a GPU"):
        on_cards([], {}, cuda(), clients=9)


def test_cards_of_a_kind_that_ray_does_not_know_are_a_kind_of_their_own():
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0, "accelerator_type:H100": 1.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"NodeID": "c", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "d", "Alive": False, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    ]
    assert gpu_nodes(nodes) == [
        GpuNode(node="a", kind="accelerator_type:H100", cards=2, cores=4),
        GpuNode(node="b", kind="b", cards=1, cores=4),
    ]


def test_the_probe_works_the_largest_micro_batch_and_spends_nothing(tiny_config, tmp_path):
    config = tiny_config()
    host = Host(prepare(config, lambda event: None).save_for_hosts(tmp_path))
    batch = largest_batch(config, host.model.intake, alone=False)
    assert np.diff(batch.offsets).tolist() == [16] * (TOKEN_BUDGET // 16)
    assert len(largest_batch(config, host.model.intake, alone=True)) == 1
    before = {name: parameter.detach().clone() for name, parameter in host.model.trained.items()}
    largest_step(host)
    assert all(before[name].equal(parameter) for name, parameter in host.model.trained.items())
    assert not (tmp_path / "ledgers").exists()


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_cuda_without_a_gpu_is_said_before_anything_is_written(tiny_config, tmp_path, kind):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = tiny_config(runtime={"kind": kind, "device": "cuda"})
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda.*finds no GPU"):
        simulate(config, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # a cluster of three nodes
def test_workers_sit_where_their_seats_say(tiny_config, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from fedlora.runtime.cluster import connected
    from fedlora.runtime.crew import Crew

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        for cards in (1, 2):
            cluster.add_node(num_cpus=2, num_gpus=cards)
        setup = prepare(tiny_config(privacy="none"), lambda event: None).save_for_hosts(tmp_path)
        runtime = cuda(address=cluster.address)
        with connected(runtime, setup.run, tmp_path) as vitals:
            nodes = gpu_nodes(ray.nodes())
            peaks = {node.kind: Peak(taken=4 * GB // node.cards, total=10 * GB) for node in nodes}
            seats = on_cards(nodes, peaks, runtime, clients=99)
            crew = Crew(setup, seats, print, vitals)
            places = ray.get([worker.placed for worker in crew.workers], timeout=120)
            assert places == [seat.node for seat in seats]
            assert Counter(places) == {node.node: 2 for node in nodes}
            assert {node.cards: seat.gpus for node in nodes for seat in seats if seat.node == node.node} == {
                1: 0.5,
                2: 1.0,
            }
            crew.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_largest_batch_of_pairs_holds_no_more_padded_tokens_and_two_rows_a_record(tiny_config):
    columns = {"text": None, "label": None, "prompt": "q", "chosen": "a", "rejected": "b"}
    config = tiny_config(
        task={"kind": "dpo"}, data__partition={"kind": "iid", "clients": 3},
        **{f"data__{name}": value for name, value in columns.items()},
    )  # fmt: skip
    intake = TokenIntake(name="any", pad_token=0)
    batch = largest_batch(config, intake, alone=False)
    assert batch.sequences_per_record == 2 and set(batch.sequence_lengths) == {16}
    assert batch.footprints.sum() == TOKEN_BUDGET
    assert len(largest_batch(config, intake, alone=True)) == 1
