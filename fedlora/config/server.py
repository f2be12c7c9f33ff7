"""What the server makes of a round's mixed update: `federation.server` of a run."""

from typing import Annotated, Literal

from pydantic import Field

from fedlora.config.section import Section


class ServerSgd(Section):
    """The mixed update as it is, times `lr`."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)] = 1.0
    """1: the model moves by the mean."""


class ServerMomentum(Section):
    """FedAvgM: what earlier rounds moved by goes on, in coordinates that turn with the basis."""

    name: Literal["momentum"]
    lr: Annotated[float, Field(gt=0)]
    """A step that goes on for ever adds up to lr / (1 - momentum): 1 - momentum keeps the mean's length."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """0 is sgd."""


class ServerAdam(Section):
    """FedAdam (arXiv 2003.00295), in the coordinates of a frame that no refactorisation turns."""

    name: Literal["adam"]
    lr: Annotated[float, Field(gt=0)]
    """About what one number of B moves by in a round, where updates are far above tau."""
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What a round leaves of the mean of updates."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """What a round leaves of the mean of their squares."""
    tau: Annotated[float, Field(gt=0)] = 1.0e-3
    """What is added to the root mean square. Far above it every number moves alike, whatever noise it carries; far
    below, this is momentum with the rate lr (1 - beta_1) / tau."""


Server = Annotated[ServerSgd | ServerMomentum | ServerAdam, Field(discriminator="name")]
