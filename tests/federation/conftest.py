"""A small federation without models: clients answer with whatever the test says."""

from dataclasses import dataclass, replace

import pytest
import torch

from fedlora.algebra.deltas import scale
from fedlora.config import schema
from fedlora.config.method import FedAvg, FedSvd, Ffa, Stale
from fedlora.federation.absorb import Absorbed, absorb, start
from fedlora.federation.gather import gather
from fedlora.federation.remembered import Memory, Remembered
from fedlora.methods import Method, build
from fedlora.values import ClientUpdate, Delta, DpEvent, Member, ServerState

SHAPES = {"x": (7, 9), "y": (5, 6)}
RANK = 3


@dataclass(frozen=True)
class Lab:
    """Builders; every draw comes from the generator it is given."""

    shapes = SHAPES

    def federation(self, **changes) -> schema.Federation:
        words = {
            "rounds": 50,
            "cohort": 2,
            "local_steps": 1,
            "batch_size": 8,
            "optimizer": {"name": "sgd", "lr": 0.1},
            **changes,
        }
        return schema.Federation.model_validate(words)

    def lora(self, init="orthonormal") -> schema.Lora:
        return schema.Lora(r=RANK, lora_alpha=6.0, target_modules=["query"], init=init)

    def method(self, name="fedsvd", beta=0.0, init="orthonormal", smoothing=0.9, **more) -> Method:
        kinds = {"fedsvd": FedSvd, "ffa": Ffa, "fedavg": FedAvg}
        stale = Stale(beta=beta, smoothing=smoothing)
        return build(kinds[name](name=name, stale=stale, **more), self.lora(init), 7)

    def start(self, method, dtype=torch.float64) -> ServerState:
        head = {"weight": torch.zeros(2, 4)}
        return start(SHAPES, head=head, lora_cfg=self.lora(), method=method, dtype=dtype)

    def admit(self, state, weight) -> ServerState:
        """The state once a new client holds a share of `weight`: other shares, and so the memory, shrink."""
        return replace(state, memory=scale(state.memory, 1 - weight))

    def members(self, count, examples=10) -> list[Member]:
        return [Member(client=f"client-{index}", examples=examples * (index + 1)) for index in range(count)]

    def delta(self, state, generator, basis=None) -> Delta:
        dtype = state.adapters.head["weight"].dtype
        return Delta(
            basis=state.adapters.basis if basis is None else basis,
            sites={
                site: torch.randn(d_out, RANK, generator=generator, dtype=torch.float64).to(dtype)
                for site, (d_out, _) in SHAPES.items()
            },
            head={"weight": torch.randn(2, 4, generator=generator, dtype=torch.float64).to(dtype)},
        )

    def update(self, client, plan, delta) -> ClientUpdate:
        spent = DpEvent(noise_multiplier=1.0, sample_rate=0.1, steps=1)
        return ClientUpdate(client=client, run=plan.run, round=plan.round, delta=delta, spent=(spent,))

    def absorb(self, state, plan, replies, *, method, federation, memory: Memory | None = None) -> Absorbed:
        """The round, from its replies to the next state; nothing is remembered but in `memory`."""
        heard = gather(
            state, plan, replies, memory=memory or Remembered(), method=method, federation=federation
        )
        return absorb(state, heard, method=method, federation=federation)

    def products(self, state) -> dict[str, torch.Tensor]:
        """The model's change, dense: b @ a of every site, and the head."""
        sites = {site: factors.b @ factors.a for site, factors in state.adapters.sites.items()}
        return sites | dict(state.adapters.head)

    def dense(self, delta, state) -> dict[str, torch.Tensor]:
        """What a client's update does to the model it was given, dense."""
        return {site: delta.sites[site] @ state.adapters.sites[site].a for site in SHAPES} | dict(delta.head)

    def dense_in_frame(self, delta, state) -> dict[str, torch.Tensor]:
        return {site: delta.sites[site] @ state.frame[site] for site in SHAPES} | dict(delta.head)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
