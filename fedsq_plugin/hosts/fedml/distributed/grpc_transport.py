"""Messages over FedML's GRPC service, which needs the extra `grpc`."""

from __future__ import annotations

import ipaddress
import logging
import os
import queue
import secrets
import socket
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# grpc would print the end of every connection to the terminal.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
from fedml.core.distributed.communication.grpc import grpc_comm_manager_pb2, grpc_comm_manager_pb2_grpc

from ....errors import ConfigError, RunError
from ....wire.tls import Credentials, name_of
from .addresses import addresses
from .transport import SEND_S, Transport

log = logging.getLogger(__name__)

RETRY_S = 0.5
"""Seconds until a message is sent anew."""
SLOWEST = 250_000
"""Bytes a second that a connection has at least: 2 Mbit/s."""


class _Servicer(grpc_comm_manager_pb2_grpc.gRPCCommManagerServicer):  # type: ignore[misc]
    """An empty message is a sign of life. It is noted on arrival: it must count, and not pile up, while the
    process is busy with something else.

    With TLS a rank is who its certificate says; without, whoever it says it is.
    """

    def __init__(
        self, seen: dict[int, float], peers: Collection[int], tls: bool, refuse: Callable[[str], None]
    ) -> None:
        self._seen, self._peers, self._tls, self._refuse = seen, peers, tls, refuse
        self._process = secrets.token_bytes(8)
        self.arrived: queue.Queue[tuple[int, bytes]] = queue.Queue(maxsize=4 * len(peers))

    def sendMessage(self, request: Any, context: Any) -> Any:
        rank = int(request.client_id)
        if (reason := self._no_peer(rank, context)) is not None:
            self._refuse(reason)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
        if not request.message:
            self._seen[rank] = time.monotonic()
            return grpc_comm_manager_pb2.CommResponse(message=self._process)
        try:
            self.arrived.put((rank, request.message), timeout=SEND_S)
        except queue.Full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many messages are waiting")
        return grpc_comm_manager_pb2.CommResponse(message=self._process)

    def _no_peer(self, rank: int, context: Any) -> str | None:
        if self._tls:
            shown = context.auth_context().get("x509_subject_alternative_name", ())
            names = [name.decode(errors="replace") for name in shown]
            if name_of(rank) not in names:
                its = ", ".join(names) or "none"
                return f"it says that it is rank {rank}, and its certificate is for {its}"
        return None if rank in self._peers else f"rank {rank} has nothing to say to this process"


class GrpcTransport(Transport):
    """FedML's GRPC service, listening on the address that FedML's table of addresses names.

    Args:
        table: a CSV file, see `addresses`.
        peers: the ranks that this process talks to.
        tls: what this process shows to its peers, and whom it believes; None: anybody who reaches the port
            can speak for any rank.

    Raises:
        ConfigError: the table cannot be read or lacks a rank, or the port cannot be had.
    """

    shows_life = True

    def __init__(
        self, table: str | None, rank: int, peers: Collection[int], limit_bytes: int, tls: Credentials | None = None
    ) -> None:
        super().__init__(rank, limit_bytes)
        self.processes: dict[int, bytes] = {}
        """The token of the process that answered last, by rank."""
        listening, self._addresses = addresses(table, (rank, *peers))
        self._options = [
            ("grpc.max_send_message_length", limit_bytes),
            ("grpc.max_receive_message_length", limit_bytes),
            ("grpc.enable_http_proxy", 0),
            ("grpc.so_reuseport", 0),
            # A peer that comes later than this process is found soon after it came.
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._tls = tls
        self._servicer = _Servicer(self.seen, peers, tls is not None, self._refuse)
        # Who sends a large message holds a thread, and signs of life must come through beside all of them.
        self._server = grpc.server(ThreadPoolExecutor(2 * len(peers) + 2), options=self._options)
        grpc_comm_manager_pb2_grpc.add_gRPCCommManagerServicer_to_server(self._servicer, self._server)
        try:
            if tls is None:
                self._server.add_insecure_port(listening[rank])
            else:
                pair = [(tls.key, tls.certificate)]
                self._server.add_secure_port(
                    listening[rank], grpc.ssl_server_credentials(pair, tls.authority, require_client_auth=True)
                )
        except RuntimeError as error:
            raise ConfigError(f"rank {rank} cannot listen on {listening[rank]}: {error}") from None
        if tls is None and not _is_loopback(listening[rank]):
            log.warning(
                "rank %d listens on %s without TLS: whoever reaches that port can speak for any rank "
                "(fedsq_args.tls_cert, tls_key, tls_ca)",
                rank,
                listening[rank],
            )
        self._server.start()
        self._stubs: dict[int, Any] = {}

    def stop(self) -> None:
        super().stop()
        self._server.stop(grace=1.0).wait()

    def show_life(self, receiver: int, within: float) -> bytes | None:
        """The token of the process that took a sign of life within so many seconds; None: there was none."""
        error = self._tried(receiver, b"", within, wait=True)
        return self.processes[receiver] if error is None else None

    def _send(self, receiver: int, data: bytes, within: float, wait: bool) -> None:
        """A broken connection is tried anew: a message that arrives twice is refused, one that is lost ends
        the run."""
        until, told = time.monotonic() + within, ""
        # Not gRPC's own waiting: it says nothing of a connection that TLS refuses.
        while (error := self._reached(receiver, data, until - time.monotonic())) is not None:
            reason = " ".join(str(error.details()).split())[:300]
            if not wait or time.monotonic() + RETRY_S > until or error.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise RunError(
                    f"rank {self.rank} cannot reach rank {receiver} at {self._addresses[receiver]}: {reason}"
                )
            if reason != told:
                log.warning("rank %d did not reach rank %d yet: %s", self.rank, receiver, reason)
            told = reason
            time.sleep(RETRY_S)

    def _reached(self, receiver: int, data: bytes, within: float) -> Any:
        """The error of one try, or None. A peer must be there within so many seconds; a large message may
        take longer."""
        error = self._tried(receiver, b"", within, wait=False)
        return error or self._tried(receiver, data, SEND_S + len(data) / SLOWEST, wait=False)

    def _tried(self, receiver: int, data: bytes, within: float, wait: bool) -> Any:
        """The error of one try, or None."""
        request = grpc_comm_manager_pb2.CommRequest(client_id=self.rank, message=data)
        try:
            answer = self._stub(receiver).sendMessage(request, timeout=within, wait_for_ready=wait)
        except grpc.RpcError as error:
            return error
        self.processes[receiver] = bytes(answer.message)
        return None

    def _stub(self, receiver: int) -> Any:
        if receiver not in self._stubs:
            self._stubs[receiver] = grpc_comm_manager_pb2_grpc.gRPCCommManagerStub(self._channel(receiver))
        return self._stubs[receiver]

    def _channel(self, receiver: int) -> Any:
        address, tls = self._addresses[receiver], self._tls
        if tls is None:
            return grpc.insecure_channel(address, self._options)
        return grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate),
            [*self._options, ("grpc.ssl_target_name_override", name_of(receiver))],
        )

    def _next(self, timeout: float) -> tuple[int, bytes] | None:
        try:
            return self._servicer.arrived.get(timeout=timeout)
        except queue.Empty:
            return None


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
        return all(ipaddress.ip_address(one).is_loopback for one in found)
    except (OSError, ValueError):
        return False
