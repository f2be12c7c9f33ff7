"""A ledger or a reply that was lost, altered or put back is noticed by whoever remembers it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.deploy.node import DeployedNode
from fedlora.privacy.ledger import read_ledger
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, RefusalReason, Witness
from tests.damage import flipped
from tests.deploy.nodes import debits, first_request, node_config, reason


def replies_of(config) -> list[Path]:
    return sorted(Path(f"{config.ledger}.outbox").glob("*.reply"))


def test_a_lost_reply_is_paid_again_with_other_bytes_and_not_for_ever(
    tmp_path, tiny_encoder, topic_files, caplog
):
    config = node_config(tmp_path, tiny_encoder, topic_files[0], participations=9)
    frame = encode_request(first_request(config))
    told = []
    for attempt in (1, 2, 3):
        told.append(DeployedNode(config).answer(frame))
        assert DeployedNode(config).answer(frame) == told[-1]
        paid = read_ledger(Path(config.ledger)).debits
        assert [debit.attempt for debit in paid] == list(range(1, attempt + 1))
        for path in replies_of(config):
            path.unlink()
    assert len(set(told)) == 3
    assert reason(DeployedNode(config).answer(frame)) == RefusalReason.LEDGER
    assert "was paid 3 times and left no reply" in caplog.text
    assert debits(config) == 3


def test_the_reply_of_an_attempt_that_was_paid_again_is_void(config, request_one):
    frame = encode_request(request_one)
    DeployedNode(config).answer(frame)
    (path,) = replies_of(config)
    kept = path.read_bytes()
    path.unlink()
    DeployedNode(config).answer(frame)
    path.write_bytes(kept)  # of the first attempt, found again
    assert reason(DeployedNode(config).answer(frame)) == RefusalReason.BUDGET
    assert debits(config) == 2


def test_a_reply_that_was_altered_on_disk_is_not_sent(config, request_one, caplog):
    frame = encode_request(request_one)
    DeployedNode(config).answer(frame)
    (path,) = replies_of(config)
    kept = path.read_bytes()
    for altered in (kept[:-1], flipped(kept), kept[:-40] + bytes(40)):
        path.write_bytes(altered)
        assert reason(DeployedNode(config).answer(frame)) == RefusalReason.LEDGER
        assert "debit 1 has released" in caplog.text
        caplog.clear()
    for altered in (b"", b"no reply\n" + kept.partition(b"\n")[2], b"{}\n"):
        path.write_bytes(altered)
        assert reason(DeployedNode(config).answer(frame)) == RefusalReason.LEDGER
        assert "no reply that was kept" in caplog.text
        caplog.clear()
    assert debits(config) == 1


@pytest.mark.fault("F38")
def test_a_ledger_that_was_deleted_or_put_back_is_noticed_by_the_replies_beside_it(
    config, request_one, caplog
):
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2)]
    ledger = Path(config.ledger)
    node = DeployedNode(config)
    node.answer(frames[0])
    older = ledger.read_bytes()
    node.answer(frames[1])
    newest = ledger.read_bytes()

    ledger.unlink()
    for asked in (node, DeployedNode(config)):
        assert [reason(asked.answer(frame)) for frame in frames] == [RefusalReason.LEDGER] * 2
    assert not ledger.exists()
    assert "missing, but it had at least 3 entries" in caplog.text and "backup" in caplog.text

    ledger.write_bytes(older)
    third = encode_request(replace(request_one, run="another"))
    for asked in (node, DeployedNode(config)):
        assert reason(asked.answer(third)) == RefusalReason.LEDGER
    assert ledger.read_bytes() == older
    assert "rolled back, it has 2 entries and had 3" in caplog.text

    ledger.write_bytes(newest)
    assert isinstance(decode_reply(DeployedNode(config).answer(frames[1])), ClientUpdate)


class Volume:
    """The disk with ledger and replies, as a backup takes it and puts it back."""

    def __init__(self, config, folder: Path) -> None:
        self.there, self.copy = Path(config.ledger).parent, folder / "yesterday"

    def back_up(self) -> None:
        shutil.copytree(self.there, self.copy)

    def restore(self) -> None:
        shutil.rmtree(self.there)
        shutil.copytree(self.copy, self.there)


@pytest.mark.fault("F38")
def test_yesterdays_ledger_and_replies_together_are_refused_by_what_the_server_remembers(
    config, request_one, tmp_path, caplog
):
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2, 3)]
    volume = Volume(config, tmp_path)
    first = decode_reply(DeployedNode(config).answer(frames[0])).ledger
    volume.back_up()
    second = decode_reply(DeployedNode(config).answer(frames[1])).ledger
    volume.restore()
    assert reason(DeployedNode(config).answer(frames[2], second)) == RefusalReason.LEDGER
    assert "rolled back, it has 2 entries and had 3" in caplog.text and "backup" in caplog.text
    assert debits(config) == 1
    # Where nobody remembers, nothing tells: the server is needed, or a mark.
    assert isinstance(decode_reply(DeployedNode(config).answer(frames[2], first)), ClientUpdate)


def test_yesterdays_ledger_and_replies_together_are_refused_by_the_mark(
    config, request_one, tmp_path, caplog
):
    marked = config.model_copy(update={"mark": str(tmp_path / "other disk" / "mark")})
    frames = [encode_request(replace(request_one, round=n)) for n in (1, 2)]
    volume = Volume(marked, tmp_path)
    DeployedNode(marked).answer(frames[0])
    volume.back_up()
    DeployedNode(marked).answer(frames[1])
    volume.restore()
    for frame in frames:
        assert reason(DeployedNode(marked).answer(frame)) == RefusalReason.LEDGER
        assert "rolled back, it has 2 entries and had 4" in caplog.text
        caplog.clear()
    shutil.rmtree(volume.there)
    assert reason(DeployedNode(marked).answer(frames[1])) == RefusalReason.LEDGER
    assert "missing, but it had at least 4 entries" in caplog.text
    assert not Path(marked.ledger).exists()


def test_a_ledger_that_only_the_server_remembers_is_not_begun_anew(config, request_one, caplog):
    frame = encode_request(request_one)
    assert reason(DeployedNode(config).answer(frame, Witness(seq=7, head="a" * 64))) == RefusalReason.LEDGER
    assert "missing, but it had at least 7 entries" in caplog.text
    assert not Path(config.ledger).exists()
    told = decode_reply(DeployedNode(config).answer(frame)).ledger
    other = replace(told, head="a" * 64)  # as long, but of another history
    assert reason(DeployedNode(config).answer(frame, other)) == RefusalReason.LEDGER
    assert "not the ledger that was seen before" in caplog.text
    assert isinstance(decode_reply(DeployedNode(config).answer(frame, told)), ClientUpdate)


@pytest.mark.parametrize("whose", ["client", "data"])
def test_a_ledger_of_another_client_or_of_other_records_is_refused(
    config, request_one, tmp_path, whose, caplog
):
    DeployedNode(config).answer(encode_request(request_one))
    changes: dict[str, object] = {"client": "site-1"}
    if whose == "data":
        fewer = tmp_path / "fewer.tsv"
        fewer.write_text("".join(Path(config.data.train).read_text().splitlines(keepends=True)[:-1]))
        changes = {"data": config.data.model_copy(update={"train": str(fewer)})}
    before = Path(config.ledger).read_bytes()
    node = DeployedNode(config.model_copy(update=changes))
    assert reason(node.answer(encode_request(replace(request_one, round=2)))) == RefusalReason.LEDGER
    assert "foreign, it" in caplog.text
    assert Path(config.ledger).read_bytes() == before


def test_what_a_reply_tells_of_the_ledger_says_nothing_of_the_records(tmp_path, tiny_encoder, topic_files):
    """The digests of two ledgers of one owner, one data set and one request have nothing in common."""
    told = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = node_config(tmp_path / name, tiny_encoder, topic_files[0])
        reply = decode_reply(DeployedNode(config).answer(encode_request(first_request(config))))
        assert isinstance(reply, ClientUpdate) and reply.ledger is not None
        header = read_ledger(Path(config.ledger)).header
        told.append((reply.ledger.head, header.dataset_fingerprint))
    assert not set(told[0]) & set(told[1])


def test_a_ledger_without_its_key_is_refused(config, request_one, caplog):
    DeployedNode(config).answer(encode_request(request_one))
    Path(f"{config.ledger}.key").unlink()
    node = DeployedNode(config)
    assert reason(node.answer(encode_request(replace(request_one, round=2)))) == RefusalReason.LEDGER
    assert "ledger.jsonl.key: missing" in caplog.text
    assert not Path(f"{config.ledger}.key").exists() and debits(config) == 1


def test_records_in_another_order_or_cut_elsewhere_are_the_same_records_to_the_ledger(
    config, request_one, tmp_path
):
    DeployedNode(config).answer(encode_request(request_one))
    head, *rows = Path(config.data.train).read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.tsv"
    turned.write_text("".join([head, *reversed(rows)]))
    again = config.model_copy(
        update={"data": config.data.model_copy(update={"train": str(turned), "max_length": 8})}
    )
    reply = decode_reply(DeployedNode(again).answer(encode_request(replace(request_one, round=2))))
    assert isinstance(reply, ClientUpdate)
    assert debits(config) == 2


def test_numbers_that_are_finite_only_in_a_wider_type_are_refused_before_anything_is_paid(
    config, request_one
):
    wide = {
        site: replace(factors, a=factors.a.double() * 1e300, b=factors.b.double())
        for site, factors in request_one.adapters.sites.items()
    }
    asked = replace(request_one, adapters=replace(request_one.adapters, sites=wide))
    assert reason(DeployedNode(config).answer(encode_request(asked))) == RefusalReason.BAD_REQUEST
    assert debits(config) == 0
