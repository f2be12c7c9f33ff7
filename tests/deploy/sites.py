"""Flower's own SuperNode runtime API in this process, and an executor that attends to it."""

import datetime
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

# Before anything of flwr's: it sets what flwr reads once, when it is imported.
from fedlora.transport.flower_client import frame_content  # isort: skip
import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import Status
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from fedlora.deploy.executor import Stop, attend
from fedlora.deploy.supernode import SuperNode
from tests.deploy.processes import free_port

RUN, NODE = 7, 21


class Site:
    """Flower's own SuperNode runtime API on loopback, with messages put in by hand instead of by a SuperLink."""

    def __init__(self, secret: bytes | None = None, certificate: Path | None = None) -> None:
        self.port = free_port()
        self.secret = secret
        self.certificate = certificate
        self.start()

    def start(self) -> None:
        """A SuperNode with an empty memory, as after a restart."""
        objects = ObjectStoreFactory()
        states = NodeStateFactory(objectstore_factory=objects)
        self.state, self.objects = states.state(), objects.store()
        self.state.set_node_id(NODE)
        run = Run.create_empty(RUN)
        run.fab_hash = self.state.store_fab(Fab("", b"no zip, so installing it would raise", {}))
        self.state.store_run(run)
        context = Context(run_id=RUN, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
        self.state.set_run_series_context(run.series_id, context)
        app = create_app(state_factory=states, superexec_auth_secret=self.secret)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app, host="127.0.0.1", port=self.port, log_level="critical", ssl_certfile=self.certificate
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def send(self, frame: bytes, kind: str = "train") -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, NODE, 1
        _insert_message(Message(frame_content(frame), NODE, kind), self.state, self.objects)
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN)

    def send_half(self, frame: bytes) -> None:
        """As a SuperNode has it that lost its SuperLink while it received: the message is known, its parts are not."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, NODE, 1
        message = Message(frame_content(frame), NODE, "train")
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            self.state.store_message(message)
            self.objects.preregister(RUN, get_object_tree(message))
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN)

    def reply(self) -> Message:
        """What the SuperNode would now carry to the SuperLink, and no task is left unfinished."""
        until(lambda: all(task.status.status == Status.FINISHED for task in self.state.get_tasks()))
        (found,) = self.state.get_messages_legacy(is_reply=True)
        whole = found.metadata.message_id
        tree = iterate_object_tree(self.objects.get_object_tree(whole))
        contents = {part.object_id: self.objects.get(part.object_id) or b"" for part in tree}
        message = inflate_object_from_contents(whole, contents)
        assert isinstance(message, Message)
        return message

    def node(self, secret: bytes | None = None, tls: ssl.SSLContext | None = None) -> SuperNode:
        return SuperNode(address=f"127.0.0.1:{self.port}", secret=secret, tls=tls)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)


@contextmanager
def attending(app: Callable[[Message, Context], Message], node: SuperNode) -> Iterator[Stop]:
    stop = Stop()
    thread = threading.Thread(target=attend, args=(app, node, stop), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        stop.asked = True
        thread.join(10)
        assert not thread.is_alive(), "it does not stop"


def self_signed(path: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, path.name)])
    today = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, form, plain) + built.public_bytes(pem))
    return path
