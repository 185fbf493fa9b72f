"""The road over GRPC: where a process listens, and under mutual TLS who may speak."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedsq_plugin import launch
from fedsq_plugin.errors import ConfigError, RunError
from fedsq_plugin.hosts.fedml.local import free_addresses
from fedsq_plugin.wire import certificates
from fedsq_plugin.wire.message import Failed
from fedsq_plugin.wire.tls import Credentials, credentials

from .credentials import config
from .several import rows
from .test_distributed import FEDSQ, LIMIT_S, ended, launched, recipe, start

pytestmark = pytest.mark.skipif(
    find_spec("cryptography") is None, reason="needs cryptography: pip install -e '.[grpc]'"
)
MIB = 2**20


class Network:
    """Transports of this test, on free ports of this machine; `heard` is what each rank was delivered."""

    def __init__(self, folder: Path, ranks: int = 3) -> None:
        self.table = folder / "table.csv"
        self.table.write_text(free_addresses(ranks))
        self.heard: dict[int, list[Any]] = {}
        self.open: list[Any] = []

    def join(self, rank: int, tls: Credentials | None, peers: Any = None, table: Path | None = None) -> Any:
        from fedsq_plugin.hosts.fedml.distributed.grpc_transport import GrpcTransport

        peers = ([0] if rank else [1, 2]) if peers is None else peers
        transport = GrpcTransport(str(table or self.table), rank, peers, MIB, tls)
        self.open.append(transport)
        self.heard[rank] = []
        threading.Thread(target=transport.receive, args=(self.hear,), daemon=True).start()
        return transport

    def hear(self, message: Any) -> None:
        self.heard[message.receiver].append((message.type, message.sender, message.reason))


@pytest.fixture
def network(fedml: Any, tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    yield made
    for transport in made.open:
        transport.stop()


def identity(folder: Path, rank: int) -> Credentials:
    found = credentials(config(folder), rank)
    assert found is not None
    return found


def say(transport: Any, sender: int, receiver: int, x: str = "", within: float = 10.0) -> None:
    transport.send_message(Failed(sender=sender, receiver=receiver, reason=x), within=within)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_both_ways_under_mutual_tls(network: Network, ours: Path) -> None:
    server, client = (network.join(rank, identity(ours, rank)) for rank in (0, 1))
    say(client, 1, 0, x="5")
    say(server, 0, 1, x="6")
    until(lambda: len(network.heard[0]) == len(network.heard[1]) == 1)
    assert network.heard == {0: [("failed", 1, "5")], 1: [("failed", 0, "6")]}
    assert client.show_life(0, within=5.0) and 1 in server.seen
    assert server.refused == client.refused == 0


@pytest.mark.parametrize("who", ["another authority", "no certificate", "plain text"])
def test_who_has_no_certificate_of_ours_cannot_get_in(who: str, network: Network, ours: Path, others: Path) -> None:
    """Though it believes the server; and the server goes on."""
    import grpc

    server = network.join(0, identity(ours, 0))
    stranger = network.join(2, None)
    address = stranger._addresses[0]
    believed, stolen = (ours / "ca.pem").read_bytes(), identity(others, 2)
    pair = (stolen.key, stolen.certificate) if who == "another authority" else ()
    if who != "plain text":
        name = [("grpc.ssl_target_name_override", "rank-0")]
        shown = grpc.ssl_channel_credentials(believed, *pair)
        stranger._channel = lambda receiver: grpc.secure_channel(address, shown, name)
    with pytest.raises(RunError, match=f"rank 2 cannot reach rank 0 at {address}: "):
        say(stranger, 2, 0, within=1.0)
    assert not stranger.show_life(0, within=1.0)
    say(network.join(1, identity(ours, 1)), 1, 0, x="7")
    until(lambda: bool(network.heard[0]))
    assert network.heard[0] == [("failed", 1, "7")] and set(server.seen) <= {1}


def test_a_tls_client_of_a_plain_server_ends_with_one_line(network: Network, ours: Path) -> None:
    server = network.join(0, None)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"rank 1 cannot reach rank 0 at 127.0.0.1:\d+: .*WRONG_VERSION") as caught:
        say(network.join(1, identity(ours, 1)), 1, 0, within=1.5)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10
    assert not network.heard[0] and not server.seen


def test_a_server_of_another_authority_is_not_believed(network: Network, ours: Path, others: Path) -> None:
    network.join(0, identity(others, 0))
    with pytest.raises(RunError, match="CERTIFICATE_VERIFY_FAILED"):
        say(network.join(1, identity(ours, 1)), 1, 0, within=1.5)
    assert not network.heard[0]


def test_a_client_that_listens_at_the_servers_address_is_not_believed(network: Network, ours: Path) -> None:
    """Its certificate is of the right authority, and names another rank."""
    network.join(0, identity(ours, 2))
    with pytest.raises(RunError, match="rank 1 cannot reach rank 0"):
        say(network.join(1, identity(ours, 1)), 1, 0, within=1.5)
    assert not network.heard[0]


def test_a_rank_cannot_speak_for_another(network: Network, ours: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, client = network.join(0, identity(ours, 0)), network.join(2, identity(ours, 2))
    with caplog.at_level(logging.WARNING):
        say(client, 1, 0)  # in the message alone
        until(lambda: server.refused == 1)
        client.rank = 1  # and in its envelope
        with pytest.raises(RunError, match="it says that it is rank 1, and its certificate is for rank-2"):
            say(client, 1, 0)
        assert not client.show_life(0, within=5.0)
    assert server.refused == 3 and 1 not in server.seen and not network.heard[0]
    other = "it says that it is rank 1, and its certificate is for rank-2"
    assert [line for line in caplog.messages if "was refused" in line] == [
        "a message was refused (1 so far): rank 2 sent it in the name of rank 1",
        f"a message was refused (2 so far): {other}",
        f"a message was refused (3 so far): {other}",
    ]


def test_a_client_gives_no_orders_to_another(network: Network, ours: Path) -> None:
    told, client = network.join(1, identity(ours, 1)), network.join(2, identity(ours, 2), peers=[0, 1])
    with pytest.raises(RunError, match="rank 2 has nothing to say to this process"):
        say(client, 2, 1)
    assert told.refused == 1 and not network.heard[1]


def reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("127.0.0.1", [True, False]),
        ("127.0.0.2", [False, True]),
        ("", [True, False]),
        ("localhost", [True, False]),
        ("0.0.0.0", [True, True]),
    ],
)
def test_it_listens_where_the_table_says_and_nowhere_else(
    named: str, found: list[bool], network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    header, row = network.table.read_text().splitlines()[:2]
    port = int(row.rpartition(",")[2])
    network.table.write_text(f"{header}\n0,0,{named},{port}\n")
    with caplog.at_level(logging.WARNING):
        network.join(0, None, peers=[])
    assert [reached(address, port) for address in ("127.0.0.1", "127.0.0.2")] == found
    warned = [line for line in caplog.messages if "without TLS" in line]
    assert warned == (
        [
            f"rank 0 listens on 0.0.0.0:{port} without TLS: whoever reaches that port can speak for any rank "
            "(fedsq_args.tls_cert, tls_key, tls_ca)"
        ]
        if named == "0.0.0.0"
        else []
    )


def test_an_address_of_another_machine_is_one_line(network: Network) -> None:
    network.table.write_text("eid,rank,grpc_server_ip,grpc_server_port\n0,0,192.0.2.1,47613\n")
    with pytest.raises(ConfigError, match=r"rank 0 cannot listen on 192.0.2.1:47613: "):
        network.join(0, None, peers=[])


def test_launch_under_tls_gives_the_figures_of_one_process(tmp_path: Path) -> None:
    families = recipe(tmp_path / "cache", comm_round=1)
    expected = rows(families, tmp_path / "sp.log")
    families["comm_args"]["backend"], families["common_args"]["training_type"] = "GRPC", "cross_silo"
    process, out = launched(tmp_path, families, "--clients", "2", "--tls")
    with ended(process):
        said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    metrics = pd.read_csv(out / "metrics.csv", float_precision="round_trip")
    found = dict(zip(metrics["split"], zip(metrics["loss"], metrics["accuracy"], strict=True), strict=True))
    assert list(found["test"]) == expected[0][1][:2]
    paths = yaml.safe_load((out / "config.yaml").read_text())["fedsq_args"]
    assert all(paths[key] and not Path(paths[key]).parent.exists() for key in certificates.OPTIONS)
    assert not [path for path in out.rglob("*") if b"PRIVATE KEY" in path.read_bytes()]


def test_launch_over_mpi_has_no_tls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        launch.launch(recipe(tmp_path, backend="MPI"), 1, tmp_path / "out", tls=True)
    assert str(caught.value) == "--tls is for backend GRPC, and this recipe's is MPI"
    assert not (tmp_path / "out").exists()


def test_launch_tries_out_every_ranks_files_first(tmp_path: Path, ours: Path) -> None:
    """Of three client processes, where there are certificates for two."""
    families = recipe(tmp_path, backend="GRPC", training_type="cross_silo")
    families["fedsq_args"].update({key: str(ours / name) for key, name in certificates.OPTIONS.items()})
    with pytest.raises(ConfigError, match=r"^fedsq_args.tls_cert .*/rank-3.pem cannot be read: No such file"):
        launch.launch(families, 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_silo_of_another_authority_and_a_server_that_ends_by_its_rules(
    python: Path, tmp_path: Path, ours: Path, others: Path
) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text(free_addresses(2))
    processes = []
    for rank, folder in ((0, ours), (1, others)):
        families = recipe(tmp_path, backend="GRPC", training_type="cross_silo", worker_num=1)
        families["comm_args"]["grpc_ipconfig_path"] = str(table)
        paths = {key: str(folder / name) for key, name in certificates.OPTIONS.items()}
        families["fedsq_args"].update(paths, round_timeout_s=5)
        path = tmp_path / f"{rank}.yaml"
        path.write_text(yaml.safe_dump(families))
        processes.append(start(python, *FEDSQ, "node", path, "--rank", str(rank), "--out", out))
    with ended(*processes):
        said = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 did not come within 5 s (fedsq_args.round_timeout_s)" in said[0]
    assert "fedsq: error: rank 1 cannot reach rank 0" in said[1]
    assert [text.count("\n") for text in said] == [1, 1], said
