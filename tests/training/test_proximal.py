"""FedProx: a pull to where the round began, against its closed form; what it does to a client, test_client says."""

import torch
from torch.testing import assert_close

from fedlora.config.schema import Sgd
from fedlora.training.descent import descend, optimizer_over

RATE, PULL = 0.3, 0.9


def points(optimizer, steps=5):
    """The way from `start` down 1/2 <x - well, curve (x - well)>."""
    draw = torch.Generator().manual_seed(0)
    start, well, root = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((4,), (4,), (4, 4))
    )
    curve = root @ root.T / 4
    x = torch.nn.Parameter(start.clone())
    stepper = optimizer_over({"x": x}, optimizer, RATE)
    for _ in range(steps):
        descend(stepper, {"x": x}, {"x": curve @ (x.detach() - well)})
    return x.detach(), start, well, curve


def test_on_a_quadratic_it_is_the_closed_form():
    steps = 5
    found, start, well, curve = points(Sgd(name="sgd", lr=RATE, proximal=PULL), steps)
    both = curve + PULL * torch.eye(4, dtype=torch.float64)
    # Steepest descent on 1/2 <x - well, curve (x - well)> + pull / 2 |x - start|^2, about its own lowest point.
    lowest = torch.linalg.solve(both, curve @ well + PULL * start)
    left = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - RATE * both, steps)
    assert_close(found, lowest + left @ (start - lowest), rtol=1e-12, atol=1e-12)
    without, *_ = points(Sgd(name="sgd", lr=RATE), steps)
    assert float((found - start).norm()) < 0.9 * float((without - start).norm())


def test_off_it_leaves_every_bit():
    plain, start, well, curve = points(Sgd(name="sgd", lr=RATE, proximal=0.0))
    x = torch.nn.Parameter(start.clone())
    stepper = torch.optim.SGD([x], lr=RATE)
    for _ in range(5):
        x.grad = curve @ (x.detach() - well)
        stepper.step()
    assert torch.equal(plain, x.detach())


def test_no_gradient_is_written_over():
    x, given = torch.nn.Parameter(torch.ones(3)), torch.full((3,), 2.0)
    stepper = optimizer_over({"x": x}, Sgd(name="sgd", lr=0.1, proximal=0.5), 0.1)
    for _ in range(2):
        descend(stepper, {"x": x}, {"x": given})
    assert torch.equal(given, torch.full((3,), 2.0))
    assert x.grad is None
