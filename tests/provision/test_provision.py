"""A kit is whole, accepted by TLS and by Flower itself, and never overwritten; what is wrong with one is named."""

import argparse
import fcntl
import json
import os
import shutil
import socket
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedlora.errors import ConfigError
from fedlora.provision import node_keys
from fedlora.provision.certificate_check import inspect_certificate
from fedlora.provision.certificates import authority_certificate, certificate_pem, new_key
from fedlora.provision.node_keys import complete_pair, fingerprint, nodes_to_register, public_line
from fedlora.provision.provision import Kit, provision, provision_node
from tests.provision.handshakes import handshakes

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def kit(directory: Path, nodes: int | None = 2, now: datetime = NOW, **options) -> Kit:
    return provision(directory, nodes=nodes, now=now, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def codes(directory: Path, now: datetime = NOW, **checks) -> list[str]:
    given = {
        "authority": directory / "ca.crt",
        "key": directory / "server.key",
        "name": "localhost",
        **checks,
    }
    return [found.code for found in inspect_certificate(directory / "server.crt", now, **given)]


def tls_server(directory: Path) -> AbstractContextManager[int]:
    """The port of a TLS server on loopback with the kit's certificate."""
    return handshakes(directory / "server.crt", directory / "server.key")


def refusal(port: int, authority: Path, name: str = "localhost") -> int:
    """OpenSSL's verify code of a client that checks as strictly as Python 3.13 does; 0: accepted."""
    context = ssl.create_default_context(cafile=str(authority))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return 0
    except ssl.SSLCertVerificationError as error:
        return error.verify_code


def test_a_fresh_kit_holds_one_file_for_each_purpose_with_the_right_mode(tmp_path):
    made = kit(tmp_path / "a" / "kit")
    private = {"ca.key", "server.key", "superexec.secret", "node-1.key", "node-2.key"}
    public = {"ca.crt", "server.crt", "node-1.pub", "node-2.pub", "nodes.json", ".gitignore"}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a" / "kit").iterdir()}
    assert modes == {**dict.fromkeys(private, 0o600), **dict.fromkeys(public, 0o644)}
    assert made.made == private | public
    assert made.findings == () and made.notes == ()
    assert made.server_names == ("localhost", "127.0.0.1", "superlink", "proxy")


def test_files_have_their_modes_under_any_umask(tmp_path):
    before = os.umask(0o077)
    try:
        kit(tmp_path / "kit")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kit/server.crt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "kit/server.key").stat().st_mode) == 0o600


