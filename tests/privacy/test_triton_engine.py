"""Clipped sums by the Triton kernels are those of plain torch: in the interpreter, or on a GPU when there is one."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.stacked import stackable, stacked

from .models import Case, bert, llama, perceptron, trainable

triton_ops = pytest.importorskip("fedlora.kernels.triton_ops")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = DirectEngine(ops=triton_ops)


def wide_head() -> Case:
    """A trained weight that lies turned, and a head that reads more numbers than the kernels take."""
    torch.manual_seed(0)
    width = triton_ops.LARGEST_RANK + 6
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
    x, y = torch.randn(9, 4, 5), torch.randint(3, (9,))

    def losses(drawn: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(x[drawn]).mean(dim=1), y[drawn], reduction="none")

    return Case(model, trainable(model), len(x), losses)


def assert_near(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the whole sum: products are float32, in another order."""
    assert set(got) == set(wanted)
    whole = float(torch.stack([value.square().sum() for value in wanted.values()]).sum().sqrt())
    assert whole > 0
    for name, value in wanted.items():
        assert got[name].dtype == torch.float64
        assert torch.allclose(got[name], value, rtol=0, atol=1e-5 * whole), name


@pytest.mark.parametrize("bound", [0.05, None])
@pytest.mark.parametrize("build", [bert, llama, perceptron, wide_head], ids=lambda build: build.__name__)
def test_clipped_sums_are_those_of_plain_torch(build, bound):
    with torch.device(DEVICE):
        case = build()
    batches = case.micro_batches(4)
    got = TRITON.clipped_sum(case.model, case.trained, batches, bound)
    assert_near(got, DirectEngine().clipped_sum(case.model, case.trained, batches, bound))


def test_a_record_without_finite_gradient_leaves_the_others_alone():
    with torch.device(DEVICE):
        case = bert()
        factor = torch.ones(case.records)
    factor[0] = float("nan")
    everyone = torch.arange(case.records)
    got = TRITON.clipped_sum(case.model, case.trained, [lambda: case.losses(everyone) * factor], 0.05)
    others = case.micro_batches(of=everyone[1:])
    assert_near(got, DirectEngine().clipped_sum(case.model, case.trained, others, 0.05))
    alone = TRITON.clipped_sum(
        case.model, case.trained, [lambda: case.losses(everyone[:1]) * factor[:1]], 0.05
    )
    assert not any(value.any() for value in alone.values())


def test_sums_of_several_clients_at_once_are_those_of_plain_torch():
    with torch.device(DEVICE):
        case, owners = (
            wide_head(),
            torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2]),
        )  # of three: client 1 has drawn none
    packed = [
        (owners[part], lambda part=part: case.losses(part)) for part in torch.arange(case.records).split(4)
    ]
    layers = stackable(case.model, case.trained)
    with stacked(case.model, case.trained, layers, 3) as stack:
        got = TRITON.clipped_sums(stack, packed, 0.05)
        assert_near(got, DirectEngine().clipped_sums(stack, packed, 0.05))
    assert not any(value[1].any() for value in got.values())
