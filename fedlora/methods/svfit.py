"""SVFit (Sun et al., arXiv 2409.05926)."""

from fedlora.config.method import SvFit
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def svfit(method_cfg: SvFit, lora_cfg: Lora) -> Method:
    """Clients train and send the change of the r largest singular values of each frozen weight; the server averages it.

    r noised numbers a site, linear in what is sent, so the mean is exact. The paper trains the values themselves,
    from where they are; their change from zero makes the same steps. The sign of a pair of singular vectors is open,
    and that of its number with it; the product is the same.
    """
    del lora_cfg  # the directions are the weight's own
    return Method(
        name=method_cfg.name,
        trains="singular-values",
        subspace=Subspace(init="principal", left="principal", diagonal=True, refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
    )