def test_a_client_accepts_the_right_names_and_authority_and_tells_every_fault_apart(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    kit(own, server_names=["fed.example.org", "::1"])
    kit(other)
    with tls_server(own) as port:
        for name in ("localhost", "127.0.0.1", "superlink", "proxy", "fed.example.org", "::1"):
            assert refusal(port, own / "ca.crt", name) == 0
            assert codes(own, name=name) == []
        assert refusal(port, own / "ca.crt", "elsewhere.example.org") == 62
        assert refusal(port, own / "ca.crt", "127.0.0.2") == 64
        assert refusal(port, other / "ca.crt") in (19, 20)
    assert codes(own, name="elsewhere.example.org") == ["wrong-name"]
    assert codes(own, name="127.0.0.2") == ["wrong-name"]
    assert codes(own, authority=other / "ca.crt") == ["wrong-authority"]
    assert codes(own, key=other / "server.key") == ["wrong-key"]
    assert codes(own, name="x", key=other / "server.key", authority=other / "ca.crt") == [
        "wrong-name",
        "wrong-authority",
        "wrong-key",
    ]


def test_an_expired_and_a_not_yet_valid_certificate_are_refused_and_told_apart(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    kit(old, now=NOW - 10 * DAY, days=5)
    kit(new)
    kit(new, nodes=None, now=NOW + 10 * DAY, renew=True)
    with tls_server(old) as port:
        assert refusal(port, old / "ca.crt") == 10
    with tls_server(new) as port:
        assert refusal(port, new / "ca.crt") == 9
    assert codes(old) == ["expired"]
    assert codes(new) == ["not-yet-valid"]
    (found,) = inspect_certificate(new / "server.crt", NOW)
    assert "clock" in found.mend and f"{NOW:%Y-%m-%d %H:%M} UTC" in found.text


def test_an_authority_that_ended_is_found_on_the_authority_not_on_the_server(tmp_path):
    kit(tmp_path, now=NOW - 3600 * DAY, days=3649)
    long_ended = NOW + 51 * DAY
    assert [
        f.text.partition(" ")[0]
        for f in inspect_certificate(tmp_path / "server.crt", long_ended, authority=tmp_path / "ca.crt")
    ] == [str(tmp_path / "server.crt"), str(tmp_path / "ca.crt")]


def test_a_new_certificate_is_good_for_a_peer_whose_clock_lags_and_an_ageing_one_is_named_early(tmp_path):
    kit(tmp_path, days=100)
    assert codes(tmp_path, now=NOW - timedelta(minutes=50)) == []
    assert codes(tmp_path, now=NOW + 69 * DAY) == []
    assert codes(tmp_path, now=NOW + 71 * DAY) == ["ends-soon"]
    (found,) = inspect_certificate(tmp_path / "server.crt", NOW + 71 * DAY)
    assert not found.fatal and "--renew" in found.mend


@pytest.mark.parametrize("damage", ["gone", "no PEM", "torn"])
@pytest.mark.parametrize("file", ["server.crt", "ca.crt", "server.key"])
def test_a_file_that_cannot_be_read_is_a_finding_not_an_exception(tmp_path, file, damage):
    kit(tmp_path)
    path = tmp_path / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"no PEM" if damage == "no PEM" else path.read_bytes()[:80])
    assert codes(tmp_path) == ["unreadable"]


def test_a_bundle_of_two_authorities_accepts_both_kits_while_nodes_move_over(tmp_path):
    for name in ("one", "two"):
        kit(tmp_path / name)
    bundle = tmp_path / "bundle.crt"
    bundle.write_bytes((tmp_path / "one/ca.crt").read_bytes() + (tmp_path / "two/ca.crt").read_bytes())
    for name in ("one", "two"):
        assert codes(tmp_path / name, authority=bundle) == []
        with tls_server(tmp_path / name) as port:
            assert refusal(port, bundle) == 0


def test_grpc_accepts_the_certificate(tmp_path):
    import grpc

    kit(tmp_path)
    authority, certificate, key = (
        (tmp_path / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")
    )
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(authority)) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
    finally:
        server.stop(0)


def test_flowers_own_loaders_accept_keys_register_list_and_secret(tmp_path):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.auth.superexec_secret import load_superexec_auth_secret
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_public_key,
        sign_message,
        uses_nist_ec_curve,
        verify_signature,
    )
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    kit(tmp_path)
    listed = nodes_to_register(tmp_path / "nodes.json")
    assert list(listed) == ["node-1", "node-2"]
    for name, pem in listed.items():
        arguments = argparse.Namespace(
            auth_supernode_private_key=str(tmp_path / f"{name}.key"), auth_supernode_public_key=None
        )
        pair = _try_setup_client_authentication(arguments)
        assert pair is not None
        assert pem == try_load_public_key(tmp_path / f"{name}.pub")
        key = bytes_to_public_key(pem)
        assert uses_nist_ec_curve(key) and key.curve.name == "secp384r1"
        assert verify_signature(key, b"now", sign_message(pair[0], b"now"))
    secret = load_superexec_auth_secret(str(tmp_path / "superexec.secret"))
    assert secret is not None and len(bytes.fromhex(secret.decode())) == 32 and not secret.endswith(b"\n")


