"""Python reads this at its start: each host of simulated clients tells when it begins and ends to answer for some.

`Host.answer` is wrapped as soon as its module is imported, so nothing of fedlora knows of it. With AT_SCALE_NULL the
client's training answers with zeros at once instead, and the whole of a round is its overhead.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


def _tell_spans(module):
    answer = module.Host.answer

    def timed(*arguments, **named):
        began = time.monotonic()
        try:
            return answer(*arguments, **named)
        finally:
            with (Path(os.environ["AT_SCALE_SPANS"]) / str(os.getpid())).open("a") as file:
                file.write(f"{began!r} {time.monotonic()!r}\n")

    module.Host.answer = timed


def _train_nothing(module):
    module.train = lambda node, request, ledger: _zeros(node, request)


def _train_nothing_together(module):
    module.train_together = lambda nodes, request, ledgers: [_zeros(node, request) for node in nodes]


TOLD = {"fedlora.runtime.host": _tell_spans}
NULL = {"fedlora.training.client": _train_nothing, "fedlora.training.together": _train_nothing_together}
WRAPPED = NULL if os.environ.get("AT_SCALE_NULL") else TOLD


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            WRAPPED[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


def _zeros(node, request):
    import torch

    from fedlora.values import ClientUpdate, Delta

    adapters = request.adapters
    delta = Delta(
        basis=adapters.basis,
        sites={site: torch.zeros_like(factors.b) for site, factors in adapters.sites.items()},
        head={name: torch.zeros_like(value) for name, value in adapters.head.items()},
    )
    return ClientUpdate(client=node.client, run=request.run, round=request.round, delta=delta, spent=())


if os.environ.get("AT_SCALE_SPANS"):
    sys.meta_path.insert(0, _Finder())
