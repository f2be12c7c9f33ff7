"""Every knob of a run: meaning, unit, range, default.

One frozen model a YAML section. A default stands only where any sane user agrees; privacy values have none.
Unknown keys and wrong types are errors; `load.py` gives them file, line and the nearest key.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedlora.config.combinations import conflicts
from fedlora.config.data import Data
from fedlora.config.method import Method
from fedlora.config.section import Section
from fedlora.config.server import Server, ServerSgd
from fedlora.config.task import (  # noqa: F401  # read from here, too
    CausalLm,
    Classification,
    Dpo,
    ImageClassification,
    Task,
)
from fedlora.config.world import World

Probability = Annotated[float, Field(gt=0, le=1)]


class Model(Section):
    """The frozen base model."""

    name: str
    """A Hugging Face id or a local directory."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the frozen weights. Per-example gradients and their norms are float32 or wider anyway. It only rounds, so
    server and nodes may differ in it."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of the frozen linear layers inside the encoder or decoder, rounded after loading: nf4, 4.5 bits a number
    (QLoRA's, without double quantisation); int8, 8 bits and one scale a row. Weights only: products are in `dtype`, B
    and the head stay float32. nf4 moves MiniLM's gradients by a quarter, int8 by 3 %. Server and nodes must agree on
    it; an exported adapter belongs to the base model as it was."""
    kernels: Literal["auto", "torch", "onednn", "triton"] = "auto"
    """What multiplies. torch: plain torch, on any device. onednn: frozen float32 weights in packed copies (two more a
    weight; none of quantised ones), on x86 cores only, about twice as fast where MKL knows the core badly, as AMD's.
    triton: gradients, norms and clipped sums by kernels of our own, on a GPU only. auto: whichever of them is there for
    the device. Final states are comparable bit for bit at equal kernels only."""
    gradient_checkpointing: bool = False
    """Keeps no activations inside a layer, but computes them again in the backward pass: less memory, a third more
    time, the same gradients to rounding."""


class Lora(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(ge=1)]
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)]
    """The adapted layer computes W x + (lora_alpha / r) B A x, whatever its rank in `rank_pattern`."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers to adapt, matched at the end of the module path; or all-linear: every one but the
    head."""
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Other ranks than `r`, by the end of a layer's path: `query: 8`, `layer.5.attention.self.value: 2`. As PEFT's: a
    regular expression, and the first that matches counts. Every layer keeps the factor lora_alpha / r, so an export
    writes the `alpha_pattern` that gives it to PEFT. null: `r` everywhere."""
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Only these; null: all. Fewer trained numbers carry less noise, layers below are not back-propagated."""
    init: Literal["orthonormal", "centred", "kaiming", "principal", "activations", "gradients"] = (
        "orthonormal"
    )
    """The first A, always from what is public. orthonormal: random orthonormal rows; centred: the same, but orthogonal
    to the site's mean input over public text, a large component that carries nothing and dominates gradients; kaiming:
    uniform as PEFT draws it; principal: the frozen weight's first right singular vectors, PiSSA's subspace at unit
    scale; activations: the directions in which inputs vary most over public text, as EVA; gradients: the first right
    singular vectors of each weight's gradient on the labelled records of `data.public`, LoRA-SB's start."""
    trains: Literal["b", "core", "singular-values", "ab"] = "b"
    """What of an adapter is trained and sent: B, d_out x r numbers a site; or an r x r core between A and a frozen
    orthonormal left frame, B = left core (LoRA-XS, Fed-SB), which carries less noise and affords a larger r; or the
    diagonal of such a core, r numbers a site (SVFit), for which training holds r x r numbers a token and site; or ab: A
    as well as B, together or in turn, as the method says, d_in x r numbers more."""
    from_adapter: str | None = None
    """A directory with a LoRA that PEFT or fedlora saved for this base model, to begin from: its product is kept
    exactly, its A made orthonormal, lower ranks are filled up with directions of `init`; a head that it carries is
    taken. It is treated as public. Server and nodes must have the same files. null: begin with B = 0."""


class IndependentCohort(Section):
    """Each client is asked independently with its probability."""

    probability: Probability | dict[str, Probability]
    """One number for all, or one for each client by name."""


Decay = Literal["none", "linear"]


class Sgd(Section):
    """Plain SGD: the noise is isotropic, so a change of basis changes nothing."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    """Learning rate of a step. Clipped gradients are short, so it is far above the rates of plain training."""
    decay: Decay = "none"
    """linear: the rate falls evenly from `lr` in the first round to `lr / rounds` in the last."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx (arXiv 1812.06127): each step also goes lr * proximal of the way back to where the round began, after the
    noise, so it costs no epsilon. lr * proximal is 1 at most; with one step a round it does nothing. 0: off."""
    precondition: Literal["none", "lora-pro", "allora"] = "none"
    """What a step makes of B's noised gradient, which costs no epsilon; the head's stays. lora-pro (arXiv 2407.18242,
    of B alone): times (A A^T)^-1 / (lora_alpha / r)^2, so that the product moves by the full gradient projected on the
    rows of A; with orthonormal A and lora_alpha = r nothing changes. allora (arXiv 2410.09692): rows that have moved
    little move faster, as without a factor lora_alpha / r in the layer: that ratio is its eta; for trains: b. A server
    cannot tell the length of noise under either, and takes updates of any."""


class AdamW(Section):
    """AdamW, new in each round. Depends on the basis; FedSVD is then no longer FFA-LoRA in other
    coordinates."""

    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    """Learning rate of a step."""
    decay: Decay = "none"
    """As for sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of what is trained that a step takes off, times the rate; decoupled, after the noise."""


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]


class Federation(Section):
    """Who works in a round, how much, and how much each counts."""

    rounds: Annotated[int, Field(ge=1)]
    """Of the whole run."""
    cohort: Annotated[int, Field(ge=1)] | IndependentCohort
    """Clients asked in a round: a number drawn uniformly without replacement, or {probability: p}."""
    reshuffle: bool = False
    """Of a cohort that is a number: everybody is asked once before anybody is asked twice, in an order drawn anew each
    lap (arXiv 2302.03662). With a fixed roster nobody then works in more than ceil(rounds / floor(clients / cohort))
    rounds, so `max_participations` can be that low, and the noise with it; where shares are skewed, rounds differ less,
    too. What is left when the cohort does not divide the clients sits the lap out."""
    local_steps: Annotated[int, Field(ge=1)]
    """DP-SGD steps of a client in a round. A constant: never derived from its data."""
    batch_size: Annotated[int, Field(ge=1)]
    """Expected size of a Poisson draw; the rate is batch_size / declared records, the divisor is
    batch_size."""
    optimizer: Optimizer
    """The clients'."""
    server: Server = ServerSgd(name="sgd")
    """The server's: what it makes of a round's mixed update. Post-processing, so it costs no epsilon."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Share of a client in the whole. `examples` makes record counts matter; they are declared public
    either way."""
    participation: Literal["normalised", "importance"] = "normalised"
    """How shares are corrected for who took part: divided by the participants' total (FedSVD) or by the
    probability of being asked (FedStale)."""
    min_clients: Annotated[int, Field(ge=1)] = 1
    """Fewer answers in a round stop the run, which can be resumed."""
    enough: Annotated[int, Field(ge=1)] | None = None
    """A server's round ends once so many updates are in, and later ones count in a later round; null: with the last,
    or at the deadline. The fast are heard more often then, which no weighting corrects. A simulation needs a `world`
    for it, else it waits for all."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds a round waits for Flower nodes; later replies count in a later round. A simulation on `local` or `ray`
    waits for everybody, so that its result does not depend on the machine's speed, or counts the virtual seconds of
    its `world`."""
    keep_gauges: Annotated[int, Field(ge=1)] = 20
    """How many bases back a late reply may reach."""
    ranks: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """By client: how many columns of every B it trains, clips, noises and changes, the first ones; who is not named
    trains all `lora.r` (DyLoRA, arXiv 2210.07558). A column moves by the mean of those who trained it, and one that
    nobody trained stays. Public; a deployed node says its own in `rank`. For methods that train B and keep A within its
    row space. An update of fewer columns that comes after a refactorisation cannot count. null: all train all."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two scores on the public test data; the first and the last state are always scored."""


class PrivateRuns(Section):
    """Settings were chosen by comparing runs on the same private records, which costs what all of them spent."""

    private_runs: Annotated[int, Field(ge=2)]
    """How many runs like this one, this one included."""


class Privacy(Section):
    """The budget of every client. No value here has a default but the tools that account for it."""

    target_epsilon: Annotated[float, Field(gt=0)]
    """Of one record of one client, zero-out adjacency, over all that the client ever releases."""
    target_delta: Annotated[float, Field(gt=0, lt=1)]
    """Must be below 1 / records of the largest client."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """L2 bound on one example's gradient, jointly over everything trained."""
    max_participations: Annotated[int, Field(ge=1)]
    """Rounds of work that the noise is calibrated for; the ledger refuses the next one."""
    accountant: Literal["pld", "prv", "rdp"] = "pld"
    """What calibrates and reports. The CLT (GDP) accountant understates epsilon and is not offered."""
    evaluation_noise: Annotated[float, Field(gt=0)] | None = None
    """Each client tells in each round how many of its own records the model gets right, with noise of this standard
    deviation, in records; its budget pays. null: nothing is told."""
    tuned_on: Literal["undeclared", "nothing", "public-data"] | PrivateRuns = "undeclared"
    """What learning rate, rounds, rank and the like were chosen by: nothing (fixed in advance), public-data, or
    {private_runs: K}, whose cost the privacy statement then tells. It changes nothing but that statement."""
    engine: Literal["direct", "opacus"] = "direct"
    """Who computes per-example gradients: the low-rank engine, or Opacus, its oracle."""


class Runtime(Section):
    """Where clients run. The same seed ends in the same state in each."""

    kind: Literal["local", "ray", "flower"]
    address: str | None = None
    """An existing Ray cluster: `auto` (the one this machine is part of), HOST:PORT of its head, or ray://HOST:PORT, a
    Ray client's; null starts one on this machine. Several machines need `output` on a file system they share."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Worker processes; auto: on each machine one for every `threads` cores."""
    threads: Annotated[int, Field(ge=1)] = 1
    """BLAS threads of a worker. Final states are comparable bit for bit at equal thread counts."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where clients train; the server scores on cores. cuda: as many workers share a card as a measurement says that
    its memory carries, and no more than there are cores for. Final states are comparable at equal devices only."""
    cache_prefix: Literal["auto"] | bool = "auto"
    """true: each client's records pass through the layers below the lowest adapted one (`lora.layers_to_transform`)
    once, and what they leave is kept on disk beside the run: tokens x hidden size x 4 bytes, 0.9 GB for 600,000 tokens
    of MiniLM. A client pays for all its records when it first works, so it is worth while where a record is drawn more
    than twice in a run: rounds it works in x local_steps x batch_size / its records. auto: not in a run by itself; the
    runs of a comparison share such files while it lasts, if all together draw each record twice. The same training, but
    final states are comparable bit for bit at equal values only. Changes nothing where no layers lie below."""
    clients_together: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Clients that share one forward pass of the frozen base: 1 is off; auto: as many as fill a micro-batch, by batch
    size, max_length and a token budget. Updates then agree with those of clients one by one to the rounding of a float,
    not bit for bit. Clients that cannot share one are trained one by one."""


class RunConfig(Section):
    """One run, whole."""

    seed: Annotated[int, Field(ge=0)]
    """Of partition, cohorts, first A and, in simulation only, draws and noise. These two follow from the rest of
    the config as well: the same file by another path brings others."""
    model: Model
    task: Task
    lora: Lora
    data: Data
    federation: Federation
    method: Method
    privacy: Privacy | Literal["none"]
    """The budget, or `none`, spelled out: every output then says NOT PRIVATE."""
    runtime: Runtime
    world: World | None = None
    """When simulated clients are there and how long they take; null: always, and no time at all."""
    tracking: Annotated[list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]], Field(min_length=1)] = (
        Field(default=["jsonl"])
    )
    """Who is told of rounds. jsonl: rounds.jsonl in the run directory, which is always written. The others are extras
    of the same name and are told the federation's figures, no client's: docs/tracking.md. No result depends on it."""
    export_every: Annotated[int, Field(ge=1)] | None = None
    """Rounds between two adapters written on the way, to adapters/round-000010 and so on in the directory of the run,
    each with a card that tells the epsilon spent by then; null: only the last, to adapter."""
    output: str
    """Directory of the run."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if wrong := conflicts(self):
            raise ValueError("\n".join(wrong))
        return self