def test_flowers_own_client_accepts_the_root_certificate(tmp_path):
    from flwr.supercore.protobuf.client import ProtobufClient

    kit(tmp_path)
    client = ProtobufClient.from_server_address(
        "localhost:1", insecure=False, root_certificates=(tmp_path / "ca.crt").read_bytes(), interceptors=[]
    )
    client.close()


def test_a_second_run_keeps_every_byte_and_adds_what_is_missing(tmp_path):
    kit(tmp_path)
    before = contents(tmp_path)
    again = kit(tmp_path)
    assert contents(tmp_path) == before and again.made == frozenset()
    (tmp_path / "superexec.secret").unlink()
    (tmp_path / "node-2.pub").unlink()
    grown = kit(tmp_path, nodes=3)
    after = contents(tmp_path)
    assert grown.made == {"superexec.secret", "node-2.pub", "node-3.key", "node-3.pub", "nodes.json"}
    assert {name: after[name] for name in before.keys() - grown.made} == {
        name: before[name] for name in before.keys() - grown.made
    }
    assert after["node-2.pub"] == before["node-2.pub"]
    assert list(nodes_to_register(tmp_path / "nodes.json")) == ["node-1", "node-2", "node-3"]


@pytest.mark.parametrize("crash_after", range(1, 12))
def test_a_run_killed_after_any_file_is_completed_by_the_next(tmp_path, crash_after, monkeypatch):
    written = []
    real = node_keys.fsync

    def dies(path: Path) -> None:
        real(path)
        written.append(path)
        if len(written) == crash_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(node_keys, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        kit(tmp_path)
    monkeypatch.undo()
    before = contents(tmp_path)
    whole = kit(tmp_path)
    after = contents(tmp_path)
    assert whole.findings == () and whole.nodes == ("node-1", "node-2")
    assert {name: after[name] for name in before} == before


def test_public_keys_that_lie_there_count_as_nodes_and_no_private_key_is_made_for_them(tmp_path):
    provision_node(tmp_path / "far", "hospital-a")
    (tmp_path / "kit").mkdir()
    shutil.copy(tmp_path / "far/hospital-a.pub", tmp_path / "kit")
    made = kit(tmp_path / "kit", nodes=3)
    assert made.nodes == ("hospital-a", "node-1", "node-2")
    assert not (tmp_path / "kit/hospital-a.key").exists()
    line = public_line(tmp_path / "far/hospital-a.pub")
    (listed, *_) = json.loads((tmp_path / "kit/nodes.json").read_text())["nodes"]
    assert listed == {"name": "hospital-a", "public_key": line, "fingerprint": fingerprint(line)}


def test_a_key_handed_out_and_removed_here_stays_registered(tmp_path):
    kit(tmp_path)
    text = (tmp_path / "nodes.json").read_text()
    (tmp_path / "node-1.key").unlink()
    assert kit(tmp_path).made == frozenset()
    assert (tmp_path / "nodes.json").read_text() == text and not (tmp_path / "node-1.key").exists()


def test_a_node_that_was_taken_out_is_said_to_be_registered_still(tmp_path):
    kit(tmp_path, nodes=3)
    (tmp_path / "node-3.key").unlink()
    (tmp_path / "node-3.pub").unlink()
    (note,) = kit(tmp_path, nodes=2).notes
    assert "node-3" in note and "unregister" in note


def test_a_node_makes_its_own_pair_beside_its_other_files_and_never_anew(tmp_path):
    (tmp_path / "node.yaml").write_text("client: hospital-a\n")
    assert provision_node(tmp_path, "hospital-a") == ("hospital-a.key", "hospital-a.pub")
    before = contents(tmp_path)
    assert provision_node(tmp_path, "hospital-a") == ()
    assert contents(tmp_path) == before
    (tmp_path / "hospital-a.key").unlink()
    with pytest.raises(ConfigError, match=r"without hospital-a\.key"):
        provision_node(tmp_path, "hospital-a")


def test_renewal_keeps_authority_key_and_names_and_sets_the_old_certificate_aside(tmp_path):
    kit(tmp_path, server_names=["fed.example.org"], days=40)
    before = contents(tmp_path)
    renewed = kit(tmp_path, nodes=None, now=NOW + 20 * DAY, server_names=["10.1.2.3"], renew=True)
    after = contents(tmp_path)
    (aside,) = after.keys() - before.keys()
    assert after[aside] == before["server.crt"] != after["server.crt"]
    assert renewed.made == {"server.crt", aside}
    assert all(after[name] == before[name] for name in before.keys() - {"server.crt"})
    assert renewed.server_names == (
        "localhost",
        "127.0.0.1",
        "superlink",
        "proxy",
        "fed.example.org",
        "10.1.2.3",
    )
    assert renewed.ends["server.crt"] == NOW.replace(microsecond=0) + 385 * DAY
    assert codes(tmp_path, now=NOW + 300 * DAY) == []


def test_a_renewal_that_the_authority_would_not_outlive_is_refused_and_says_what_to_do(tmp_path):
    kit(tmp_path)
    before = contents(tmp_path)
    late = NOW + 3500 * DAY
    with pytest.raises(ConfigError, match=r"--days 149 or less, or move ca\.crt out"):
        kit(tmp_path, nodes=None, now=late, renew=True)
    with pytest.raises(ConfigError, match=r"asked for; move ca.crt out"):
        kit(tmp_path, nodes=None, now=NOW + 3640 * DAY, renew=True)
    assert contents(tmp_path) == before
    assert kit(tmp_path, nodes=None, now=late, days=149, renew=True).findings == ()


def test_a_new_authority_on_the_same_key_serves_nodes_that_have_the_old_one_and_those_that_have_the_new(
    tmp_path,
):
    kit(tmp_path, now=NOW - 3500 * DAY)
    old = tmp_path.with_name(f"{tmp_path.name}-old-ca.crt")
    (tmp_path / "ca.crt").rename(old)
    moved = kit(tmp_path, nodes=None, renew=True)
    assert moved.findings == () and {"ca.crt", "server.crt"} <= moved.made
    with tls_server(tmp_path) as port:
        assert refusal(port, old) == 0
        assert refusal(port, tmp_path / "ca.crt") == 0


def test_the_authoritys_key_may_be_kept_elsewhere_until_something_is_to_be_signed(tmp_path):
    kit(tmp_path)
    (tmp_path / "ca.key").unlink()
    assert kit(tmp_path, nodes=3).nodes == ("node-1", "node-2", "node-3")
    with pytest.raises(ConfigError, match=r"ca.key is not there.*bring it back"):
        kit(tmp_path, nodes=None, renew=True)
    (tmp_path / "server.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca.key is not there.*bring it back"):
        kit(tmp_path)


def test_what_does_not_belong_together_is_refused_with_the_next_move(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for name in (own, other):
        kit(name)

    def refused(match: str, *changes: tuple[str, str | None], **options) -> None:
        directory = tmp_path / "changed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(own, directory)
        for file, source in changes:
            if source is None:
                (directory / file).unlink()
            else:
                shutil.copy(other / source, directory / file)
        before = contents(directory)
        with pytest.raises(ConfigError, match=match):
            kit(directory, **options)
        assert {name: contents(directory)[name] for name in before} == before

    refused("put back the two", ("ca.key", "ca.key"))
    refused("neither ca.crt nor ca.key; bring them back", ("ca.key", None), ("ca.crt", None))
    refused("without server.key; bring the key back", ("server.key", None))
    refused("is not for the key in .*server.key; put back", ("server.key", "server.key"))
    refused("was issued by .*; copy ca.crt", ("server.crt", "server.crt"), ("server.key", "server.key"))
    refused("is not the public key of .*; remove node-1.pub", ("node-1.pub", "node-2.pub"))
    refused(
        "node-1.pub and node-2.pub are the same key",
        ("node-1.key", None),
        ("node-1.pub", "node-1.pub"),
        ("node-2.key", None),
        ("node-2.pub", "node-1.pub"),
    )
    refused("is not for x.example.org; add --renew", server_names=["x.example.org"])
    refused("ended on .*--renew", now=NOW + 400 * DAY)


def test_a_directory_with_anything_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"no part of a kit \(thesis.tex\); name a new or empty directory"):
        kit(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"x"}
    with pytest.raises(ConfigError, match="File exists"):
        kit(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"nodes": 0}, "at least 1 node"),
        ({"nodes": None}, "say how many"),
        ({"days": 0}, "--days: 0; give 1 to 3650"),
        ({"days": 3651}, "--days: 3651; give 1 to 3650"),
        ({"renew": True}, "nothing to renew"),
        ({"server_names": ["https://a.b"]}, "neither a host name nor an IP"),
        ({"server_names": ["a.b:8000"]}, "neither a host name nor an IP"),
        ({"server_names": ["300.1.1.1"]}, "neither a host name nor an IP"),
        ({"server_names": [""]}, "neither a host name nor an IP"),
        ({"server_names": ["*.example.org"]}, "neither a host name nor an IP"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        kit(tmp_path / "kit", **options)
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("name", ["", "..", "../x", "a b", "é", "x" * 97, "ca", "Server", ".hidden"])
def test_a_node_is_named_as_a_config_would_have_it_and_not_as_a_file_of_the_kit(tmp_path, name):
    with pytest.raises(ConfigError, match="node: "):
        provision_node(tmp_path / "kit", name)
    assert not (tmp_path / "kit").exists()


def test_keys_that_flower_does_not_read_are_refused(tmp_path):
    key, curve = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH)
    other_form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    line = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "a.key").write_bytes(key.private_bytes(*form, serialization.NoEncryption()))
    (tmp_path / "b.pub").write_bytes(key.public_key().public_bytes(*line))
    (tmp_path / "c.key").write_bytes(curve.private_bytes(*other_form, serialization.NoEncryption()))
    (tmp_path / "d.pub").write_bytes(b"ecdsa-sha2-nistp384 torn")
    for name, match in {
        "a": "not an EC key",
        "b": "not an EC key",
        "c": "no OpenSSH private key",
        "d": "no OpenSSH public",
    }.items():
        with pytest.raises(ConfigError, match=match):
            complete_pair(tmp_path, name)
    (tmp_path / "e.key").write_bytes(curve.private_bytes(*form, serialization.NoEncryption()))
    assert complete_pair(tmp_path, "e") == ("e.pub",)  # P-256 is a NIST curve: an owner's own choice


