"""What no file may contain: an accountant that understates, or randomness that anybody could repeat."""

import ast
from pathlib import Path

import pytest

import fedlora

ROOT = Path(fedlora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
GUARDED = (
    *("privacy", "training", "data", "kernels"),
    *("runtime", "runs", "deploy", "provision", "transport", "monitor", "doctor"),
)
"""Rooms whose code runs beside records. The others plan and summarise; their randomness is public."""

ALLOWED = {
    ("training/load.py", "torch.manual_seed"): "the head of a model: public, inside fork_rng",
    ("training/load.py", "torch.Generator"): "the head of a model: public, seeded by name",
    ("training/load.py", "torch.randn"): "the head of a model: public, from that generator",
    ("training/prefix.py", "torch.Generator"): "weights for a probe, seeded by a constant",
    ("training/prefix.py", "torch.randn"): "weights for a probe, from that generator, and put back after it",
    ("training/public.py", "torch.Generator"): "random words as public text, seeded by a constant",
    ("training/public.py", "torch.randint"): "random words as public text, from that generator",
    (
        "training/pixels.py",
        "torch.Generator",
    ): "made-up images as public ones and for probes, seeded by a constant",
    ("training/pixels.py", "torch.rand"): "made-up images as public ones, from that generator",
    ("training/pixels.py", "torch.randint"): "made-up images for probes, from that generator",
    ("data/docstrings.py", "numpy.random"): "which public docstrings a corpus holds",
    ("data/partition.py", "numpy.random"): "which simulated client a record goes to",
    ("data/__init__.py", "numpy.random"): "which test examples are scored",
    ("privacy/noise.py", "os.urandom"): "the entropy of deployed noise and draws",
    ("doctor/machine.py", "os.urandom"): "asks whether the system gives any",
    ("privacy/ledger.py", "os.urandom"): "the key under which a ledger knows its records",
}
DRAWING = {
    "Generator", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "poisson", "manual_seed", "seed", "initial_seed", "default_generator",
}  # fmt: skip
IN_PLACE = {
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "cauchy_",
    "log_normal_",
    "geometric_",
}
CLT = {
    "GaussianAccountant",
    "gdp",
    "create_accountant",
    "get_noise_multiplier",
    "compute_eps_poisson",
    "compute_mu_poisson",
}
PLACES = {"random"}
"""Not `secrets`: whatever it gives is the operating system's, and nobody can repeat it."""


def _names(tree):
    """Local name -> dotted origin, of every import."""
    origins = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                origins[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return origins


def _dotted(node, origins):
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, origins)
        return inner and f"{inner}.{node.attr}"
    return origins.get(node.id) if isinstance(node, ast.Name) else None


def _annotations(tree):
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                yield from map(id, ast.walk(part))


def randomness(text):
    """Every generator, seed or draw that this source names, as dotted names; annotations do not count."""
    tree = ast.parse(text)
    origins, skipped, found = _names(tree), set(_annotations(tree)), set()
    mentioned = {
        name for name in origins.values() if name.split(".")[0] in PLACES or name.startswith("numpy.random")
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Attribute) and node.attr in IN_PLACE:
            found.add(f"Tensor.{node.attr}")
        name = _dotted(node, origins) if isinstance(node, ast.Attribute | ast.Name) else None
        if name:
            mentioned.add(name)
    for name in mentioned:
        parts = name.split(".")
        if parts[0] in PLACES or name == "os.urandom":
            found.add(name if parts[0] == "os" else parts[0])
        elif name.startswith("numpy.random"):
            found.add("numpy.random")
        elif parts[0] == "torch" and parts[-1] in DRAWING and "distributions" not in parts:
            found.add(f"torch.{parts[-1]}")
        elif name.startswith("torch.distributions"):
            found.add("torch.distributions")
    return found


def central_limit(text):
    """Every name of the accountant that understates epsilon, imported or reached through an attribute."""
    named = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                named |= {*alias.name.split("."), *(getattr(node, "module", None) or "").split(".")}
        elif isinstance(node, ast.Attribute):
            named.add(node.attr)
        elif isinstance(node, ast.Name):
            named.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
    return named & CLT


@pytest.mark.parametrize("room", GUARDED)
def test_randomness_beside_records_is_the_privacy_rooms_or_on_the_list(room):
    assert any(path.is_relative_to(ROOT / room) for path in FILES)
    for path in FILES:
        inside = path.relative_to(ROOT).as_posix()
        if inside.startswith(f"{room}/"):
            strange = {name for name in randomness(path.read_text()) if (inside, name) not in ALLOWED}
            assert not strange, (
                f"{inside} uses {strange}: draw from a NoiseSource, or give a reason in ALLOWED"
            )


def test_the_list_of_exceptions_holds_no_more_than_there_is():
    used = {
        (path.relative_to(ROOT).as_posix(), name) for path in FILES for name in randomness(path.read_text())
    }
    assert set(ALLOWED) <= used


def test_every_generator_of_ours_is_seeded_where_it_is_made():
    """An unseeded torch.Generator() starts from one public constant in every process."""
    for path in FILES:
        assert not unseeded(path.read_text()), path


def unseeded(text):
    tree = ast.parse(text)
    origins = _names(tree)
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and _dotted(n.func, origins) == "torch.Generator"
    ]
    seeded = {
        id(n.func.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "manual_seed"
    }
    return [n.lineno for n in calls if id(n) not in seeded]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_central_limit_accountant_is_nowhere(path):
    assert not central_limit(path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nnoise = torch.randn(3)",
        "import torch\ng = torch.Generator()",
        "import torch as t\nx = t.normal(0, 1, (3,))",
        "from torch import randn\nx = randn(3)",
        "from torch import Generator as G\ng = G()",
        "import torch\nx = torch.empty(3).normal_()",
        "import torch\ntorch.manual_seed(1)",
        "import torch\nx = torch.random.manual_seed(1)",
        "import torch\nx = torch.distributions.Normal(0, 1).sample()",
        "import numpy as np\nx = np.random.normal()",
        "from numpy.random import default_rng\nx = default_rng(0)",
        "from numpy import random\nx = random.normal()",
        "import random\nx = random.gauss(0, 1)",
        "from random import shuffle\nshuffle([])",
        "import os\nkey = os.urandom(32)",
    ],
)
def test_forbidden_randomness_is_seen(text):
    assert randomness(text)


@pytest.mark.parametrize(
    "text",
    [
        "from opacus.accountants import GaussianAccountant",
        "from opacus.accountants.gdp import GaussianAccountant as A",
        "import opacus.accountants.gdp as g",
        "from opacus.accountants.analysis import gdp",
        "import opacus.accountants as a\nx = a.GaussianAccountant()",
        "from opacus.accountants import create_accountant\nx = create_accountant('gdp')",
        "import opacus\nx = opacus.accountants.utils.get_noise_multiplier(accountant='gdp')",
        "x = getattr(module, 'GaussianAccountant')",
    ],
)
def test_the_central_limit_accountant_is_seen(text):
    assert central_limit(text)


def test_an_unseeded_generator_is_seen():
    assert unseeded("import torch\ng = torch.Generator()") == [2]
    assert not unseeded("import torch\ng = torch.Generator().manual_seed(3)")
