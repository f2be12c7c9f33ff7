"""A node that runs out of memory has paid for the attempt, says no word of why, and answers the next one."""

from collections.abc import Callable

import pytest
import torch

from fedlora.training import client as client_module
from fedlora.values import ClientUpdate, Refusal, RefusalReason


def out_of(error: BaseException) -> Callable[[], None]:
    """The first step of training ends so."""

    def prepare() -> None:
        def fails(*arguments: object) -> None:
            raise error

        client_module.descend = fails

    return prepare


@pytest.mark.fault("F45")
@pytest.mark.parametrize(
    "error", [MemoryError("record 4711"), torch.OutOfMemoryError("CUDA out of memory: record 4711")]
)
def test_a_node_out_of_memory_says_failed_has_paid_and_pays_again(new_site, error):
    site = new_site()
    failed = site.ask(1, prepare=out_of(error))
    assert isinstance(failed.reply, Refusal) and failed.reply.reason is RefusalReason.FAILED
    assert b"4711" not in failed.received
    assert len(site.contents().debits) == 1 and not site.contents().releases
    answered = site.ask(1)
    assert isinstance(answered.reply, ClientUpdate)
    assert len(site.contents().debits) == 2
    assert site.violations() == []