def test_a_key_that_everybody_can_read_is_told(tmp_path):
    kit(tmp_path)
    (tmp_path / "node-1.key").chmod(0o644)
    (note,) = kit(tmp_path).notes
    assert "node-1.key" in note and "chmod 600" in note


def test_two_runs_at_once_do_not_mix(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process"):
            kit(tmp_path)
    finally:
        os.close(descriptor)
    assert kit(tmp_path).nodes == ("node-1", "node-2")


def test_only_an_authority_vouches_even_if_the_signature_would_hold(tmp_path):
    kit(tmp_path)
    pretender = tmp_path.with_name(f"{tmp_path.name}-leaf.crt")
    pretender.write_bytes((tmp_path / "server.crt").read_bytes())
    assert codes(tmp_path, authority=pretender) == ["wrong-authority"]
    stranger = tmp_path.with_name(f"{tmp_path.name}-stranger.crt")
    stranger.write_bytes(certificate_pem(authority_certificate(new_key(), NOW)))
    assert codes(tmp_path, authority=stranger) == ["wrong-authority"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fedlora-nodes", "version": 2, "nodes": []}'])
def test_a_list_of_nodes_in_another_form_is_refused(tmp_path, text):
    (tmp_path / "nodes.json").write_text(text)
    with pytest.raises(ConfigError, match=r"nodes.json"):
        nodes_to_register(tmp_path / "nodes.json")
