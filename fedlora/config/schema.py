"""Every knob of a run: meaning, unit, range, default.

One frozen model a YAML section. A default stands only where any sane user agrees; privacy values have none.
Unknown keys and wrong types are errors; `load.py` gives them file, line and the nearest key.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedlora.config.combinations import conflicts
from fedlora.config.section import Section
from fedlora.config.server import Server, ServerSgd
from fedlora.config.world import World

Probability = Annotated[float, Field(gt=0, le=1)]


class Model(Section):
    """The frozen base model."""

    name: str
    """A Hugging Face id or a local directory."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the frozen weights. Per-example gradients and their norms are float32 or wider anyway."""
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


class Classification(Section):
    """One label for one text or one pair of texts."""

    kind: Literal["sequence-classification"]
    head: Literal["trained", "frozen"] = "trained"
    """trained: the classifier starts at zero and is clipped, noised and sent with B; frozen: random, as in
    FedSVD's paper."""
    pooler: Literal["checkpoint", "identity"] = "checkpoint"
    """What stands between a BERT-like encoder and its head: the checkpoint's own pooler, or tanh of the
    centred first token. sentence-transformers checkpoints carry an untrained pooler: take identity there."""


class CausalLm(Section):
    """Next-token prediction; the loss is the mean over the tokens of one record, so records stay apart."""

    kind: Literal["causal-lm"]


Task = Annotated[Classification | CausalLm, Field(discriminator="kind")]


class Lora(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(ge=1)]
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)]
    """The adapted layer computes W x + (lora_alpha / r) B A x."""
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers to adapt, matched at the end of the module path."""
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Only these; null: all. Fewer trained numbers carry less noise, layers below are not back-propagated."""
    init: Literal["orthonormal", "centred", "kaiming", "principal", "activations"] = "orthonormal"
    """The first A, always from what is public. orthonormal: random orthonormal rows; centred: the same, but orthogonal
    to the site's mean input over public text, a large component that carries nothing and dominates gradients; kaiming:
    uniform as PEFT draws it; principal: the frozen weight's first right singular vectors, PiSSA's subspace at unit
    scale; activations: the directions in which inputs vary most over public text, as EVA."""
    trains: Literal["b", "core"] = "b"
    """What of an adapter is trained and sent: B, d_out x r numbers a site; or an r x r core between A and a frozen
    orthonormal left frame, B = left core (LoRA-XS, Fed-SB), which carries less noise and affords a larger r."""


class Iid(Section):
    """Records dealt out at random, sizes equal within one."""

    kind: Literal["iid"]
    clients: Annotated[int, Field(ge=1)]


class Dirichlet(Section):
    """Each label's records shared out by a draw from Dirichlet(alpha) over the clients."""

    kind: Literal["dirichlet"]
    clients: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    """Small: each client holds few labels. Large: approaches iid."""
    min_examples: Annotated[int, Field(ge=1)] = 1
    """The draw is repeated until every client holds at least so many."""


class Pathological(Section):
    """Each client holds only a few labels (McMahan et al. 2017)."""

    kind: Literal["pathological"]
    clients: Annotated[int, Field(ge=1)]
    classes_per_client: Annotated[int, Field(ge=1)]


class Column(Section):
    """One client for each value of a column: the natural federation."""

    kind: Literal["column"]
    column: str


Partition = Annotated[Iid | Dirichlet | Pathological | Column, Field(discriminator="kind")]


class _Data(Section):
    max_length: Annotated[int, Field(ge=2)]
    """Tokens kept of each record."""
    max_test_examples: Annotated[int, Field(ge=1)] | None = None
    """Score on the first so many test records of a seeded shuffle; null: all."""
    partition: Partition


class Files(_Data):
    """Local tsv, csv, jsonl or parquet files, also gzipped."""

    source: Literal["files"]
    train: str
    """Path, relative to the working directory."""
    test: str
    """Public test data: scored at the server."""
    text: str | Annotated[list[str], Field(min_length=2, max_length=2)]
    """The text column, or a list of two for pairs."""
    label: str | None = None
    """The label column; null for causal-lm."""


class HuggingFace(_Data):
    """A data set of the hub, or its cached copy; needs the extra `fedlora[huggingface]`."""

    source: Literal["huggingface"]
    path: str
    name: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    text: str | Annotated[list[str], Field(min_length=2, max_length=2)]
    label: str | None = None


class Docstrings(_Data):
    """Built in and offline: docstrings of the Python packages installed here; the label is the package
    that wrote it."""

    source: Literal["docstrings"]
    packages: Annotated[list[str], Field(min_length=2)] | None = None
    """Top-level packages to tell apart (`stdlib` is the standard library); null: a fixed set that fedlora
    itself installs."""
    max_per_class: Annotated[int, Field(ge=10)] = 4000
    """At most so many records a label, so that no package drowns the others."""


Data = Annotated[Files | HuggingFace | Docstrings, Field(discriminator="source")]


