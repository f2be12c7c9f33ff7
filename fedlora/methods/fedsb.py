"""Fed-SB (Singhal et al., arXiv 2502.15436): LoRA-SB's r x r core, averaged."""

from fedlora.config.method import FedSb
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def fedsb(method_cfg: FedSb, lora_cfg: Lora) -> Method:
    """Clients train and send the r x r core between A and a left frame, both frozen; the server averages it.

    Linear in what is sent, so the mean is exact; r * r noised numbers a site where B has d_out * r. The paper takes
    both frames from the first gradients of private data; here they come from `lora.init` and `method.left`, which
    look at nothing private.
    """
    return Method(
        name=method_cfg.name,
        trains="core",
        subspace=Subspace(init=lora_cfg.init, left=method_cfg.left, refactor_every=None),
        mixing=Mixing.of(method_cfg.stale),
    )
