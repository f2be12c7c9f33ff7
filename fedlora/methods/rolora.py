"""RoLoRA (Chen et al., arXiv 2502.01755): B in one round, A in the next."""

from fedlora.config.method import RoLora
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def rolora(method_cfg: RoLora, lora_cfg: Lora) -> Method:
    """Odd rounds train and average B under a frozen A, even ones A under a frozen B: every mean is exact.

    B begins at zero, where A has no gradient, so B comes first (if nobody answers in the first round, the second is
    lost too). With `refactor`, the side that a round freezes is
    made orthonormal first and the trained one takes the singular values: then a step of either moves the product by
    its own length, whatever the other has grown to.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("b", "a"),
        subspace=Subspace(
            init=lora_cfg.init,
            refactor_every=1 if method_cfg.refactor else None,
            singular_values="trained",
        ),
        mixing=Mixing.of(method_cfg.stale),
    )
