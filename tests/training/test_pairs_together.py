"""Clients whose records are two sequences share no forward pass: asked to, they refuse before anybody has paid."""

import numpy as np
import pytest
import torch

from fedlora.config.method import Ffa
from fedlora.config.schema import Dpo, Lora, Model, Sgd
from fedlora.data.records import Examples
from fedlora.errors import PrivacyError
from fedlora.federation.absorb import start
from fedlora.methods import build
from fedlora.privacy.budget import Budget
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.sampling import poisson
from fedlora.privacy.stacked import stackable, stacked
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.tasks import losses
from fedlora.training.together import train_together
from fedlora.values import ClientUpdate, LocalWork, Mechanism, TrainRequest

LORA = Lora(r=2, lora_alpha=2.0, target_modules=["q_proj"])


def pairs_of(count=8):
    draw = np.random.Generator(np.random.Philox(2))
    return Examples(
        input_ids=draw.integers(5, 60, size=8 * count).astype(np.int32),
        offsets=np.arange(count + 1, dtype=np.int64) * 8,
        trained=np.tile(np.arange(4) >= 2, 2 * count),
        firsts=np.full(count, 4, dtype=np.int64),
    )


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(Model(name=tiny["llama"]), Dpo(kind="dpo"), LORA, (), 0)


def nodes(model):
    return [
        Node(
            client=client, model=model, examples=pairs_of(), declared_records=8, sampling=poisson(4, 8),
            optimizer=Sgd(name="sgd", lr=1.0), mechanism=Mechanism(max_grad_norm=1.0, noise_multiplier=1.0),
            alone=False, evaluation_noise=None,
            budget=Budget(target_epsilon=50.0, target_delta=1e-3, max_participations=2, accountant="rdp"),
            engine=DirectEngine(), noise=SeededNoise(1),
        )
        for client in ("a", "b")
    ]  # fmt: skip


def request(model):
    state = start(
        model.shapes(), head=model.head(), lora_cfg=LORA, method=build(Ffa(name="ffa"), LORA, 3),
        dtype=torch.float32,
    )  # fmt: skip
    work = LocalWork(steps=1, learning_rate=1.0)
    return TrainRequest(run="r", base_model="m", code="c", round=1, adapters=state.adapters, work=work)


def ledgers(folder):
    return [
        open_ledger(folder / client, client=client, dataset_fingerprint="f", noise_kind="seeded")
        for client in ("a", "b")
    ]


def test_pairs_are_trained_one_by_one(model, tmp_path):
    held = ledgers(tmp_path)
    with pytest.raises(PrivacyError, match="records of two sequences; train them one by one"):
        train_together(nodes(model), request(model), held)
    assert not any(ledger.debits for ledger in held)
    for node, ledger in zip(nodes(model), held, strict=True):
        assert isinstance(train(node, request(model), ledger), ClientUpdate)


def test_rows_whose_owner_is_counted_by_record_run_through_nobody_s_weights(model):
    """Behind that refusal stands another: a stack knows the owners of records, and sees twice as many rows."""
    layers = stackable(model.peft_model, model.trained)
    runs = losses(model, pairs_of(), np.arange(4))
    owners = torch.zeros(4, dtype=torch.int64)
    with (
        stacked(model.peft_model, model.trained, layers, 2) as stack,
        pytest.raises(PrivacyError, match="8 examples"),
    ):
        DirectEngine().clipped_sums(stack, [(owners, run) for run in runs], 1.0)
