"""What a round asks of a client, and what its learning rate is beside that of others."""

from dataclasses import replace

from fedlora.config.schema import Federation, Sgd
from fedlora.methods import Method
from fedlora.values import Adapters, LocalWork, Origin, TrainRequest


def work(number: int, federation: Federation, method: Method | None = None) -> LocalWork:
    """What is asked of a client in round `number` (the first is 1); None: of a method that trains B alone."""
    optimizer = federation.optimizer
    rate = optimizer.lr * _left(number, federation)
    side, own_b = ("b", False) if method is None else (method.side(number), method.own_b)
    asked = LocalWork(steps=federation.local_steps, learning_rate=rate, side=side, own_b=own_b)
    if not isinstance(optimizer, Sgd):
        return asked
    return replace(asked, proximal=optimizer.proximal, precondition=optimizer.precondition)


def request_of(
    origin: Origin, number: int, adapters: Adapters, federation: Federation, method: Method
) -> TrainRequest:
    """What goes to each client of round `number`."""
    return TrainRequest(
        run=origin.run,
        base_model=origin.base_model,
        code=origin.code,
        round=number,
        adapters=adapters,
        work=work(number, federation, method),
    )


def first_rate_over(number: int, federation: Federation) -> float:
    """The learning rate of the first round over that of round `number`; exactly 1 without decay."""
    return 1 / _left(number, federation)


def _left(number: int, federation: Federation) -> float:
    """Of the learning rate, in round `number`."""
    if federation.optimizer.decay == "none":
        return 1.0
    return (federation.rounds - number + 1) / federation.rounds
