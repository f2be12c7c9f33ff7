"""One of Flower's runtime APIs, a SuperNode's or a SuperLink's: where it is, and what either side must bring."""

import ssl
from dataclasses import dataclass

import httpx
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import (
    RuntimeVersionMetadata,
    get_runtime_version_incompatibility_exit_message,
)

from fedlora.errors import ConfigError

FLWR = "1.41.0"
"""The only flwr whose runtime API this room knows."""

CALL_S = 10.0
"""One call's time; Flower's own is 30 s, within which a stop could not be prompt."""


class UnwantedError(ConfigError):
    """The other end will not have us: another secret, certificate or flwr. No waiting mends that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The APIs of one process in `--isolation process`.

    Args:
        address: HOST:PORT.
        tls: what vouches for its certificate; None speaks plain HTTP, for a network that only the two share.
        secret: of its --superexec-auth-secret-file; None where it has none.
    """

    address: str
    tls: ssl.SSLContext | None = None
    secret: bytes | None = None

    @property
    def url(self) -> str:
        """Its base."""
        return f"{'http' if self.tls is None else 'https'}://{self.address}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """What httpx is to verify with."""
        return False if self.tls is None else self.tls

    def asking(self) -> list[ProtobufClientInterceptor]:
        """What goes with a call that asks for work: our version, and the secret where there is one."""
        interceptors: list[ProtobufClientInterceptor] = [SameVersion()]
        if self.secret is not None:
            only = {"/flwr.proto.Runtime/AcquireTask"}
            interceptors.append(
                SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=only)
            )
        return interceptors


class SameVersion:
    """Tells our version of flwr, and hears of one that the other end does not accept."""

    def __init__(self) -> None:
        self._words = dict(RuntimeVersionMetadata.from_local_component("SuperExec").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """See Flower's ProtobufClientInterceptor."""
        context.request.headers.update(self._words)
        response = call_next(context)
        if response.is_error and (words := get_runtime_version_incompatibility_exit_message(response.text)):
            raise UnwantedError(f"{' '.join(words.split())}; install flwr {FLWR} on both ends")
        return response


_MENDS = {  # OpenSSL's X509_V_ERR_...
    9: "compare the clocks of both machines",
    10: "renew it: fedlora provision DIR --renew",
    62: "use a name that it is for, or renew it with --server-name",
    64: "use an address that it is for, or renew it with --server-name",
}


def certificate_fault(error: BaseException | None) -> str | None:
    """What a handshake found wrong with the certificate, in any of the causes, and the mend; None if nothing."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            mend = _MENDS.get(error.verify_code, "give the CA that signed it as --root-certificates")
            return f"{error.verify_message}; {mend}"
        error = error.__cause__ or error.__context__
    return None
