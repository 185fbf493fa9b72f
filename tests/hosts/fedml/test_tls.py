"""The three files of a process under TLS: what is said of those that are not right."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.run.facts import facts_of
from fedsq_plugin.settings.config import Config, parse
from fedsq_plugin.settings.idle import unused
from fedsq_plugin.wire import certificates
from fedsq_plugin.wire.tls import credentials

from .credentials import NEEDED, config

pytestmark = pytest.mark.skipif(
    find_spec("cryptography") is None, reason="needs cryptography: pip install -e '.[grpc]'"
)


def test_every_rank_reads_its_own_files(ours: Path) -> None:
    read = [credentials(config(ours), rank) for rank in range(3)]
    assert [one and one.key for one in read] == [(ours / f"rank-{rank}-key.pem").read_bytes() for rank in range(3)]


def test_no_keys_no_tls() -> None:
    assert credentials(Config(**NEEDED), 0) is None


@pytest.mark.parametrize("key", certificates.OPTIONS)
def test_a_file_that_cannot_be_read_is_named(key: str, ours: Path, tmp_path: Path) -> None:
    missing, folder = str(tmp_path / "none-{rank}.pem"), str(tmp_path)
    for path, reason in ((missing, "No such file or directory"), (folder, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            credentials(config(ours, **{key: path}), 1)
        shown = path.replace("{rank}", "1")
        assert str(caught.value) == f"fedsq_args.{key} {shown} cannot be read: {reason}"


@pytest.mark.parametrize("key", certificates.OPTIONS)
@pytest.mark.parametrize("content", [b"", b"no PEM\n", b"\xff\xfe\x00", "its half"])
def test_a_broken_file_is_named(key: str, content: Any, ours: Path, tmp_path: Path) -> None:
    if content == "its half":
        content = (ours / certificates.OPTIONS[key].replace("{rank}", "1")).read_bytes()[:120]
    path = tmp_path / "broken.pem"
    path.write_bytes(content)
    what = "private key in PEM without a password" if key == "tls_key" else "certificate in PEM"
    with pytest.raises(ConfigError) as caught:
        credentials(config(ours, **{key: str(path)}), 1)
    assert str(caught.value) == f"fedsq_args.{key} {path} is no {what}"


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(ours: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key((ours / "rank-1-key.pem").read_bytes(), None)
    secret = form.BestAvailableEncryption(b"secret")
    path = tmp_path / "secret.pem"
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, secret))
    with pytest.raises(ConfigError, match=r"tls_key .*secret.pem is no private key in PEM without a password"):
        credentials(config(ours, tls_key=str(path)), 1)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tls_key": "{ours}/rank-2-key.pem"}, "fedsq_args.tls_key {ours}/rank-2-key.pem is not the key of "),
        ({"tls_ca": "{others}/ca.pem"}, "fedsq_args.tls_cert {ours}/rank-1.pem is refused under tls_ca {others}"),
        (
            {"tls_cert": "{ours}/rank-2.pem", "tls_key": "{ours}/rank-2-key.pem"},
            "fedsq_args.tls_cert {ours}/rank-2.pem is not issued for rank 1: it needs the DNS name rank-1, "
            "and has rank-2",
        ),
        (
            dict.fromkeys(("tls_cert", "tls_ca"), "{ours}/ca.pem"),
            "fedsq_args.tls_key {ours}/rank-1-key.pem is not the key of tls_cert {ours}/ca.pem",
        ),
    ],
)
def test_files_that_do_not_go_together(changes: Any, line: str, ours: Path, others: Path) -> None:
    def filled(text: str) -> str:
        return text.replace("{ours}", str(ours)).replace("{others}", str(others))

    with pytest.raises(ConfigError) as caught:
        credentials(config(ours, **{key: filled(path) for key, path in changes.items()}), 1)
    assert str(caught.value).startswith(filled(line)) and "\n" not in str(caught.value)


def test_an_expired_certificate_is_refused(expired: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        credentials(config(expired), 1)
    assert str(caught.value) == (
        f"fedsq_args.tls_cert {expired}/rank-1.pem is refused under tls_ca {expired}/ca.pem: certificate has expired"
    )


def test_all_three_or_none() -> None:
    _, found = parse({**NEEDED, "backend": "GRPC", "tls_cert": "a", "tls_key": "b"})
    assert [str(one) for one in found] == ["tls_cert, tls_key and tls_ca go together: tls_ca is missing"]


def test_tls_on_a_road_without_it_is_an_error_and_not_believed() -> None:
    paths = dict.fromkeys(certificates.OPTIONS, "a")
    _, found = parse({**NEEDED, "backend": "MPI", **paths})
    assert [str(one) for one in found] == ["tls_cert is given, but only backend GRPC has TLS, and backend is MPI"]
    one_process = {**NEEDED, "backend": "sp", **paths}
    assert parse(one_process)[1] == []
    assert "fedsq_args.tls_cert has no effect: backend sp is one process" in unused(one_process, facts_of(one_process))


def test_tls_asks_for_our_rows_where_fedml_has_its_own(fedml: Any) -> None:
    from fedsq_plugin.hosts.fedml.choice import is_ours

    def args(name: str, **options: str) -> Any:
        return SimpleNamespace(
            federated_optimizer=name, training_type="cross_silo", backend="GRPC", dataset="digits", **options
        )

    assert not is_ours(args("FedAvg"), custom=False)
    assert is_ours(args("FedAvg", tls_cert="a"), custom=False)
    with pytest.raises(ConfigError, match=r"FedML's own FedOpt has no TLS \(fedsq_args.tls_cert\); "):
        is_ours(args("FedOpt", tls_cert="a"), custom=False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl: apt-get install openssl")
def test_certificates_by_the_readmes_openssl_commands(tmp_path: Path) -> None:
    """Every silo keeps its key; the authority signs a request."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    script = text.partition("<!-- openssl -->\n```sh\n")[2].partition("```")[0]
    assert script
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert credentials(config(tmp_path), 1) is not None
