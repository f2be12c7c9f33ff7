"""What clients without models answer."""

from collections.abc import Sequence

import torch

from fedlora.values import ClientUpdate, Delta, DpEvent, TrainRequest

EVENT = DpEvent(noise_multiplier=1.0, sample_rate=0.1, steps=1)


def ones(client: str, request: TrainRequest, spent: Sequence[DpEvent] = (EVENT,)) -> ClientUpdate:
    """The client's answer: ones for B, and for the head what the request has."""
    sites = {site: torch.ones_like(factors.b) for site, factors in request.adapters.sites.items()}
    delta = Delta(basis=request.adapters.basis, sites=sites, head=request.adapters.head)
    return ClientUpdate(client=client, run=request.run, round=request.round, delta=delta, spent=tuple(spent))


class Answering:
    """A Cohort whose clients all answer with ones, at once."""

    def __init__(self, spent: Sequence[DpEvent] = (EVENT,)):
        self.spent = spent

    def ask(self, clients, request):
        return (ones(client, request, self.spent) for client in clients)

    def close(self):
        """Nothing is open."""
