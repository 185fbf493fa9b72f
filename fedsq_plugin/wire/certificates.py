"""Makes an authority and one certificate per rank, for mutual TLS over GRPC.

Needs the package `cryptography`, of the extra `grpc`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .tls import name_of

OPTIONS = {"tls_cert": "rank-{rank}.pem", "tls_key": "rank-{rank}-key.pem", "tls_ca": "ca.pem"}
"""Names of the files in their folder, by the option that has their path."""
EARLIER = timedelta(hours=1)
"""The certificates are valid from so long ago, because the clocks of machines differ."""


def write(folder: Path, clients: int, days: int) -> None:
    """Write the files of `OPTIONS` for the server, rank 0, and so many clients, into a new folder that only this user
    can read.

    The authority's private key is not saved, so nobody can issue another certificate for this run.

    Args:
        days: how long the certificates are valid.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written; `cryptography` is missing.
    """
    files = _make_files(clients, days)
    try:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(f"folder {folder} exists and is not an empty folder; name a new one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, pem in files.items():
                with open(os.open(beside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(pem)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be written: {error.strerror}; name another one") from None


def _make_files(clients: int, days: int) -> dict[str, bytes]:
    """The files' content, PEM, by their name."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise ConfigError(
            "making certificates needs the package cryptography: pip install 'fedsq-plugin[grpc]'"
        ) from None
    pem, now = serialization.Encoding.PEM, datetime.now(timezone.utc)

    def named(name: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    authority, ca = ec.generate_private_key(ec.SECP256R1()), named("fedsq-plugin authority")

    def issued(name: Any, key: Any, *critical: Any, also: tuple[Any, ...] = ()) -> bytes:
        ids = (
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
        )
        builder = x509.CertificateBuilder(ca, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - EARLIER).not_valid_after(now + timedelta(days=days))
        for extension in (*critical, *ids, *also):
            builder = builder.add_extension(extension, critical=extension in critical)
        signed: bytes = builder.sign(authority, hashes.SHA256()).public_bytes(pem)
        return signed

    unused = ("content_commitment", "data_encipherment", "encipher_only", "decipher_only")
    none = dict.fromkeys((*unused, "key_encipherment", "key_agreement", "digital_signature"), False)
    signs = x509.KeyUsage(**none, key_cert_sign=True, crl_sign=True)
    shows = x509.KeyUsage(**{**none, "digital_signature": True}, key_cert_sign=False, crl_sign=False)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    leaf, root = x509.BasicConstraints(False, None), x509.BasicConstraints(True, 0)
    files = {OPTIONS["tls_ca"]: issued(ca, authority, root, signs)}
    for rank in range(clients + 1):
        key, name = ec.generate_private_key(ec.SECP256R1()), name_of(rank)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files[OPTIONS["tls_cert"].format(rank=rank)] = issued(named(name), key, leaf, shows, also=(both, names))
        files[OPTIONS["tls_key"].format(rank=rank)] = private
    return files
