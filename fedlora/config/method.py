"""The methods of a run: which factors move, where, and how updates mix. One section a published method."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from fedlora.config.section import Section


class Stale(Section):
    """FedStale: remembered updates of absent clients. Costs no epsilon; repeats their noise."""

    beta: Annotated[float, Field(ge=0, le=1)] | Literal["adaptive", "adaptive-by-client"]
    """0 is FedAvg, 1 is FedVARP. Under strong noise small values are best: beta* = SNR / (1 + SNR). adaptive: 0 until
    clients are heard again, then how much of what was remembered came back, of released values of earlier rounds only:
    sum <fresh, remembered> / sum |remembered|^2, whose denominator holds the noise. adaptive-by-client: the same for
    each client, by its own updates once there are two; needs participation importance and a cohort {probability}."""
    rule: Literal["fedstale", "mifa"] = "fedstale"
    """How remembered updates count. fedstale: as `beta` says. mifa (arXiv 2106.04159), with beta 1: a round's step is
    the sum of everybody's newest update by its share, whoever answered, at the round's learning rate; who was never
    heard counts as zero. It asks for no probability of taking part, and is biased within a round."""
    scale_by_rate: bool = False
    """Under a decaying learning rate an update that is remembered or late counts times the rate now / the rate it was
    made with, so that old ones do not outweigh fresh ones. mifa always does; without decay it changes nothing."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of an adaptive beta: what is left of either sum when a round is added. 0: the last round alone says; 0.9: about
    the last ten do."""
    memory: Literal["disk"] = "disk"
    """Where they are kept: in memory.sqlite of the run, so that the server's memory does not grow with the
    federation."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How they are kept, a client: float32, 4 bytes a trained number, exact (8 in a float64 run); bfloat16, 2; int8, 1,
    with a power-of-two unit a tensor. The sum over absent clients is always of exactly what is kept."""


class _Method(Section):
    """What every method says of itself.

    title: what reports call it, as its paper writes it. trains: what `lora.trains` has to be. own_b: each client goes
    on from its own B.
    """

    title: ClassVar[str]
    trains: ClassVar[str]
    own_b: ClassVar[bool] = False


class FedSvd(_Method):
    """FedSVD (arXiv 2505.12805): average B, then refactorise so that A has orthonormal rows."""

    name: Literal["fedsvd"]
    title: ClassVar = "FedSVD"
    trains: ClassVar = "b"
    refactor_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two refactorisations."""
    route: Literal["lq", "dense"] = "lq"
    """How: lq, thin factorisations that never leave A's row space; dense, an SVD of the whole product as the authors'
    code runs it, some thousand times dearer, which loses directions wherever B lacks rank."""
    soft_threshold: Annotated[float, Field(ge=0)] = 0.0
    """What each refactorisation takes off every singular value of B A (SoRA, arXiv 2311.11696): directions that hold
    less are dropped, and with them mostly noise. It comes after the noise and costs no privacy. 0: nothing."""
    stale: Stale = Stale(beta=0.0)


class Ffa(_Method):
    """FFA-LoRA (arXiv 2403.12313): A stays as `lora.init` drew it, B is averaged."""

    name: Literal["ffa"]
    title: ClassVar = "FFA-LoRA"
    trains: ClassVar = "b"
    stale: Stale = Stale(beta=0.0)


class FedSb(_Method):
    """Fed-SB (arXiv 2502.15436): an r x r core between A and a left frame, both frozen, is averaged."""

    name: Literal["fedsb"]
    title: ClassVar = "Fed-SB"
    trains: ClassVar = "core"
    left: Literal["orthonormal", "principal", "gradients"] = "principal"
    """The left frame: random orthonormal columns, or the first left singular vectors of the frozen weight, or of its
    gradient on the labelled records of `data.public`, as the authors have it."""
    stale: Stale = Stale(beta=0.0)


class SvFit(_Method):
    """SVFit (arXiv 2409.05926): of each frozen weight the r largest singular values, between its own singular vectors,
    are trained and averaged."""

    name: Literal["svfit"]
    title: ClassVar = "SVFit"
    trains: ClassVar = "singular-values"
    stale: Stale = Stale(beta=0.0)


class FedAvg(_Method):
    """Plain federated LoRA: A stays as PEFT draws it (Kaiming), B is averaged, nothing is refactorised."""

    name: Literal["fedavg"]
    title: ClassVar = "FedAvg of LoRA B"
    trains: ClassVar = "b"
    stale: Stale = Stale(beta=0.0)


