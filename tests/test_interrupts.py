"""SIGTERM is a KeyboardInterrupt for as long as it is asked for, and only where one can be caught."""

import os
import signal
import threading

import pytest

from fedlora.interrupts import sigterm_as_ctrl_c


def test_sigterm_is_ctrl_c_within_and_what_it_was_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_nothing():
    seen = []

    def work() -> None:
        with sigterm_as_ctrl_c():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
