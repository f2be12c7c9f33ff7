"""A ledger with something in it, for tests of what is spent and of what becomes of the file."""

from dataclasses import replace

from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.values import DpEvent

EVENT = DpEvent(noise_multiplier=1.1, sample_rate=0.02, steps=10, expected_batch=20.0, max_draw=123)
TOLD = DpEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=50, accountant="pld")


def opened(path, client="client-3", fingerprint="f" * 64, noise="seeded", mark=None):
    return open_ledger(path, client=client, dataset_fingerprint=fingerprint, noise_kind=noise, mark=mark)


def debit(ledger, round, *events, run="r", digest="d", bound=1.0, budget=BUDGET):
    return ledger.debit(run, round, digest, events or (EVENT,), max_grad_norm=bound, budget=budget)


def seen(ledger):
    """How far a witness saw the ledger come."""
    return ledger.witness(ledger.debits[-1])


def spending(path):
    """A ledger of four debits of two mechanisms, the first of them released."""
    ledger = opened(path)
    ledger.release(debit(ledger, 1), "a" * 64)
    for round in (2, 5):
        debit(ledger, round)
    debit(ledger, 6, replace(EVENT, noise_multiplier=0.1 + 0.7, steps=1), TOLD)
    return ledger
