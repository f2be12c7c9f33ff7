"""What privacy costs: one DP-SGD step of B-only LoRA beside the same step without it, and beside others' private ones.

    python benchmarks/private_step.py --quick                  minutes: a tiny model, and MiniLM on eight short records
    python benchmarks/private_step.py --full                   an hour or two of one core: all sizes; and a GPU, if any
    python benchmarks/private_step.py --full --only MiniLM     problems whose name has the word
    python benchmarks/private_step.py --table                  the figures of the last --full, as Markdown; with
                                                               --into docs/performance.md they are put in there

All arms start from the same random weights and take the same batch, of equal lengths, so there is no padding and no
mask; r = 8, and only B is trained. Before anything is timed, a step without noise must have moved the weights by the
same clipped sums in all private arms, half of the records being clipped, and by the same mean in all plain ones.
plain PEFT: PEFT's own LoRA on plain nn.Linear, mean loss, backward, SGD. plain, torch (onednn, triton): the same on our
own model with those `model.kernels`. ours: `private_gradient` with the direct engine, noise from the operating system,
and SGD. Opacus hooks, Opacus ghost: as `PrivacyEngine` joins them; functorch: vmap(grad); microbatches of 1: a backward
pass a record, which defines what is right. These run on the PEFT model.
Arms alternate in one process, in an order that turns over; a figure is the median over repeats, a ratio is taken within
a repeat. CPU: process time of one thread. GPU: between events. of peak rate: the products that plain PEFT counts, over
time and the best rate that any product reached in this run. Memory: each arm in a process of its own, the highest mark
of a second step above what was resident before it (weights, their packed copies, Python).
Writes benchmarks/results/private_step.json, after each problem; what it holds of other problems and devices is kept.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures of benchmarks/private_step.py -->", "<!-- end of private_step.py -->"
REPEATS = {"quick": 3, "full": 9}


def main() -> int:
    """Measures the problems, prints the table and the goals, returns 1 when one is missed or ours failed."""
    parser = _parser()
    given = parser.parse_args()
    target = given.results / ("private_step-quick.json" if given.quick else "private_step.json")
    if given.table:
        return _write(json.loads(target.read_text()), given.into)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    import torch
    from steps.problems import CUDA, FULL, QUICK

    torch.set_num_threads(1)
    problems = QUICK if given.quick else (*FULL, *(CUDA if torch.cuda.is_available() else ()))
    chosen = [problem for problem in problems if given.only in problem.name]
    if not chosen:
        parser.error(f"no problem has {given.only!r} in its name; there are {[p.name for p in problems]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that scratch and the arm under way end, too
    given.results.mkdir(exist_ok=True, parents=True)
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    rates: dict[tuple[str, str], float] = {}
    repeats = given.repeats or REPEATS["quick" if given.quick else "full"]
    for problem in chosen:
        with tempfile.TemporaryDirectory(dir=given.results) as scratch:  # a disk, where /tmp may be memory
            new = measure(problem, Path(scratch), repeats, rates)
        again = new[0]["device"], problem.name
        rows = [row for row in rows if (row["device"], row["problem"]["name"]) != again] + new
        target.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return report(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true")
    what.add_argument("--full", action="store_true")
    what.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--repeats", type=int, metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--into", type=Path, metavar="FILE")
    return parser


def measure(
    problem: Any, directory: Path, repeats: int, rates: dict[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """A row for each arm: seconds by repeat, or why it failed; how far its sum was off; peaks.

    Args:
        problem: whose checkpoint is put into `directory`.
        directory: empty.
        repeats: of the timing.
        rates: the best product's, by device and type; what is lacking is measured and put in.
    """
    from steps.arms import PEFT
    from steps.figures import milliseconds
    from steps.measure import best_rate, device_name, flops_of, timed
    from steps.variants import arms_for, kernels_for

    print(f"\n{problem.name}", flush=True)
    problem.save(directory)
    kind = problem.device, problem.dtype
    rates.setdefault(kind, 0.0)
    rates[kind] = max(rates[kind], best_rate(*kind))
    bound, variants, off, failed = _agreeing(problem, directory)
    common = {
        "problem": json.loads((directory / "problem.json").read_text()),
        "device": device_name(problem.device),
        "versions": _versions(),
        "kernels": kernels_for(problem),
        "bound": bound,
        "rate": rates[kind],
        "flops": flops_of(variants[PEFT]),
    }
    times = timed(variants, problem, repeats)
    variants.clear()
    rows = []
    for arm in arms_for(problem):
        row = {**common, "arm": arm, "load": os.getloadavg()[0]}
        row |= {"failed": failed[arm]} if arm in failed else {"seconds": times[arm], "off": off[arm]}
        if problem.memory and arm not in failed:
            row |= _peaks(problem, directory, bound, arm)
        rows.append(row)
        said = row.get("failed") or f"{milliseconds(statistics.median(row['seconds'])):>8s} ms"
        print(f"  {arm:20s} {said}   off by {row.get('off', 0):.1e}", flush=True)
    return rows


def _versions() -> str:
    numbers = {name: version(name) for name in ("fedlora", "torch", "peft", "opacus", "transformers")}
    numbers["python"] = platform.python_version()
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _agreeing(
    problem: Any, directory: Path
) -> tuple[float, dict[str, Any], dict[str, float], dict[str, str]]:
    """The bound, the arms whose clipped sums agree, how far each is off, and why the others are left out."""
    from steps.arms import MICRO, PEFT
    from steps.measure import TOLERANCE, clipped_sum, disagreements
    from steps.variants import arms_for, build, record_norms

    own: dict[str, Any] = {}
    bound = float(record_norms(build(PEFT, problem, directory, 1.0, own), problem).median())
    variants, sums, failed = {}, {}, {}
    for arm in arms_for(problem):
        try:
            variants[arm] = build(arm, problem, directory, bound, own)
            sums[arm] = clipped_sum(variants[arm], problem, bound)
        except Exception as error:  # others' code on models that they may not know; said in the table
            if arm in (PEFT, MICRO):  # what all are compared with
                raise
            failed[arm] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    off = disagreements(sums)
    wrong = {arm: far for arm, far in off.items() if not far <= TOLERANCE[problem.dtype]}
    failed |= {arm: f"clipped sum off by {far:.1e}" for arm, far in wrong.items()}
    agreeing = {arm: variant for arm, variant in variants.items() if arm not in failed}
    return bound, agreeing, off, failed


def _peaks(problem: Any, directory: Path, bound: float, arm: str) -> dict[str, Any]:
    from steps.memory import peak_of

    found = peak_of(directory, bound, arm, checkpointed=False)
    row = {"step_mb_failed": found["failed"]} if "failed" in found else found
    if problem.linears == "all" and arm.startswith(("plain", "ours")):
        again = peak_of(directory, bound, arm, checkpointed=True)
        key = "checkpointed_mb"
        row |= {f"{key}_failed": again["failed"]} if "failed" in again else {key: again["step_mb"]}
    return row


def report(rows: list[dict[str, Any]]) -> int:
    """Prints the table and every goal."""
    from steps.figures import goals, line, table

    print(f"\n{table(rows)}\n")
    reached = goals(rows)
    print("\n".join(line(goal) for goal in reached))
    broken = [
        row for row in rows if row["arm"].startswith("ours") and any(word.endswith("failed") for word in row)
    ]
    for row in broken:
        why = next(value for word, value in row.items() if word.endswith("failed"))
        print(f"{row['problem']['name']}: {row['arm']} did not do it: {why}")
    return 0 if not broken and all(goal.met for goal in reached) else 1


def _write(found: dict[str, Any], into: Path | None) -> int:
    """Prints the figures, or puts them between the two marks of a page."""
    from steps.figures import table

    rows = found["rows"]
    versions = "; ".join(dict.fromkeys(row["versions"] for row in rows))
    loads = [row["load"] for row in rows]
    text = f"{versions}; load average {min(loads):.1f} to {max(loads):.1f}\n\n{table(rows)}"
    if into is None:
        print(text)
        return 0
    before, begin, rest = into.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{into} lacks the line {BEGIN!r} or, after it, {END!r}: put both where figures go")
    into.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
