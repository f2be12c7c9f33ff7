"""Is the Hugging Face hub within reach? Asked once before anything that would otherwise retry for minutes."""

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

ENDPOINT = "https://huggingface.co"


def hub_within_reach(timeout_s: float = 3.0) -> bool:
    """Whether the hub answered anything at all within `timeout_s`; False at once under HF_HUB_OFFLINE."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answered = threading.Event()
    # A thread, because looking up a name knows no time limit and may hang where nothing is resolved.
    asking = threading.Thread(target=_ask, args=(answered, timeout_s), daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answered.is_set()


@contextmanager
def offline_if(unreachable: bool) -> Iterator[None]:
    """The hub's library answers from its cache at once, instead of asking five times over half a minute.

    It read its switch from the environment when it was imported; so here the switch itself is set.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or unreachable
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _ask(answered: threading.Event, timeout_s: float) -> None:
    try:  # S310 fears schemes other than https; whoever sets HF_ENDPOINT is the person who runs this
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", ENDPOINT), method="HEAD")  # noqa: S310
        urllib.request.urlopen(request, timeout=timeout_s).close()  # noqa: S310
    except urllib.error.HTTPError:
        pass  # an answer, if an unfriendly one
    except urllib.error.URLError as error:
        # A certificate that only the library's own store knows is an answer too.
        if not isinstance(error.reason, ssl.SSLError):
            return
    except (OSError, ValueError):
        return
    answered.set()
