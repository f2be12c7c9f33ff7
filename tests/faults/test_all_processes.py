"""Whichever process of a federation is killed at whatever moment, the run ends where it would have ended anyway.

Five kills in four rounds; twenty in ten: FEDLORA_PROCESS_KILLS=20.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from fedlora.config.load import load_config, load_node
from fedlora.deploy.replay import replay
from fedlora.privacy.ledger_format import Contents, Release
from fedlora.provision.provision import provision
from tests.deploy.federation import Federation
from tests.deploy.seeded import deal_out
from tests.faults.process_kills import (
    KINDS,
    Tended,
    kill_at_random,
    state_sha256,
    undisturbed,
    victims,
    violations,
)

KILLS = int(os.environ.get("FEDLORA_PROCESS_KILLS", "5"))
ROUNDS = 4 if KILLS <= 5 else KILLS // 2


@pytest.fixture
def federation(tmp_path, topic_files, tiny_config) -> Iterator[Federation]:
    """Two nodes with registered keys, which come back under their old ids, and long rounds for so small a model."""
    tiny_config()  # leaves run.yaml here
    provision(tmp_path / "kit", nodes=2, now=datetime.now(UTC))
    found = Federation(
        tmp_path, topic_files[0], kit=tmp_path / "kit", rounds=ROUNDS, deadline_s=150, local_steps=200
    )
    found.run["federation"]["optimizer"]["lr"] = 0.1
    found.run["method"]["stale"] = {"beta": 0.5}
    # A killed executor may have to train a round again, and that is paid anew.
    found.run["privacy"]["max_participations"] = ROUNDS + KILLS // len(KINDS) + 1
    found.config.write_text(yaml.safe_dump(found.run))
    deal_out(found)
    yield found
    found.stop()


def ledgers(federation: Federation) -> dict[str, Contents]:
    contents = [federation.ledger(number) for number in range(len(federation.nodes))]
    return {found.header.client: found for found in contents if found is not None}


@pytest.mark.slow
@pytest.mark.fault("F1", "F6")
def test_kills_of_every_kind_of_process_lose_no_update_count_none_twice_and_do_not_change_the_end(
    federation, tmp_path, capsys
):
    tended = Tended(federation)
    tended.start()
    kill_at_random(tended, KILLS, random.Random(20261121))
    assert tended.until(lambda: federation.processes.started["server"].poll() == 0)
    tended.tend()
    with capsys.disabled():
        print("", *tended.kills, told(federation, tended), sep="\n")
    config, run_dir = load_config(federation.config, ["runtime={kind: local}"]), federation.run_dir
    assert len(tended.kills) == KILLS and all(kill.done_s is not None for kill in tended.kills)
    assert violations(run_dir, ledgers(federation), config) == []
    assert len(ledgers(federation)) == len(federation.nodes)
    for number, path in enumerate(federation.nodes):
        # Nobody pays twice for a round but a node whose own process was killed in it.
        killed = sum(kill.victim == f"executor-{number}" for kill in tended.kills)
        debits = ledgers(federation)[load_node(path).client].debits
        assert len(debits) <= ROUNDS + killed
    *_, (last, digest) = replay(run_dir)
    assert (last, digest) == (ROUNDS, state_sha256(run_dir))
    assert digest == undisturbed(config, run_dir, tmp_path / "undisturbed")
    for words, damage in DAMAGES.items():
        assert any(words in found for found in violations(damage(run_dir), ledgers(federation), config)), (
            words
        )
    for words, wrong in WRONG_LEDGERS.items():
        seen = {client: wrong(held) for client, held in ledgers(federation).items()}
        assert any(words in found for found in violations(run_dir, seen, config)), words


def told(federation: Federation, tended: Tended) -> str:
    lines = federation.lines()
    missed = sum(len(set(line["asked"]) - set(line["answered"])) for line in lines)
    asked = sum(len(line["asked"]) for line in lines)
    waits = sorted(kill.done_s or 0.0 for kill in tended.kills)
    return (
        f"{len(tended.kills)} kills in {ROUNDS} rounds: {missed} of {asked} answers missed, debits "
        f"{federation.debits()}, restarts {dict(tended.restarts)}; until the round was done "
        f"{waits[len(waits) // 2]:.1f} s (median), {waits[-1]:.1f} s (most)"
    )


def _rewritten(name: str, change: Callable[[list[dict]], list[dict]]) -> Callable[[Path], Path]:
    def damage(run_dir: Path) -> Path:
        copy = run_dir.with_name("damaged")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_dir, copy)
        lines = [json.loads(line) for line in (copy / name).read_text().splitlines()]
        (copy / name).write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
        return copy

    return damage


DAMAGES = {
    "journalled twice": _rewritten("spent.jsonl", lambda lines: [*lines, lines[-1]]),
    "heard 0 times": _rewritten("spent.jsonl", lambda lines: lines[:-1]),
    "counted 0 times": _rewritten("rounds.jsonl", lambda lines: [*lines[:-1], {**lines[-1], "answered": []}]),
    "the server heard": _rewritten("spent.jsonl", lambda lines: [*lines[:-1], {**lines[-1], "payload": "0"}]),
    "are done": _rewritten("rounds.jsonl", lambda lines: [*lines[:-2], lines[-1], lines[-2]]),
}
"""What the judge says of a run that is damaged so: each is found."""


def _released_again(contents: Contents) -> Contents:
    other = Release(seq=len(contents.digests), debit=contents.debits[0].seq, payload="0")
    return replace(contents, releases=(*contents.releases, other))


WRONG_LEDGERS = {
    "released round 1 twice": _released_again,
    "spent epsilon": lambda contents: replace(contents, debits=contents.debits * 3),
    "the server heard": lambda contents: replace(contents, releases=contents.releases[1:]),
}
"""And of ledgers that are wrong so."""


def test_every_kind_of_process_is_killed_once_in_every_five_kills():
    drawn = victims(20, random.Random(1))
    assert [Counter(drawn[start : start + 5]) for start in range(0, 20, 5)] == [Counter(KINDS)] * 4
