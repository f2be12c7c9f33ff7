"""SwitchLoRA (Zhou et al., arXiv 2406.06564): some directions of A give way to new ones."""

from fedlora.config.method import Switch
from fedlora.config.schema import Lora
from fedlora.methods.method import Method
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


def switch(method_cfg: Switch, lora_cfg: Lora) -> Method:
    """FFA-LoRA that unloads `rows` of A at a time, the weakest: the others go on with their columns of B.

    The paper swaps single vectors for candidates at random, more rarely as training goes on; here it is the
    directions that carry least of the product, so that what is unloaded is mostly noise.
    """
    return Method(
        name=method_cfg.name,
        trains="b",
        subspace=Subspace(
            init=lora_cfg.init,
            refactor_every=None,
            restart_every=method_cfg.restart_every,
            restart_rows=method_cfg.rows,
        ),
        mixing=Mixing.of(method_cfg.stale),
    )
