"""FedIT (Zhang et al., arXiv 2305.05644): A and B trained, each averaged by itself."""

from fedlora.config.method import FedIt
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedit(method_cfg: FedIt, lora_cfg: Lora) -> Method:
    """Clients train A and B; the server averages each, which is federated averaging of LoRA as PEFT has it.

    The product of the means is not the mean of the products: it lacks cov(B, A) over clients, and the noise of A
    meets the noise of B. It is here to be compared with.
    """
    return Method(
        name=method_cfg.name,
        trains="ab",
        sides=("both",),
        subspace=Subspace(init=lora_cfg.init, refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
    )
