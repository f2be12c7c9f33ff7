"""The hub's own client, pointed at a stand-in that listens on this machine: what arrives there, and what never does."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedlora.cli.export import _seen
from fedlora.export.push import Pushed

CODE = """
import sys
from pathlib import Path
from fedlora.errors import FedLoraError
from fedlora.export.push import push, require_pushable
try:
    require_pushable(sys.argv[2])
    there = push(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private")
    print(there.address, "private" if there.private else "public")
except FedLoraError as error:
    print(error)
    sys.exit(error.exit_status)
"""


class Hub(BaseHTTPRequestHandler):
    """Takes what a client says, and answers as the hub does."""

    public, refuses, holds = False, False, ()
    heard: list[tuple[str, str, str | None, bytes]]

    def _answer(self, words: object, status: int = 200) -> None:
        content = json.dumps(words).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self.server.heard.append(("GET", self.path, self.headers.get("Authorization"), b""))
        if "/tree/" in self.path:
            held = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.holds]
            self._answer(held)
            return
        siblings: list[object] = []
        self._answer({"id": "a/b", "private": not self.server.public, "siblings": siblings, "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self._body()
        self.server.heard.append(("POST", self.path, self.headers.get("Authorization"), body))
        if self.server.refuses:
            self._answer({"error": "you may not write here"}, 403)
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"http://{self.headers['Host']}/a/b"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            address = f"http://{self.headers['Host']}/a/b/commit/1"
            self._answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.heard, server.public, server.refuses, server.holds = [], False, False, ()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def adapter(tmp_path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlibrary_name: peft\n---\nPrivacy: epsilon 8\n")
    (directory / "adapter_model.safetensors").write_bytes(bytes(range(64)))
    return directory


def pushed(hub, adapter: Path, who: str = "private", name: str = "a/b", **environment: str):
    there = f"http://127.0.0.1:{hub.server_port}"
    own = {
        "HF_ENDPOINT": there,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(adapter.parent),
        "HF_TOKEN": "hf_secret",
    }
    return subprocess.run(
        [sys.executable, "-c", CODE, str(adapter), name, who],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **own, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def asked(hub, end: str) -> list[bytes]:
    return [body for _, path, _, body in hub.heard if end in path]


def committed(hub) -> list[tuple[str, dict[str, str]]]:
    """Of all commits, the lines that the hub acts by: what is done, and to what."""
    lines = [json.loads(line) for body in asked(hub, "/commit/") for line in body.splitlines()]
    return [(line["key"], line["value"]) for line in lines]


@pytest.mark.parametrize("who", ["private", "public"])
def test_every_file_arrives_with_its_card_in_a_repository_of_the_visibility_asked_for(hub, adapter, who):
    hub.public = who == "public"
    done = pushed(hub, adapter, who)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/a/b {who}"
    (made,) = map(json.loads, asked(hub, "/repos/create"))
    assert (made["name"], made["organization"]) == ("b", "a")
    assert made.get("private", made.get("visibility") == "private") is (who == "private")
    files = {
        value["path"]: base64.b64decode(value["content"]) for key, value in committed(hub) if key == "file"
    }
    assert files == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {token for _, path, token, _ in hub.heard if "commit" in path} == {"Bearer hf_secret"}


def test_what_an_older_push_left_is_gone(hub, adapter):
    """Beside a merged model, an older adapter would be loaded onto it."""
    hub.holds = (".gitattributes", "README.md", "adapter_config.json", "old/model.safetensors")
    done = pushed(hub, adapter)
    assert done.returncode == 0, done.stdout + done.stderr
    gone = [value["path"] for key, value in committed(hub) if key == "deletedFile"]
    assert sorted(gone) == ["adapter_config.json", "old/model.safetensors"]


def test_the_visibility_that_is_told_is_the_repositorys_own(hub, adapter):
    done = pushed(hub, adapter, "public")  # where a private one is
    assert done.returncode == 0 and done.stdout.strip().endswith("/a/b private")
    said = _seen(Pushed(address="http://hub/a/b", private=True), private=False)
    assert said == "which stays private; make it public at http://hub/a/b/settings"
    assert _seen(Pushed(address="http://hub/a/b", private=True), private=True) == "private"
    assert _seen(Pushed(address="http://hub/a/b", private=False), private=False) == "public"


def test_nothing_private_goes_where_everybody_looks(hub, adapter):
    hub.public = True
    done = pushed(hub, adapter)
    assert done.returncode == 2 and "a/b is there already and is public" in done.stdout
    assert not asked(hub, "/commit/")


def test_a_refusal_a_missing_token_and_a_missing_hub_are_one_message_each(hub, adapter):
    hub.refuses = True
    refused = pushed(hub, adapter)
    assert refused.returncode == 4 and "the hub refused a/b" in refused.stdout
    assert len(refused.stdout.splitlines()) == 1 and "Traceback" not in refused.stderr
    without = pushed(hub, adapter, HF_TOKEN="")
    assert without.returncode == 2 and "hf auth login" in without.stdout
    offline = pushed(hub, adapter, HF_HUB_OFFLINE="1")
    assert offline.returncode == 4 and "out of reach" in offline.stdout
    nameless = pushed(hub, adapter, name="b")
    assert nameless.returncode == 2 and "not OWNER/NAME" in nameless.stdout
