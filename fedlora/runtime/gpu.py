"""Whether this machine has a GPU that torch can use, asked without importing torch."""

import ctypes
import importlib.util
import re
import socket
from pathlib import Path

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError

DRIVER = "libcuda.so.1"
"""What every CUDA program asks first; it heeds CUDA_VISIBLE_DEVICES."""
BUILT_FOR = re.compile(r"^(cuda|hip)\b[^=\n]*= *(None|['\"])", re.MULTILINE)
"""In torch/version.py: a version in quotes, or None where torch was built without."""


def no_gpu() -> ConfigError:
    """What to say where there is none."""
    return ConfigError(
        f"runtime.device: cuda, but torch finds no GPU on {socket.gethostname()}; write device: cpu, "
        "or see what is missing: fedlora doctor"
    )


def require_likely_gpu(runtime: Runtime) -> None:
    """Passes a run that needs no GPU here, or for which torch should find one; `host.require_gpu` then asks torch.

    Raises:
        ConfigError: torch is built for cores alone, or the driver counts no card.
    """
    if runtime.device != "cuda" or runtime.address is not None:
        return
    built = _built_for()
    if built.get("hip") is False and (built.get("cuda") is False or not _cards()):
        raise no_gpu()


def _built_for() -> dict[str, bool]:
    """Whether the installed torch was built for each, as far as it says."""
    spec = importlib.util.find_spec("torch")
    said = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    if said is None or not said.is_file():
        return {}
    return {name: value != "None" for name, value in BUILT_FOR.findall(said.read_text(encoding="utf-8"))}


def _cards() -> int:
    """CUDA devices that the driver shows this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value
