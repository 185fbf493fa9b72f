"""Mutual TLS between the processes of a run: the certificate of rank k has the DNS name `rank-<k>`.

Every process accepts connections and opens some, so each needs a certificate, and both ends of a connection check the
other's. TLS with a certificate on one side only is not offered: it would need as many files.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..federation.options import Options, option


def _one_process(backend: str) -> str | None:
    return "backend sp is one process" if backend == "sp" else None


class TlsOptions(Options):
    """The files of a process, for mutual TLS."""

    tls_cert: str | None = option(
        None,
        "fedsq_args",
        "certificate of this process, PEM, for mutual TLS over GRPC; in its path, {rank} is the rank",
        may_change=True,
        idle=_one_process,
    )
    tls_key: str | None = option(
        None,
        "fedsq_args",
        "its private key, PEM without a password; {rank} likewise",
        may_change=True,
        idle=_one_process,
    )
    tls_ca: str | None = option(
        None,
        "fedsq_args",
        "certificate of the authority that issued all ranks' certificates, PEM",
        may_change=True,
        idle=_one_process,
    )


@dataclass(frozen=True)
class Credentials:
    """The files of one process, each as PEM."""

    certificate: bytes
    """Shown to other processes."""
    key: bytes
    authority: bytes
    """Must have issued the certificates of the other processes."""


def name_of(rank: int) -> str:
    """The DNS name in a rank's certificate. It is not the name of a machine: the address of a process may change."""
    return f"rank-{rank}"


def credentials(options: TlsOptions, rank: int) -> Credentials | None:
    """Read the files of a process and try them in a handshake; None where the recipe has no TLS.

    Raises:
        ConfigError: a file is missing, damaged, expired, or another rank's. The message names the option.
    """
    if not (options.tls_cert and options.tls_key and options.tls_ca):
        return None
    paths = {key: getattr(options, key).replace("{rank}", str(rank)) for key in ("tls_cert", "tls_key", "tls_ca")}
    read = {key: _read(key, path) for key, path in paths.items()}
    cert, key, ca = (f"fedsq_args.{key} {path}" for key, path in paths.items())
    _make_context(ssl.PROTOCOL_TLS_CLIENT, read["tls_cert"], cert)  # refuses a file that is not PEM
    caller = _make_context(ssl.PROTOCOL_TLS_CLIENT, read["tls_ca"], ca)
    context = _make_context(ssl.PROTOCOL_TLS_SERVER, read["tls_ca"], ca)
    try:
        for side in (context, caller):
            side.load_cert_chain(
                paths["tls_cert"], paths["tls_key"], password=lambda: ""
            )  # asked for at the terminal otherwise
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key} is not the key of tls_cert {paths['tls_cert']}") from None
        raise ConfigError(f"{key} is no private key in PEM without a password") from None
    names = _handshake(context, caller, f"{cert} is refused under tls_ca {paths['tls_ca']}")
    if name_of(rank) not in names:
        raise ConfigError(
            f"{cert} is not issued for rank {rank}: it needs the DNS name {name_of(rank)}, "
            f"and has {', '.join(names) or 'none'}"
        )
    return Credentials(read["tls_cert"], read["tls_key"], read["tls_ca"])


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"fedsq_args.{key} {path} cannot be read: {reason}") from None


def _make_context(side: ssl._SSLMethod, pem: bytes, what: str) -> ssl.SSLContext:
    """A context that accepts the certificates which `pem` issued."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{what} is no certificate in PEM") from None
    return context


def _handshake(listener: ssl.SSLContext, caller: ssl.SSLContext, refused: str) -> list[str]:
    """Connect the process to itself, in memory: this checks its certificate in both roles. Returns its DNS names.

    `refused` begins the line where a side refuses the certificate.
    """
    to_listener, to_caller = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [caller.wrap_bio(to_caller, to_listener), listener.wrap_bio(to_listener, to_caller, server_side=True)]
    waiting = list(sides)
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            raise ConfigError(f"{refused}: {reason}") from None
    shown = sides[1].getpeercert() or {}
    return [str(entry[1]) for entry in shown.get("subjectAltName", ()) if entry[0] == "DNS"]
