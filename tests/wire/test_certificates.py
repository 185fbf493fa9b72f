"""Certificates for a run under TLS: what is written, and who may read it."""

from __future__ import annotations

import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.wire import certificates

needed = pytest.mark.skipif(find_spec("cryptography") is None, reason="needs cryptography: pip install -e '.[grpc]'")


@needed
def test_one_pair_per_rank_and_no_key_of_the_authority(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "tls"
    certificates.write(folder, clients=2, days=1)
    names = {f"rank-{rank}{part}.pem" for rank in range(3) for part in ("", "-key")}
    assert {path.name for path in folder.iterdir()} == {"ca.pem", *names}
    assert [path.name for path in folder.parent.iterdir()] == ["tls"]
    keys = [path.name for path in folder.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(keys) == [f"rank-{rank}-key.pem" for rank in range(3)]


@needed
def test_only_the_user_may_read_them(tmp_path: Path) -> None:
    certificates.write(tmp_path / "tls", clients=1, days=1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tls").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


@needed
def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match=r"exists and is not an empty folder"):
        certificates.write(tmp_path, clients=1, days=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_the_package_one_line_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"needs the package cryptography: pip install 'fedsq-plugin\[grpc\]'"):
        certificates.write(tmp_path / "tls", clients=1, days=1)
    assert not list(tmp_path.iterdir())


@needed
def test_the_command_says_who_needs_which_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedsq_plugin.cli", "certificates", "tls", "--clients", "1", "--days", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "tls: ca.pem for everybody; rank-<k>.pem and rank-<k>-key.pem for rank <k> alone (0: the server); "
        "valid for 3 days\n"
    )
