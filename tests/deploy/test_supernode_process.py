"""A SuperNode that has given up is gone, so that whoever keeps it going starts it again."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.deploy.processes import free_port


class Broken(BaseHTTPRequestHandler):
    """A SuperLink whose database is locked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.mark.fault("F54")
def test_a_supernode_that_meets_an_error_it_cannot_mend_ends_and_does_not_stay_idle(processes):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    places = ["--superlink", f"127.0.0.1:{server.server_port}", "--port", str(free_port())]
    command = ["python", "-m", "fedlora.deploy.supernode_process", "--insecure", *places]
    processes.start("supernode", *command, "--isolation", "process")
    try:
        assert processes.started["supernode"].wait(60) == 1
    finally:
        server.shutdown()
        server.server_close()
    assert "500" in processes.logs()


def test_its_command_line_is_flowers(processes):
    processes.start("supernode", "python", "-m", "fedlora.deploy.supernode_process", "--no-such-option")
    assert processes.started["supernode"].wait(60) == 2
    assert "--superlink" in processes.logs()