class IndependentCohort(Section):
    """Each client is asked independently with its probability."""

    probability: Probability | dict[str, Probability]
    """One number for all, or one for each client by name."""


Decay = Literal["none", "linear"]


class Sgd(Section):
    """Plain SGD: the noise is isotropic, so a change of basis changes nothing."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    decay: Decay = "none"
    """linear: the rate falls evenly from `lr` in the first round to `lr / rounds` in the last."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx (arXiv 1812.06127): each step also goes lr * proximal of the way back to where the round began, after the
    noise, so it costs no epsilon. lr * proximal is 1 at most; with one step a round it does nothing. 0: off."""


class AdamW(Section):
    """AdamW, new in each round. Depends on the basis; FedSVD is then no longer FFA-LoRA in other
    coordinates."""

    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    decay: Decay = "none"
    """As for sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]


class Federation(Section):
    """Who works in a round, how much, and how much each counts."""

    rounds: Annotated[int, Field(ge=1)]
    cohort: Annotated[int, Field(ge=1)] | IndependentCohort
    """Clients asked in a round: a number drawn uniformly without replacement, or {probability: p}."""
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
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two scores on the public test data; the first and the last state are always scored."""


class Stale(Section):
    """FedStale: remembered updates of absent clients. Costs no epsilon; repeats their noise."""

    beta: Annotated[float, Field(ge=0, le=1)] | Literal["adaptive", "adaptive-by-client"]
    """0 is FedAvg, 1 is FedVARP. Under strong noise small values are best: beta* = SNR / (1 + SNR). adaptive: 0 until
    clients are heard again, then how much of what was remembered came back, of released values of earlier rounds only:
    sum <fresh, remembered> / sum |remembered|^2, whose denominator holds the noise. adaptive-by-client: the same for
    each client, by its own updates once there are two; needs participation importance and a cohort {probability}."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of an adaptive beta: what is left of either sum when a round is added. 0: the last round alone says; 0.9: about
    the last ten do."""
    memory: Literal["disk"] = "disk"
    """Where they are kept: in memory.sqlite of the run, so that the server's memory does not grow with the
    federation."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How they are kept, a client: float32, 4 bytes a trained number, exact (8 in a float64 run); bfloat16, 2; int8, 1,
    with a power-of-two unit a tensor. The sum over absent clients is always of exactly what is kept."""


class FedSvd(Section):
    """FedSVD (arXiv 2505.12805): average B, then refactorise so that A has orthonormal rows."""

    name: Literal["fedsvd"]
    refactor_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two refactorisations."""
    soft_threshold: Annotated[float, Field(ge=0)] = 0.0
    """What each refactorisation takes off every singular value of B A (SoRA, arXiv 2311.11696): directions that hold
    less are dropped, and with them mostly noise. It comes after the noise and costs no privacy. 0: nothing."""
    stale: Stale = Stale(beta=0.0)


class Ffa(Section):
    """FFA-LoRA (arXiv 2403.12313): A stays as `lora.init` drew it, B is averaged."""

    name: Literal["ffa"]
    stale: Stale = Stale(beta=0.0)


class FedSb(Section):
    """Fed-SB (arXiv 2502.15436): an r x r core between A and a left frame, both frozen, is averaged."""

    name: Literal["fedsb"]
    left: Literal["orthonormal", "principal"] = "principal"
    """The left frame: random orthonormal columns, or the frozen weight's first left singular vectors."""
    stale: Stale = Stale(beta=0.0)


class FedAvg(Section):
    """Plain federated LoRA: A stays as PEFT draws it (Kaiming), B is averaged, nothing is refactorised."""

    name: Literal["fedavg"]
    stale: Stale = Stale(beta=0.0)


Method = Annotated[FedSvd | Ffa | FedSb | FedAvg, Field(discriminator="name")]


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
    cache_prefix: bool = False
    """Each client's records pass through the layers below the lowest adapted one (`lora.layers_to_transform`) once,
    and what they leave is kept on disk beside the run: tokens x hidden size x 4 bytes, 0.9 GB for 600,000 tokens of
    MiniLM. A client pays for all its records when it first works, so it is worth while where a record is drawn more
    than twice in a run: rounds it works in x local_steps x batch_size / its records. The same training, but final
    states are comparable bit for bit at equal values only. Changes nothing where no layers lie below."""
    clients_together: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Clients that share one forward pass of the frozen base: 1 is off; auto: as many as fill a micro-batch, by batch
    size, max_length and a token budget. Updates then agree with those of clients one by one to the rounding of a float,
    not bit for bit. Clients that cannot share one are trained one by one."""


class RunConfig(Section):
    """One run, whole."""

    seed: Annotated[int, Field(ge=0)]
    """Of partition, cohorts, first A and, in simulation only, draws and noise."""
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
    tracking: Annotated[list[Literal["jsonl"]], Field(min_length=1)] = Field(default=["jsonl"])
    """Where round lines go: rounds.jsonl in the run directory."""
    output: str
    """Directory of the run."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if wrong := conflicts(self):
            raise ValueError("\n".join(wrong))
        return self
