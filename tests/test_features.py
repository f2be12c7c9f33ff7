"""The table of features claims nothing that has no test or page, and keeps no reason to itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in (ROOT / "docs" / "features.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| feature |")
]


def faults(row: tuple[str, ...]) -> list[str]:
    """What a row of feature, mark, paths and note lacks."""
    if len(row) != 4 or row[1] not in ("Y", "P", "N"):
        return [f"feature, Y or P or N, paths, note: {row}"]
    _, mark, shown, note = row
    paths = re.findall(r"`([^`]+)`", shown)
    found = [f"{path} is not there" for path in paths if not (ROOT / path).is_file()]
    if mark == "Y" and not paths:
        found.append("nothing shows it")
    if mark != "Y" and len(note.split()) < 5:
        found.append("no reason")
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_feature_has_what_shows_it_or_a_reason(row):
    assert faults(row) == []


def test_every_feature_has_one_row_and_a_row_that_only_claims_is_found():
    names = [row[0] for row in ROWS]
    assert len(names) == len(set(names)) == 57, "as many features as neighbours were asked about"
    assert faults(("x", "Y", "-", "-")) == ["nothing shows it"]
    assert faults(("x", "Y", "`tests/gone.py`", "-")) == ["tests/gone.py is not there"]
    assert faults(("x", "N", "-", "-")) == faults(("x", "P", "`README.md`", "soon")) == ["no reason"]
    assert faults(("x", "maybe", "-", "-")) != []
