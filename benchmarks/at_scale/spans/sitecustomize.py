"""Python reads this at its start: the client step of this process tells when it begins and ends.

What trains one client, or several together, is wrapped as soon as its module is imported, so nothing of fedlora knows
of it. With AT_SCALE_NULL the client answers with zeros at once, and what is left of a round is its overhead.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

WRAPPED = {"fedlora.training.client": "train", "fedlora.training.together": "train_together"}


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
            name = WRAPPED[fullname]
            setattr(module, name, _timed(getattr(module, name), together=name == "train_together"))

        spec.loader.exec_module = exec_module
        return spec


def _timed(work, *, together):
    def timed(nodes, request, *rest, **named):
        began = time.monotonic()
        try:
            if not os.environ.get("AT_SCALE_NULL"):
                return work(nodes, request, *rest, **named)
            return [_zeros(node, request) for node in nodes] if together else _zeros(nodes, request)
        finally:
            with (Path(os.environ["AT_SCALE_SPANS"]) / str(os.getpid())).open("a") as file:
                file.write(f"{began!r} {time.monotonic()!r}\n")

    return timed


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
