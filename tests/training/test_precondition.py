"""What a step makes of B's noised gradient: each rule against its definition, in coordinates that do not know it."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.config.schema import Classification, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import SeededNoise
from fedlora.training.client import Node, train
from fedlora.training.descent import descend, optimizer_over
from fedlora.training.load import load_model
from fedlora.training.precondition import allora, lora_pro
from fedlora.values import Adapters, Factors, LocalWork, Sampling, TrainRequest

EXACT = {"rtol": 1e-11, "atol": 1e-13}
RATE = 0.3


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal(a):
    return torch.linalg.qr(a.T).Q.T


def test_lora_pro_leaves_gradients_under_an_orthonormal_a_at_scale_one(draw):
    gradient = draw(7, 3)
    assert_close(lora_pro(orthonormal(draw(3, 9)), 1.0)(gradient, draw(7, 3)), gradient, **EXACT)


@pytest.mark.parametrize("scale", [0.25, 1.0, 8.0])
def test_lora_pro_steps_the_product_by_the_full_gradient_projected_on_the_rows_of_a(draw, scale):
    a, full = draw(3, 9), draw(7, 9)
    stepped = scale * lora_pro(a, scale)(scale * full @ a.T, draw(7, 3)) @ a
    rows = orthonormal(a)
    assert_close(stepped, full @ rows.T @ rows, **EXACT)


def test_lora_pro_is_the_projection_also_where_rows_of_a_depend_on_each_other(draw):
    a, full = draw(3, 9), draw(7, 9)
    a[2] = a[0] - 2 * a[1]
    rows = orthonormal(a[:2])
    assert_close(lora_pro(a, 1.0)(full @ a.T, draw(7, 3)) @ a, full @ rows.T @ rows, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_allora_is_its_rule_row_by_row_for_a_layer_without_a_factor(draw, scale):
    """Down |(W + B' A) x - y|^2, where the gradient of B' is autograd's; and the same in B = B' / s."""
    a, x, y = draw(3, 9), draw(9, 20), draw(7, 20)
    free, ours = torch.zeros(7, 3, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64)
    for _ in range(6):
        leaf, held = free.clone().requires_grad_(), ours.clone().requires_grad_()
        (theirs,) = torch.autograd.grad((leaf @ a @ x - y).square().mean(), leaf)
        (gradient,) = torch.autograd.grad((scale * held @ a @ x - y).square().mean(), held)
        ours = ours - RATE * allora(a, scale)(gradient, ours)
        for row in range(7):
            length = float((free[row] @ a).norm())
            free[row] -= RATE * theirs[row] / (length + 1 / scale**2) ** 0.5
    assert_close(scale * ours, free, **EXACT)
    assert float(free.norm(dim=1).max()) > 0.1


def test_allora_at_zero_multiplies_by_eta_and_slows_rows_that_have_moved(draw):
    a, gradient = orthonormal(draw(3, 9)), torch.ones(2, 3, dtype=torch.float64)
    assert_close(allora(a, 4.0)(gradient, torch.zeros_like(gradient)), gradient / 4.0, **EXACT)
    b = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    still, moved = allora(a, 1.0)(gradient, b)
    assert_close(moved, still / 2.0, **EXACT)  # 1 / sqrt(3 + 1)


@dataclasses.dataclass
class Scene:
    """A client without privacy, so that clipping does not see the lengths of A; its head is away from zero."""

    model: object
    node: Node
    head: dict

    def moved(self, factors, optimizer, **work):
        """What one round does to scale * B A of each site, and to the head."""
        adapters = Adapters(basis=0, scale=self.model.scale, sites=factors, head=self.head)
        work = LocalWork(**{"steps": 1, "learning_rate": RATE, **work})
        request = TrainRequest(run="run", base_model="m", code="c", round=1, adapters=adapters, work=work)
        reply = train(dataclasses.replace(self.node, optimizer=optimizer), request, None)
        product = {
            site: self.model.scale * delta @ factors[site].a for site, delta in reply.delta.sites.items()
        }
        return product, reply.delta.head


@pytest.fixture
def scene(tiny, draw):
    def build(alpha):
        task = Classification(kind="sequence-classification")
        lora = Lora(r=2, lora_alpha=alpha, target_modules=["query", "value"])
        model = load_model(Model(name=tiny["bert"], dtype="float64"), task, lora, ("a", "b", "c"), seed=1)
        numbers = np.random.Generator(np.random.Philox(2))
        examples = Examples(
            input_ids=numbers.integers(5, 60, 60).astype(np.int32),
            offsets=np.arange(0, 61, 6),
            labels=numbers.integers(0, 3, 10),
        )
        node = Node(
            client="c", model=model, examples=examples, declared_records=10,
            sampling=Sampling(rate=1.0, expected_batch=10.0, max_draw=100), optimizer=Sgd(name="sgd", lr=1.0),
            mechanism=None, alone=False, evaluation_noise=None, budget=None, engine=DirectEngine(),
            noise=SeededNoise(1),
        )  # fmt: skip
        head = {name: 0.5 * draw(*value.shape) for name, value in model.head().items()}
        return Scene(model, node, head)

    return build


def test_under_lora_pro_no_first_step_knows_the_lengths_of_a_nor_lora_alpha(scene):
    """PEFT's A at any scale, and an orthonormal A of the same rows at scale 1 without a preconditioner."""
    other, plain = scene(16.0), scene(2.0)
    plain.head = other.head
    kaiming = {
        site: Factors(a=a.detach().clone(), b=torch.zeros_like(b))
        for site, (a, b) in other.model.live.items()
    }
    straight = {site: Factors(a=orthonormal(f.a), b=f.b) for site, f in kaiming.items()}
    wanted, wanted_head = plain.moved(straight, Sgd(name="sgd", lr=1.0))
    found, head = other.moved(kaiming, Sgd(name="sgd", lr=1.0, precondition="lora-pro"))
    without, _ = other.moved(kaiming, Sgd(name="sgd", lr=1.0))
    for site, value in wanted.items():
        assert float((found[site] - value).norm()) < 1e-9 * float(value.norm())
        assert float((without[site] - value).norm()) > 0.5 * float(value.norm())
    for name, value in wanted_head.items():
        assert_close(head[name], value, **EXACT)


@pytest.mark.parametrize("kind", ["lora-pro", "allora"])
def test_the_head_and_a_pull_to_the_start_are_left_as_they_are(scene, kind):
    """A gradient of zero: all that moves B is the pull, and it goes the share of the way that it says."""
    one = scene(8.0)
    config = Sgd(name="sgd", lr=RATE, proximal=0.5, precondition=kind)
    trained = one.model.trained
    stepper = optimizer_over(trained, config, RATE, one.model)
    began = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    still = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    descend(stepper, trained, still)
    for name, parameter in trained.items():
        assert_close(parameter.detach(), began[name] + 1 - RATE * 0.5, **EXACT)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    stepper = optimizer_over(trained, Sgd(name="sgd", lr=RATE, precondition=kind), RATE, one.model)
    given = {name: torch.ones_like(parameter) for name, parameter in trained.items()}
    descend(stepper, trained, given)
    for name, parameter in trained.items():
        is_b, plain = ".lora_B" in name, before[name] - RATE
        assert torch.allclose(parameter.detach(), plain, rtol=0, atol=1e-9) is not is_b
        assert bool((given[name] == 1).all())  # what was released is not written over
