"""Simulating many clients: ours beside stock Flower and Ray doing the same training, in one run.

    python benchmarks/simulation.py --quick                  a minute or so: 100 clients, tiny local work, 0.3 MB
    python benchmarks/simulation.py --full                   hours: 10 to 100,000 clients, real MiniLM work, memory
    python benchmarks/simulation.py --full --only MiniLM     the cases whose name has the word; others are kept
    python benchmarks/simulation.py --table                  the figures of the last run, as Markdown; with
                                                             --into docs/performance.md they are put in there

Each arm of a case is a tree of processes of its own, so that peak memory is its own; arms of a repeat follow each other
and the order swaps. A round ends when its result is there (ours: on disk). The first round, in which actors still load,
counts as start-up. Both sides have two actors of one thread.
Tiny local work: a random BERT of one layer and width 32, one step on one record, no privacy (noise on 750,000 numbers
would be the work). MiniLM: q and v at r = 8 and the head, (8, 1e-5)-private, records of 32 to 64 tokens.
Writes benchmarks/results/simulation.json, after each arm, and simulation.svg.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from at_scale.arm import run
from at_scale.cases import ARMS, FULL, QUICK, Case, case_of
from at_scale.cluster import extrapolated
from at_scale.figures import goals, measured, table
from at_scale.plot import plot

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures of benchmarks/simulation.py -->", "<!-- end of figures -->"


def main() -> int:
    """Runs the cases, prints the table and the goals, returns 1 when one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true")
    what.add_argument("--full", action="store_true")
    what.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--repeats", type=int, metavar="N", help="of each case, instead of its own number")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="of each case, the first of which is start-up"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="of each case, those alone")
    parser.add_argument("--into", type=Path, metavar="FILE")
    given = parser.parse_args()
    target = RESULTS / ("simulation-quick.json" if given.quick else "simulation.json")
    if given.table:
        return _write(json.loads(target.read_text()), given.into)
    cases = [case for case in (QUICK if given.quick else FULL) if given.only in case.name]
    if not cases:
        parser.error(f"no case has {given.only!r} in its name; there are {[case.name for case in FULL]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the arm under way is ended, too
    RESULTS.mkdir(exist_ok=True)
    found = _kept(target, cases) if given.only else _empty()
    with tempfile.TemporaryDirectory(dir=RESULTS) as scratch:  # a disk, where /tmp may be memory
        for case in cases:
            arms = tuple(arm for arm in case.arms if not given.arms or arm in given.arms)
            fewer = {
                "arms": arms,
                "repeats": given.repeats or case.repeats,
                "rounds": given.rounds or case.rounds,
            }
            _measure(replace(case, **fewer), Path(scratch), found, target)
    return report(found, target)


def _measure(case: Case, scratch: Path, found: dict[str, Any], target: Path) -> None:
    """Every arm of a case, as often as it says; what is found is on disk after each."""
    from at_scale.material import make  # loads torch

    place = scratch / str(len(found["cases"]))
    make(case, place / "material")
    found["cases"].append(case.words())
    for repeat in range(case.repeats):
        for arm in case.arms if repeat % 2 == 0 else reversed(case.arms):
            row = run(case, arm, place / "material", place / f"{repeat}-{arm.replace(' ', '')}")
            found["rows"].append({**measured(row, case), "repeat": repeat, "load": os.getloadavg()[0]})
            _say(found["rows"][-1])
            target.write_text(json.dumps(found, indent=1) + "\n")


def _say(row: dict[str, Any]) -> None:
    seconds = row.get("failed") or " ".join(f"{second:.3g}" for second in row["round_s"])
    print(f"{row['case']:45s} {row['arm']:18s} rounds: {seconds}", flush=True)


def report(found: dict[str, Any], target: Path) -> int:
    """Prints the table and every goal, the chief one last; the plot lies beside the JSON."""
    cases = [case_of(words) for words in found["cases"]]
    target.with_suffix(".svg").write_text(plot(found["rows"], cases))
    print(f"\n{_table(found)}\n")
    reached = goals(found["rows"], cases)
    print("\n".join(map(str, reached)))
    failed = [
        row for row in found["rows"] if row["arm"] == "fedlora" and ("failed" in row or row["incomplete"])
    ]
    for row in failed:
        print(f"{row['case']}: ours did not do it: {row.get('failed', 'somebody did not answer')}")
    return 0 if reached and not failed and all(goal.met for goal in reached) else 1


def _write(found: dict[str, Any], into: Path | None) -> int:
    """Prints the figures and what they come to on a cluster, or puts them between the two marks of a page."""
    cases = [case_of(words) for words in found["cases"]]
    text = f"{_machine(found)}\n\n{_table(found)}\n\n{extrapolated(found['rows'], cases)}"
    if into is None:
        print(text)
        return 0
    before, begin, rest = into.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{into} lacks the line {BEGIN!r} or, after it, {END!r}: put both where figures go")
    into.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    loads = [row["load"] for row in found["rows"]]
    load = (
        f"load average {min(loads):.1f} to {max(loads):.1f} as the arms ended"
        if loads
        else "nothing measured"
    )
    return f"{found['machine']['cores']} cores, {found['machine']['processor']}; {versions}; {load}"


def _table(found: dict[str, Any]) -> str:
    return table(found["rows"], [case_of(words) for words in found["cases"]])


def _empty() -> dict[str, Any]:
    versions = {name: version(name) for name in ("fedlora", "flwr", "ray", "torch", "opacus")}
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return {"machine": machine, "versions": versions, "cases": [], "rows": []}


def _kept(target: Path, again: list[Case]) -> dict[str, Any]:
    """What an earlier run found of other cases than these."""
    found = json.loads(target.read_text()) if target.exists() else _empty()
    names = {case.name for case in again}
    cases = [words for words in found["cases"] if words["name"] not in names]
    return {**found, "cases": cases, "rows": [row for row in found["rows"] if row["case"] not in names]}


if __name__ == "__main__":
    sys.exit(main())
