"""`fedlora provision`: one table or one document, one message and its exit status for whatever is wrong."""

import json

import pytest
import typer
from typer.testing import CliRunner

from fedlora.cli import provision
from fedlora.cli.app import explain

app = typer.Typer(rich_markup_mode=None)
provision.add_to(app)


@app.callback()
def _callback() -> None:
    """Keeps `provision` a subcommand, as it is in the real app."""


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, the one message) as the console script would have them."""
    result = CliRunner().invoke(app, ["provision", *map(str, arguments)])
    if result.exception is None:
        return 0, result.stdout, result.stderr
    message, status = explain(result.exception)
    return status, result.stdout, message


def test_the_table_names_every_file_its_purpose_its_recipient_and_its_end(tmp_path):
    status, out, err = run(tmp_path / "kit", "--nodes", 2, "--server-name", "fed.example.org")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line.split()}
    for name in (path.name for path in (tmp_path / "kit").iterdir()):
        assert name in lines and " made " in lines[name]
    assert "every node" in lines["ca.crt"] and "20" in lines["ca.crt"].split()[-1]
    assert "node-1 alone" in lines["node-1.key"]
    assert "no node" not in lines["node-1.pub"]
    assert "server certificate for localhost, 127.0.0.1, superlink, proxy, fed.example.org" in out


def test_no_secret_is_ever_printed(tmp_path):
    said = [run(tmp_path / "kit", "--nodes", 1), run(tmp_path / "kit", "--nodes", 1, "--format", "json")]
    said.append(run(tmp_path / "kit", "--node", "node-2", "--format", "json"))
    secret = (tmp_path / "kit/superexec.secret").read_text()
    for _, out, err in said:
        assert "PRIVATE KEY" not in out + err and secret not in out + err


def test_fewer_nodes_than_lie_there_are_told_and_none_is_removed(tmp_path):
    kit = tmp_path / "kit"
    run(kit, "--nodes", 5)
    before = {path.name: path.read_bytes() for path in kit.iterdir()}
    status, out, _ = run(kit, "--nodes", 2)
    (note,) = [line for line in out.splitlines() if line.startswith("  note: ")]
    assert status == 0
    assert "--nodes 2, but keys of 5 nodes lie here (node-1, node-2, node-3 and 2 more)" in note
    assert "remove NAME.key and NAME.pub" in note
    assert before == {path.name: path.read_bytes() for path in kit.iterdir()}
    assert "note" not in run(kit, "--nodes", 5)[1]


def test_json_is_one_document_that_tells_what_was_made_and_what_was_kept(tmp_path):
    run(tmp_path / "kit", "--nodes", 1)
    (tmp_path / "kit/ca.key").unlink()
    status, out, _ = run(tmp_path / "kit", "--nodes", 2, "--days", 90, "--format", "json")
    told = json.loads(out)
    states = {row["file"]: row["state"] for row in told["files"]}
    assert status == 0
    assert {name for name, state in states.items() if state == "made"} == {
        "node-2.key",
        "node-2.pub",
        "nodes.json",
    }
    assert states["ca.key"] == "elsewhere" and states["server.crt"] == "kept"
    assert told["nodes"] == ["node-1", "node-2"] and told["findings"] == []
    assert told["notes"] == ["server.crt was kept as it is; --renew makes one of 90 days"]
    assert {row["file"] for row in told["files"] if row["ends"]} == {"ca.crt", "server.crt"}


def test_renewal_shows_the_earlier_certificate_and_a_short_one_is_said_to_end_soon(tmp_path):
    run(tmp_path / "kit", "--nodes", 1)
    status, out, _ = run(tmp_path / "kit", "--renew", "--days", 20)
    assert status == 0 and "earlier server certificate" in out
    assert "ends-soon: " in out and "--renew" in out


def test_a_directory_that_holds_other_things_stays_in_git(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(tmp_path, "--node", "hospital-a")[0] == 0
    assert not (tmp_path / ".gitignore").exists()


def test_a_node_gets_its_pair_and_is_told_what_to_send(tmp_path):
    status, out, _ = run(tmp_path, "--node", "hospital-a")
    assert status == 0 and "send hospital-a.pub to the server's operator" in out and "SHA256:" in out
    assert {path.name for path in tmp_path.iterdir()} == {".gitignore", "hospital-a.key", "hospital-a.pub"}
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    told = json.loads(run(tmp_path, "--node", "hospital-a", "--format", "json")[1])
    assert [row["state"] for row in told["files"]] == ["kept", "kept"]
    assert told["public_key"] in (tmp_path / "hospital-a.pub").read_text()
    assert told["fingerprint"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes: 0, but a federation has at least 1 node; give a larger number"),
        ([], "--nodes: missing; say how many"),
        (["--node", "a/b"], "node: 'a/b' is no name; use 1 to 96"),
        (["--node", "a", "--nodes", "2"], "--node makes one key pair and nothing else"),
        (["--node", "a", "--renew"], "--node makes one key pair and nothing else"),
        (["--renew"], "nothing to renew"),
    ],
)
def test_a_usage_error_is_one_message_with_status_2_and_writes_nothing(tmp_path, arguments, message):
    status, out, said = run(tmp_path / "kit", *arguments)
    assert status == 2 and out == "" and message in said
    assert not (tmp_path / "kit").exists()
