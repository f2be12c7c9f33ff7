"""The kernels fit into the registers and shared memory of GPUs that need not be there: compiled, never run.

Run as a script this file compiles and prints what the assembler says: a process of its own, since the tests of
`test_triton_ops.py` have made Triton an interpreter in theirs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes that a block may have
REGISTERS = {"aligned": 136, "ragged": 192}  # of a thread; a multiprocessor has 512 for each of its 128 lanes
POINTERS = {"out": "fp32", "parts": "fp64", "rows": "fp32", "sums": "fp64", "shares": "fp64"}
LAYOUTS = {"": {"out_rank": 1}, " turned": {"out_row": 1}}  # of a gradient: (m, r), or (r, m)


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its operands, and what is compiled in, as the launchers choose it."""
    from fedlora.kernels import triton_ops as ops

    yield "norm", ops.norm_kernel, {}, ops.NORM_SIZES
    for k in (1, 2, 8, 64):
        yield f"weighted of {k}", ops.weighted_kernel, {}, ops.weighted_sizes(k)
    for r in (8, 32, 64):
        for dy, h in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")):
            of_h = ops.OF_H["single" if "fp32" in (dy, h) else "narrow"]
            constants = {**ops.tile_sizes(512, 1024, r, of_h), "WIDEN": dy != h}
            for layout, stride in LAYOUTS.items():
                name = f"gradient {dy} {h} {r}{layout}"
                yield name, ops.gradient_kernel, {"dy": dy, "h": h}, {**constants, **stride}


def compile_all(capability: int, alignment: str, only: str) -> dict[str, dict[str, int]]:
    """Registers, spilt and shared bytes and wgmma instructions of each kernel whose name has `only`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedlora.kernels.triton_ops import LAUNCH

    found = {}
    for name, kernel, types, constants in kernels():
        if not re.search(only, name):
            continue
        types = {key: f"*{value}" for key, value in (POINTERS | types).items()}
        signature = {key: types.get(key, "i32") for key in kernel.arg_names} | dict.fromkeys(
            constants, "constexpr"
        )
        aligned = alignment == "aligned"
        even = {
            (place,): [["tt.divisibility", 16]]
            for place, key in enumerate(kernel.arg_names)
            if aligned
            and key not in constants
            and not (key in ("h_token", "out_row") and constants["R"] % 16)
        }
        source = ASTSource(kernel, signature, dict(constants), even)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
        found[name] = {**assembled(made.asm["ptx"], capability), "shared": made.metadata.shared}
    return found


def assembled(text: str, capability: int) -> dict[str, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        of = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", of, path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilt = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers and spilt, said
    return {
        "registers": int(registers[1]),
        "spilt": sum(map(int, spilt)),
        "wgmma": text.count("wgmma.mma_async"),
    }


def compiled(capability: int, alignment: str, only: str, cache: Path) -> dict[str, dict[str, int]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(capability), alignment, only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_fits(found: dict[str, dict[str, int]], capability: int, alignment: str) -> None:
    assert found
    for name, needs in found.items():
        assert needs["spilt"] == 0, (name, needs)
        assert needs["registers"] <= REGISTERS[alignment], (name, needs)
        assert needs["shared"] < SHARED[capability], (name, needs)
        narrow = name.startswith(("gradient bf16 bf16", "gradient fp16"))
        assert (needs["wgmma"] > 0) or not (narrow and capability == 90), (name, needs)


@pytest.mark.slow  # some kernels are compiled for each device
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_of_usual_sizes_spill_no_register(capability, tmp_path):
    pytest.importorskip("triton")
    usual = "norm|weighted of (1|64)$|gradient (bf16|fp32).* (8 turned|64 turned|8)$"
    found = compiled(capability, "aligned", usual, tmp_path)
    assert {name.split()[0] for name in found} == {"norm", "weighted", "gradient"}
    assert_fits(found, capability, "aligned")


@pytest.mark.slow  # each of 29 kernels is compiled for each of two devices
@pytest.mark.parametrize("alignment", REGISTERS)
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_of_any_size_and_alignment_spill_no_register(capability, alignment, tmp_path):
    pytest.importorskip("triton")
    assert_fits(compiled(capability, alignment, "", tmp_path), capability, alignment)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2], sys.argv[3])))
