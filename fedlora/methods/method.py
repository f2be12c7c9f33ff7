"""What every method is made of."""

from dataclasses import dataclass
from typing import Literal

from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published method as three parts.

    trains: what a client trains and sends: B, or the core between A and a frozen left frame. A and the frame stay
        where the server put them, so the mean of what is sent is exactly the mean of the changes of the model.
    subspace: where A comes from and how it moves.
    mixing: how updates become one.
    """

    name: str
    trains: Literal["b", "core"]
    subspace: Subspace
    mixing: Mixing