class FedAsk(_Method):
    """FedASK (arXiv 2507.09990) as under privacy, A frozen at clients: FedSVD with the singular values' square roots on
    either side."""

    name: Literal["fedask"]
    title: ClassVar = "FedASK"
    trains: ClassVar = "b"
    stale: Stale = Stale(beta=0.0)


class FedIt(_Method):
    """FedIT (arXiv 2305.05644): A and B are trained, each is averaged by itself."""

    name: Literal["fedit"]
    title: ClassVar = "FedIT"
    trains: ClassVar = "ab"
    stale: Stale = Stale(beta=0.0)


class FedSa(_Method):
    """FedSA-LoRA (arXiv 2410.01463): A and B are trained, A is averaged, and each client goes on from its own B."""

    name: Literal["fedsa"]
    title: ClassVar = "FedSA-LoRA"
    trains: ClassVar = "ab"
    own_b: ClassVar = True
    stale: Stale = Stale(beta=0.0)


class FedEx(_Method):
    """FedEx-LoRA (arXiv 2410.09432): FedIT, and the weight takes up what the product of the means lacks."""

    name: Literal["fedex"]
    title: ClassVar = "FedEx-LoRA"
    trains: ClassVar = "ab"
    stale: Stale = Stale(beta=0.0)


class FLora(_Method):
    """FLoRA (arXiv 2409.05976): the products are added to the weight, and A and B begin anew in each round."""

    name: Literal["flora"]
    title: ClassVar = "FLoRA"
    trains: ClassVar = "ab"
    stale: Stale = Stale(beta=0.0)


class FlexLora(_Method):
    """FlexLoRA (arXiv 2402.11505): the mean of the products, cut to rank r."""

    name: Literal["flexlora"]
    title: ClassVar = "FlexLoRA"
    trains: ClassVar = "ab"
    stale: Stale = Stale(beta=0.0)


class Fair(_Method):
    """LoRA-FAIR (arXiv 2411.14961): FedIT, and a correction of B that brings B A near the mean of the products."""

    name: Literal["lora-fair"]
    title: ClassVar = "LoRA-FAIR"
    trains: ClassVar = "ab"
    penalty: Annotated[float, Field(gt=0)] = 0.01
    """On the squared length of the correction."""
    stale: Stale = Stale(beta=0.0)


class RoLora(_Method):
    """RoLoRA (arXiv 2502.01755): B is trained and averaged in odd rounds, A in even ones."""

    name: Literal["rolora"]
    title: ClassVar = "RoLoRA"
    trains: ClassVar = "ab"
    refactor: bool = False
    """After each round the side that the next one freezes is made orthonormal, and the other takes the singular
    values."""
    stale: Stale = Stale(beta=0.0)


class Periodic(_Method):
    """PeriodicLoRA (arXiv 2402.16141): B is averaged; now and then the weight takes up B A, and A is drawn anew."""

    name: Literal["periodic"]
    title: ClassVar = "PeriodicLoRA"
    trains: ClassVar = "b"
    restart_every: Annotated[int, Field(ge=1)]
    """Rounds between two such restarts."""
    stale: Stale = Stale(beta=0.0)


class Switch(_Method):
    """SwitchLoRA (arXiv 2406.06564): the same with the weakest rows of A alone."""

    name: Literal["switch"]
    title: ClassVar = "SwitchLoRA"
    trains: ClassVar = "b"
    restart_every: Annotated[int, Field(ge=1)]
    """Rounds between two switches."""
    rows: Annotated[int, Field(ge=1)] = 1
    """Rows of A that are drawn anew each time."""
    stale: Stale = Stale(beta=0.0)


Method = Annotated[
    FedSvd
    | Ffa
    | FedSb
    | SvFit
    | FedAvg
    | FedAsk
    | FedIt
    | FedSa
    | FedEx
    | FLora
    | FlexLora
    | Fair
    | RoLora
    | Periodic
    | Switch,
    Field(discriminator="name"),
]


def title_of(name: str) -> str:
    """The title of the method that a config calls `name`; a name that no method has, as it is."""
    sections = get_args(get_args(Method)[0])
    titles = {get_args(section.model_fields["name"].annotation)[0]: section.title for section in sections}
    return titles.get(name, name)
