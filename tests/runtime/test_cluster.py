"""Ray on this machine: started again when one of its processes did not come up, and why one would not."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError
from fedlora.runtime import cluster
from fedlora.runtime.cluster import connected

TWO = Runtime(kind="ray", workers=2)


class Failing:
    """Ray's own start, after a number of failures with what Ray raises when a process of it has died."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures, self.asked, self._start = failures, 0, ray.init

    def __call__(self, **settings: object) -> None:
        self.asked += 1
        if self.asked <= len(self.failures):
            raise self.failures[self.asked - 1]
        self._start(**settings)


def test_ray_is_started_again_when_its_head_or_its_raylet_did_not_come_up(tmp_path, monkeypatch):
    start = Failing([RuntimeError("Timed out waiting for file"), Exception("The current node timed out")])
    monkeypatch.setattr(cluster.ray, "init", start)
    with connected(TWO, "again", tmp_path):
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
    assert start.asked == 3 and not ray.is_initialized()


def test_what_came_up_of_a_start_that_failed_is_ended(tmp_path, monkeypatch):
    """Ray starts no second time in a process that is still connected to the first."""
    start, failures = ray.init, [RuntimeError("the last step failed")]

    def half(**settings: object) -> None:
        start(**settings)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(cluster.ray, "init", half)
    with connected(TWO, "half", tmp_path):
        assert ray.is_initialized() and not failures


def test_ray_that_never_comes_up_is_one_message_that_says_what_to_do(tmp_path, monkeypatch):
    start = Failing([RuntimeError("Timed out waiting for file")] * 99)
    monkeypatch.setattr(cluster.ray, "init", start)
    told = r"tried 3 times: Timed out .* set runtime\.kind to local"
    with pytest.raises(ConfigError, match=told), connected(TWO, "never", tmp_path):
        pass
    assert start.asked == cluster.STARTS


def test_ctrl_c_is_not_a_start_that_failed(tmp_path, monkeypatch):
    def interrupted(**settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.ray, "init", interrupted)
    with pytest.raises(KeyboardInterrupt), connected(TWO, "interrupted", tmp_path):
        pass


def test_a_process_that_is_forked_beside_live_grpc_is_alone():
    """With threads of gRPC begun again in it, it aborts at times: a child of Ray's then dies before its first word."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(30)
        child = os.fork()
        if child == 0:
            time.sleep(0.1)
            os._exit(len(list(Path("/proc/self/task").iterdir())))
        threads = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    server.stop(None)
    assert threads == 1
