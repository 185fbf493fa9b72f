"""Real processes without the seconds that each needs to import FedML: one that has, forks the others.

    nursery.py nurse SOCKET               imports, and forks whenever it is asked
    nursery.py stub SOCKET ARGUMENTS...   stands for `python ARGUMENTS...`: has it forked, hands it standard
                                          streams, environment and signals, and ends as it ends

Whoever kills a stub kills the process behind it. Tests take the fixture `python`: the path of a script that
is such a stub, with `mpirun` beside it; the processes find it as sys.executable. Standard library only, so
that a stub starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<I")


@contextlib.contextmanager
def opened(folder: Path, environment: Mapping[str, str], mpirun: str | None) -> Iterator[Path]:
    """A nursery in `folder`: its `python`."""
    import subprocess
    import time

    address, python = folder / "nurse", folder / "python"
    scripts = {python: f"{sys.executable} -S -E {__file__} stub {address}"}
    if mpirun is not None:
        scripts[folder / "mpirun"] = mpirun
    for path, words in scripts.items():
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
    command = [sys.executable, "-m", "tests.hosts.fedml.nursery", "nurse", str(address)]
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=silent, stderr=silent) as nurse:
        try:
            while not address.exists():
                assert nurse.poll() is None
                time.sleep(0.05)
            yield python
        finally:
            nurse.kill()


def stub(address: str, arguments: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as nurse:
        nurse.connect(address)
        wish = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        data = json.dumps(wish).encode()
        socket.send_fds(nurse, [b"!"], [0, 1, 2])
        nurse.sendall(_LENGTH.pack(len(data)) + data)
        answers = nurse.makefile("r")
        pid = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(answers.readline())
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


def nurse(address: str) -> dict[str, Any]:
    """Forks until its parent is gone. Comes back in the children alone: what to do."""
    parent = os.getppid()
    waking, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(waking, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        for key, _ in selector.select(timeout=1.0):
            if key.fileobj is listener:
                asking, _ = listener.accept()
                wish, streams = _wish(asking)
                pid = os.fork()
                if not pid:
                    for one in (listener, waking, wake, asking, *children.values()):
                        one.close()
                    return _born(wish, streams)
                for stream in streams:
                    os.close(stream)
                asking.sendall(f"{pid}\n".encode())
                children[pid] = asking
                selector.register(asking, selectors.EVENT_READ, pid)
            elif key.fileobj is waking:
                waking.recv(4096)
            else:  # the stub is gone
                selector.unregister(key.fileobj)
                if key.data in children:
                    os.kill(key.data, signal.SIGKILL)
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                asking = children.pop(pid)
                if asking in selector.get_map():
                    selector.unregister(asking)
                with contextlib.suppress(OSError):
                    asking.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                asking.close()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _wish(asking: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, streams, _, _ = socket.recv_fds(asking, 1, 3)
    with asking.makefile("rb") as stream:
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
        wish: dict[str, Any] = json.loads(stream.read(length))
    return wish, streams


def _born(wish: dict[str, Any], streams: list[int]) -> dict[str, Any]:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, number in zip(streams, range(3), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    return wish


def main() -> None:
    role, address, *rest = sys.argv[1:]
    if role == "stub":
        stub(address, rest)
        return
    _import_all()
    gc.collect()
    gc.freeze()  # else every process looks through, and so copies, all of that as it ends: seconds
    dash_m, module, *arguments = nurse(address)["arguments"]
    assert dash_m == "-m", arguments
    sys.executable = str(Path(address).with_name("python"))
    sys.argv = [module, *arguments]
    if "FAULTS" in os.environ:
        importlib.import_module("tests.hosts.fedml.faults").install(arguments)
    importlib.import_module(module if module.endswith(".cli") else f"{module}.__main__").main()


def _import_all() -> None:
    # Frozen, it would complain of leaks on every process's standard error. Torch for CPUs has none, either.
    sys.modules["triton"] = None  # type: ignore[assignment]
    import torch

    import fedsq_plugin

    torch.set_num_threads(1)
    fedsq_plugin.register()
    ours = [f"fedsq_plugin.{name}" for name in ("run.compare", "__main__", "hosts.fedml.distributed.node")]
    for name in (*ours, "sklearn.datasets", "safetensors.torch", "tests.hosts.fedml.faults"):
        importlib.import_module(name)


if __name__ == "__main__":
    main()
