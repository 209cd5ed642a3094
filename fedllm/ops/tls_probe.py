"""A TLS handshake with the server, as a site makes it, and what is wrong if it fails."""

import contextlib
import errno
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

from fedllm.crypto.certificates import CertificateFacts, read_certificates
from fedllm.files import read
from fedllm.values import address

# For gRPC's processes. It has no setting for the version, but one for the cipher suites of TLS 1.2: this one needs an
# RSA certificate, and as an authority of ours issues none, TLS 1.3 alone is left at both ends.
ONLY_TLS_1_3 = {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384"}
_PATIENCE = 5.0  # seconds
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # RFC 9113, 3.4: no settings
_AHEAD, _ENDED, _UNKNOWN, _OTHER_HOST = (9,), (10,), (2, 18, 19, 20, 21), (62, 64)  # OpenSSL: X509_V_ERR_*


class _NotBelieved(OSError):
    """The other end refused the certificate that it was shown."""


def probe_tls(host: str, port: int, ca: Path, at: str | None = None, own: tuple[Path, Path] | None = None) -> bytes:
    """Shake hands, TLS 1.3 and gRPC's protocol, believing the authorities in `ca` alone.

    `at` is another address at which `host` is to be found; `own` are the files of a certificate and its key, PEM, to
    show, and whether they are believed. Returns the other end's certificate, PEM; raises OSError, for
    `explain_failure`.
    """
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    if own is not None:
        context.load_cert_chain(*map(str, own))
    with (
        socket.create_connection((at or host, port), timeout=_PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        if secured.selected_alpn_protocol() != "h2":
            raise OSError("the other end speaks TLS, but not gRPC")
        shown = ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"").encode()
        if own is not None:  # in TLS 1.3 the server judges a certificate when the client believes all is said
            _be_believed(secured, read_certificates(read(own[0]))[0])
        return shown


def _be_believed(secured: ssl.SSLSocket, own: CertificateFacts) -> None:
    """Raise _NotBelieved if the server ends the connection instead of beginning; it says no reason."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        secured.sendall(_PREFACE)
        if secured.recv(1):
            return
    if own.ends < datetime.now(UTC):
        raise _NotBelieved(f"this site's certificate has ended on {own.ends:%Y-%m-%d %H:%M} UTC")
    raise _NotBelieved(
        f"the server does not accept this site's certificate, which ends on {own.ends:%Y-%m-%d}: it is of another "
        "authority, or the clock there is wrong"
    )


def explain_failure(host: str, port: int, error: OSError) -> str:
    """Return why `probe_tls` failed, and what to do about it."""
    there = address(host, port)
    if isinstance(error, _NotBelieved):
        return f"{error}. Install a new grant; at the server: fedllm server grant SITE"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(host, error)
    known: list[tuple[type[OSError], str]] = [
        (socket.gaierror, f"the name {host} is not known here (DNS). Check it: getent hosts {host}"),
        (
            ssl.SSLError,
            f"{there} does not speak TLS 1.3 as the server does. Check that no other program or proxy is there",
        ),
        (TimeoutError, f"{there} does not answer in {_PATIENCE:.0f} s. Check firewalls on the way: docs/firewall.md"),
        (
            ConnectionRefusedError,
            f"{there}: connection refused. Start the server there (fedllm server start) and check the port",
        ),
        (
            ConnectionError,
            f"{there} breaks off the connection. Check firewalls and proxies on the way: docs/firewall.md",
        ),
    ]
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return f"there is no way to {there} ({error.strerror}). Check network and routes: ip route get {host}"
    return next((text for kind, text in known if isinstance(error, kind)), f"{there}: {error}")


def _certificate(host: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _AHEAD:
        return "the server certificate is not valid yet: the clock here is behind. Set it: timedatectl set-ntp true"
    if error.verify_code in _ENDED:
        return (
            "the server certificate has ended, or the clock here is ahead. Compare: date. At the server: "
            "fedllm server rotate certificate"
        )
    if error.verify_code in _OTHER_HOST:
        return f"the server certificate is not good for {host}. At the server: fedllm server rotate certificate"
    if error.verify_code in _UNKNOWN:
        return (
            "the server certificate was not issued by the authority that the grant names: either a man in the "
            "middle, or a new authority. Call the server, and ask for a new grant (there: fedllm server grant SITE)"
        )
    return f"the server certificate is refused ({error.verify_message}). Ask the server: fedllm doctor"
