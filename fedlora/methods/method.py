"""What every method is made of."""

from dataclasses import dataclass
from typing import Literal

from fedlora.methods.mean import BY_FACTOR, Mean
from fedlora.methods.mixing import Mixing
from fedlora.methods.subspace import Subspace
from fedlora.values import Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published method as its parts.

    trains: what a client's model can train and send: B, or the core between A and a frozen left frame, or its diagonal,
        or A and B. Where one of two factors stays where the server put it, the mean of what is sent is exactly the mean
        of the changes of the model.
    sides: which factors rounds train, in turn.
    subspace: where A comes from and how it moves.
    mixing: how updates become one.
    mean: how that one moves the model, where both factors change.
    own_b: each client goes on from a B of its own, and the server's is the mean of them all, heard or not.
    """

    name: str
    trains: Literal["b", "core", "singular-values", "ab"]
    subspace: Subspace
    mixing: Mixing
    sides: tuple[Side, ...] = ("b",)
    mean: Mean = BY_FACTOR
    own_b: bool = False

    @property
    def leaves_rest(self) -> bool:
        """Whether the frozen weights take something up, which every request then carries."""
        return self.mean.leaves_rest or self.subspace.restart_every is not None

    def side(self, round: int) -> Side:
        """Which factors the round trains; the first is 1."""
        return self.sides[(round - 1) % len(self.sides)]
