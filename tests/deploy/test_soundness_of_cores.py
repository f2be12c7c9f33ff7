"""A core has few numbers, so the length of its noise scatters; an honest node is not dropped for that."""

import pytest
import torch

from fedlora.config.schema import Federation, Sgd
from fedlora.deploy.soundness import Soundness
from fedlora.privacy.gaussian import sensitivity
from fedlora.values import ClientUpdate, Delta, DpEvent

UPDATES = 1000
BATCH = 16


@pytest.mark.fault("F31")
@pytest.mark.parametrize(("sites", "rank", "steps"), [(2, 1, 1), (4, 1, 5), (2, 2, 1)])
def test_an_honest_update_of_a_small_core_is_not_dropped(sites, rank, steps):
    federation = Federation(
        rounds=5, cohort=1, local_steps=steps, batch_size=BATCH, optimizer=Sgd(name="sgd", lr=0.5)
    )
    soundness = Soundness(federation=federation, max_grad_norm=1.0)
    numbers = sites * rank**2
    spent = DpEvent(
        noise_multiplier=1.0, sample_rate=0.01, steps=steps, expected_batch=BATCH, max_draw=4 * BATCH
    )
    deviation = 0.5 / BATCH * sensitivity(1.0, 1.0, numbers)
    draw = torch.Generator().manual_seed(0)
    dropped = 0
    for _ in range(UPDATES):
        row = deviation * torch.randn(steps, numbers, generator=draw, dtype=torch.float64).sum(dim=0)
        parts = row.view(sites, rank, rank)
        delta = Delta(basis=0, sites={f"site-{index}": part for index, part in enumerate(parts)}, head={})
        update = ClientUpdate(client="client", run="run", round=1, delta=delta, spent=(spent,))
        dropped += soundness.objection(update) is not None
    assert dropped <= UPDATES // 1000
