"""Whether there is a GPU is told without torch, and never against it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError
from fedlora.runtime.gpu import require_likely_gpu
from fedlora.runtime.host import require_gpu

BUILDS = {
    "cores": "cuda: Optional[str] = None\nhip: Optional[str] = None\n",
    "cuda": "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n",
    "old cuda": "debug = False\ncuda = '11.8'\ngit_version = 'x'\nhip = None\n",
    "hip": "cuda: Optional[str] = None\nhip: Optional[str] = '6.4.1'\n",
    "silent": "__version__ = '9'\n",
}


def passes(look, *arguments) -> bool:
    try:
        look(*arguments)
    except ConfigError as error:
        assert str(error).startswith("runtime.device: cuda, but torch finds no GPU on ")
        return False
    return True


def test_what_is_found_without_torch_is_what_torch_finds():
    cuda = Runtime(kind="local", device="cuda")
    if not torch.version.hip:  # of which nothing is known without it
        assert passes(require_likely_gpu, cuda) == passes(require_gpu) == torch.cuda.is_available()


def test_only_a_run_on_a_gpu_of_this_machine_needs_one():
    require_likely_gpu(Runtime(kind="local"))
    require_likely_gpu(Runtime(kind="ray", device="cuda", address="auto"))


@pytest.mark.parametrize(
    ("build", "likely"),
    [("cores", False), ("cuda", False), ("old cuda", False), ("hip", True), ("silent", True)],
)
def test_a_torch_for_cores_or_a_driver_without_cards_is_refused_and_what_is_not_known_is_not(
    tmp_path, build, likely
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\n" + BUILDS[build])
    program = (
        f"import json, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from fedlora.config.schema import Runtime\nfrom fedlora.errors import ConfigError\n"
        "from fedlora.runtime.gpu import require_likely_gpu\n"
        "try:\n    require_likely_gpu(Runtime(kind='local', device='cuda'))\n    print(json.dumps(True))\n"
        "except ConfigError:\n    print(json.dumps(False))\n"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # no card, whatever this machine has
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=hidden
    )
    assert json.loads(done.stdout) is likely
