"""What a client of the peer computes: our own step on a kept model, or Opacus' on one loaded anew."""

from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from at_scale.ghost import ghost_round
from fedlora.config.load import load_config
from fedlora.data import load_corpus
from fedlora.data.partition import partition
from fedlora.data.records import Examples
from fedlora.data.tokenise import fingerprint, tokenise
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import Ledger, open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.sampling import poisson, poisson_draw
from fedlora.privacy.step import private_gradient
from fedlora.seeds import seed_for
from fedlora.training.client import Node, calibrated, train
from fedlora.training.load import load_model
from fedlora.training.model import AdaptedModel
from fedlora.training.tasks import losses
from fedlora.training.tokens import load_tokenizer
from fedlora.values import Adapters, ClientUpdate, Factors, LocalWork, Mechanism, Sampling, TrainRequest

Flat = NDArray[np.float32]
"""Every trained number: B of each site in sorted order, then the head's tensors by name."""


class Clients:
    """Every client of a case, played by this process one after the other."""

    def __init__(self, material: str, scratch: str) -> None:
        torch.set_num_threads(1)
        self.config = load_config(Path(material) / "config.yaml")
        self.scratch = Path(scratch)
        corpus = load_corpus(self.config.data, self.config.task, self.config.seed)
        self.classes = corpus.classes
        self.parts = sorted(partition(corpus.train, self.config.data.partition, self.config.seed).items())
        tokenizer = load_tokenizer(self.config.model.name)
        self.all = tokenise(corpus.train, tokenizer, self.config.data.max_length)
        self.noise = SeededNoise(seed_for(self.config.seed, "client randomness"))

    @cached_property
    def model(self) -> AdaptedModel:
        """The one model of this process."""
        config = self.config
        return load_model(config.model, config.task, config.lora, self.classes, config.seed)

    def records(self, number: int) -> int:
        """How many a client holds."""
        return len(self.parts[number][1])

    def train(self, number: int, round_: int, start: Flat) -> Flat:
        """What our own node does with a request, its ledger with it."""
        node = self._node(number)
        work = LocalWork(
            steps=self.config.federation.local_steps, learning_rate=self.config.federation.optimizer.lr
        )
        request = TrainRequest(
            run="peer", base_model="", code="", round=round_, adapters=self._adapters(start), work=work
        )
        reply = train(node, request, self._ledger(node))
        assert isinstance(reply, ClientUpdate), reply
        moved = [reply.delta.sites[site] for site in sorted(reply.delta.sites)]
        moved += [reply.delta.head[name] for name in sorted(reply.delta.head)]
        return start + _flat(moved)

    def step(self, number: int, round_: int, start: Flat) -> Flat:
        """The private steps alone: no ledger, no digest of the request."""
        node, config = self._node(number), self.config.federation
        self.model.load(self._adapters(start))
        optimizer = torch.optim.SGD(self.model.trained.values(), lr=config.optimizer.lr)
        for step in range(config.local_steps):
            purpose = ("peer", node.client, round_, step)
            drawn = poisson_draw(len(node.examples), node.sampling, self.noise, ("draw", *purpose))
            gradient = private_gradient(
                node.engine, self.model.peft_model, self.model.trained,
                losses(self.model, node.examples, drawn.numpy()), mechanism=node.mechanism,
                expected_batch=node.sampling.expected_batch, noise=self.noise, purpose=("noise", *purpose),
            )  # fmt: skip
            for name, parameter in self.model.trained.items():
                parameter.grad = gradient[name].to(parameter.dtype)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return _flat(self._ordered())

    def ghost(self, number: int, start: Flat, *, trimmed: bool = False) -> Flat:
        """See `at_scale.ghost`."""
        mechanism = self._terms(self.records(number))[1]
        assert mechanism is not None
        examples = self._examples(number)
        return ghost_round(self.config, self.classes, examples, start, mechanism, trimmed=trimmed)

    def _node(self, number: int) -> Node:
        examples = self._examples(number)
        sampling, mechanism = self._terms(len(examples))
        privacy = self.config.privacy
        return Node(
            client=self.parts[number][0], model=self.model, examples=examples, declared_records=len(examples),
            sampling=sampling, optimizer=self.config.federation.optimizer, mechanism=mechanism, alone=False,
            evaluation_noise=None, budget=None if privacy == "none" else Budget.of(privacy),
            engine=DirectEngine(), noise=self.noise,
        )  # fmt: skip

    def _examples(self, number: int) -> Examples:
        return self.all.select(self.parts[number][1])

    @lru_cache  # noqa: B019  (one object a process)
    def _terms(self, records: int) -> tuple[Sampling, Mechanism | None]:
        federation, privacy = self.config.federation, self.config.privacy
        sampling = poisson(federation.batch_size, records)
        if privacy == "none":
            return sampling, None
        sigma = calibrated(
            Budget.of(privacy),
            sampling,
            records=records,
            local_steps=federation.local_steps,
            evaluation_noise=None,
        )
        return sampling, Mechanism(max_grad_norm=privacy.max_grad_norm, noise_multiplier=sigma)

    def _ledger(self, node: Node) -> Ledger | None:
        if node.mechanism is None:
            return None
        path = self.scratch / "ledgers" / f"{node.client}.jsonl"
        path.parent.mkdir(exist_ok=True)
        return open_ledger(
            path,
            client=node.client,
            dataset_fingerprint=fingerprint(node.examples),
            noise_kind=self.noise.kind,
        )

    def _ordered(self) -> list[Tensor]:
        """What is trained, in the order of `Flat`."""
        head = self.model.head()
        return [b for _, (_, b) in sorted(self.model.live.items())] + [head[name] for name in sorted(head)]

    def _adapters(self, flat: Flat) -> Adapters:
        shaped = _shaped(flat, self._ordered())
        factors = sorted(self.model.live.items())
        sites = {site: Factors(a=a.detach(), b=b) for (site, (a, _)), b in zip(factors, shaped, strict=False)}
        head = dict(zip(sorted(self.model.head()), shaped[len(factors) :], strict=True))
        return Adapters(basis=0, scale=self.model.scale, sites=sites, head=head)


def _flat(tensors: list[Tensor]) -> Flat:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def _shaped(flat: Flat, like: list[Tensor]) -> list[Tensor]:
    pieces = torch.from_numpy(flat.copy()).split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]
