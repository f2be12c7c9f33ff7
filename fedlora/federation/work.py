"""What a round asks of a client."""

from fedlora.config.schema import Federation, Sgd
from fedlora.values import LocalWork


def work(number: int, federation: Federation) -> LocalWork:
    """What is asked of a client in round `number` (the first is 1)."""
    optimizer = federation.optimizer
    left = 1.0 if optimizer.decay == "none" else (federation.rounds - number + 1) / federation.rounds
    proximal = optimizer.proximal if isinstance(optimizer, Sgd) else 0.0
    return LocalWork(steps=federation.local_steps, learning_rate=optimizer.lr * left, proximal=proximal)
