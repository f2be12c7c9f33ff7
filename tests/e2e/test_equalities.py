"""FedSVD is FFA-LoRA in other coordinates: equal under SGD once the noise is turned along, different under AdamW.

Both federations run the real client code on a real (tiny) transformer in float64, clipped and noised.
"""

import pytest
import torch

from fedlora.federation.absorb import absorb
from fedlora.federation.gather import gather
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.federation.work import work
from fedlora.privacy import gaussian
from fedlora.privacy.noise import SeededNoise
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import prepare
from fedlora.values import ClientUpdate, TrainRequest


class TurnedNoise:
    """Noise drawn in the canonical frame and given in the coordinates of the moment: the same vector in any basis."""

    kind = "seeded"

    def __init__(self, seed: int) -> None:
        self.inner = SeededNoise(seed)
        self.rotations: dict[str, torch.Tensor] = {}

    def normal(self, shape, *, dtype, purpose):
        drawn = self.inner.normal(shape, dtype=dtype, purpose=purpose)
        site = str(purpose[-1]).removesuffix(".lora_B")
        # delta @ gauge is the delta in the frame and the gauge is orthogonal, so the way back is gauge^T.
        return drawn @ self.rotations[site].T if site in self.rotations else drawn

    def uniform(self, count, *, purpose):
        return self.inner.uniform(count, purpose=purpose)


def products_after_five_rounds(config, run_dir, *, turn: bool = True) -> dict[str, torch.Tensor]:
    """b @ a of every site, and the head."""
    prepared = prepare(config, lambda event: None)
    clients, state = prepared.clients, prepared.first_state()
    host = Host(prepared.save_for_hosts(run_dir))
    host.noise = noise = TurnedNoise(3)
    for number in range(1, 6):
        noise.rotations = dict(state.gauges[-1].sites) if turn else {}
        planned = plan(state, clients.members, run="r", federation=config.federation, seed=config.seed)
        request = TrainRequest(
            run="r", base_model="", code="", round=number, adapters=state.adapters,
            work=work(number, config.federation),
        )  # fmt: skip
        replies = host.answer(planned.cohort, request)
        assert all(isinstance(reply, ClientUpdate) for reply in replies)
        heard = gather(
            state, planned, replies,
            memory=Remembered(), method=prepared.method, federation=config.federation,
        )  # fmt: skip
        state = absorb(state, heard, method=prepared.method, federation=config.federation).state
    return {s: f.b @ f.a for s, f in state.adapters.sites.items()} | dict(state.adapters.head)


def largest_difference(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry."""
    size = max(float(value.abs().max()) for value in x.values())
    return max(float((x[name] - y[name]).abs().max()) for name in x) / size


@pytest.fixture
def both(tiny_config):
    def build(**changes):
        common = {
            "model__dtype": "float64",
            "federation__rounds": 5,
            "privacy__max_participations": 5,
            **changes,
        }
        return tiny_config(method={"name": "fedsvd"}, **common), tiny_config(method={"name": "ffa"}, **common)

    return build


def test_fedsvd_equals_ffa_orthonormal_under_sgd(both, tmp_path, monkeypatch):
    # What is released lies on a grid in B's own coordinates; one as fine as float64 leaves the algebra alone.
    monkeypatch.setattr(gaussian, "GRID_BITS", 60)
    fedsvd, ffa = both()
    x = products_after_five_rounds(fedsvd, tmp_path / "fedsvd")
    y = products_after_five_rounds(ffa, tmp_path / "ffa")
    assert largest_difference(x, y) < 1e-10


def test_the_grid_of_releases_sets_the_two_apart_by_no_more_than_its_width(both, tmp_path):
    fedsvd, ffa = both()
    x = products_after_five_rounds(fedsvd, tmp_path / "fedsvd")
    y = products_after_five_rounds(ffa, tmp_path / "ffa")
    assert 1e-9 < largest_difference(x, y) < 1e-4


def test_without_turning_the_noise_the_two_runs_are_different_draws(both, tmp_path):
    fedsvd, ffa = both()
    x = products_after_five_rounds(fedsvd, tmp_path / "fedsvd", turn=False)
    y = products_after_five_rounds(ffa, tmp_path / "ffa", turn=False)
    assert largest_difference(x, y) > 1e-2


def test_under_adamw_the_basis_matters(both, tmp_path):
    fedsvd, ffa = both(federation__optimizer={"name": "adamw", "lr": 0.05})
    x = products_after_five_rounds(fedsvd, tmp_path / "fedsvd")
    y = products_after_five_rounds(ffa, tmp_path / "ffa")
    assert largest_difference(x, y) > 1e-2
