"""What every method is made of."""

from dataclasses import dataclass
from typing import Literal

from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published method as three parts.

    trains: the factor a client trains and sends; "b" while A stays where the server put it.
    subspace: where A comes from and how it moves.
    mixing: how updates become one.
    """

    name: str
    trains: Literal["b"]
    subspace: Subspace
    mixing: Mixing
