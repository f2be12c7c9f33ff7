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

CODE = """
import sys
from pathlib import Path
from fedlora.errors import FedLoraError
from fedlora.export.push import push, require_pushable
try:
    require_pushable(sys.argv[2])
    print(push(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private"))
except FedLoraError as error:
    print(error)
    sys.exit(error.exit_status)
"""


class Hub(BaseHTTPRequestHandler):
    """Takes what a client says, and answers as the hub does."""

    public, refuses = False, False
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
    server.heard, server.public, server.refuses = [], False, False
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


@pytest.mark.parametrize("who", ["private", "public"])
def test_every_file_arrives_with_its_card_in_a_repository_of_the_visibility_asked_for(hub, adapter, who):
    hub.public = who == "public"
    done = pushed(hub, adapter, who)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/a/b"
    (made,) = map(json.loads, asked(hub, "/repos/create"))
    assert (made["name"], made["organization"]) == ("b", "a")
    assert made.get("private", made.get("visibility") == "private") is (who == "private")
    lines = [json.loads(line) for body in asked(hub, "/commit/") for line in body.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert files == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {token for _, path, token, _ in hub.heard if "commit" in path} == {"Bearer hf_secret"}


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
