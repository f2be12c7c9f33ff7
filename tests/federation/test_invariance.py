"""FedSVD is FFA-LoRA with an orthonormal A in other coordinates, while clients take noised SGD steps."""

import pytest
import torch
from torch.testing import assert_close

from fedlora.federation.plan import plan
from fedlora.values import Delta

SITE, STEPS, RECORDS, ROUNDS = "x", 4, 12, 15


def records(client):
    generator = torch.Generator().manual_seed(int(client[-1]))
    x = torch.randn(RECORDS, 9, generator=generator, dtype=torch.float64)
    return x, torch.randn(RECORDS, 7, generator=generator, dtype=torch.float64)


def private_gradient(a, b, client, noise):
    """Sum of per-record gradients of a squared error in b, each clipped to norm 1, plus the noise."""
    x, y = records(client)
    h = x @ a.T
    each = torch.einsum("im,ir->imr", h @ b.T - y, h)
    factor = (1 / each.flatten(1).norm(dim=1)).clamp(max=1.0)
    return torch.einsum("i,imr->mr", factor, each) + noise


def trained(state, client, round_, optimizer):
    """The client's change of B in a few private steps; the noise is drawn in the frame and turned."""
    a, start = state.adapters.sites[SITE].a, state.adapters.sites[SITE].b
    gauge = state.gauges[-1].sites[SITE]
    generator = torch.Generator().manual_seed(100 * round_ + int(client[-1]))
    b = start.clone().requires_grad_()
    step = optimizer([b])
    for _ in range(STEPS):
        noise = torch.randn(7, 3, generator=generator, dtype=torch.float64) @ gauge.T
        b.grad = private_gradient(a, b.detach(), client, noise)
        step.step()
    return b.detach() - start


def final_model(lab, method, optimizer):
    state, federation = lab.start(method), lab.federation(cohort=3)
    for _ in range(ROUNDS):
        planned = plan(state, lab.members(5), run="run", federation=federation, seed=7)
        replies = []
        for client in planned.cohort:
            b = trained(state, client, planned.round, optimizer)
            sites = {SITE: b, "y": torch.zeros_like(state.adapters.sites["y"].b)}
            head = {"weight": torch.zeros(2, 4, dtype=torch.float64)}
            delta = Delta(basis=state.adapters.basis, sites=sites, head=head)
            replies.append(lab.update(client, planned, delta))
        absorbed = lab.absorb(state, planned, replies, method=method, federation=federation)
        state = absorbed.state
    return lab.products(state)[SITE]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


@pytest.mark.parametrize("refactor_every", [1, 4])
def test_under_sgd_fedsvd_is_ffa_with_turned_noise(lab, refactor_every):
    fixed = final_model(lab, lab.method("ffa"), sgd)
    turned = final_model(lab, lab.method("fedsvd", refactor_every=refactor_every), sgd)
    assert float(fixed.norm()) > 0.1
    assert_close(turned, fixed, rtol=1e-10, atol=1e-10)


def test_under_adamw_it_is_not(lab):
    fixed = final_model(lab, lab.method("ffa"), adamw)
    turned = final_model(lab, lab.method("fedsvd"), adamw)
    assert float((turned - fixed).norm() / fixed.norm()) > 0.01


def test_with_pefts_a_it_is_another_run(lab):
    fixed = final_model(lab, lab.method("ffa"), sgd)
    assert float((final_model(lab, lab.method("fedavg"), sgd) - fixed).norm() / fixed.norm()) > 0.01
