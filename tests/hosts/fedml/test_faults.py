"""The table of faults: what goes wrong, in which process and when, and how every process of the run ends.

Real processes, real signals; times of minutes are made seconds, and faults are put in, from outside (see
`faults`). Rows run beside each other, and FedML is imported once for all (see `nursery`). A rank of -9 was
killed by the fault, one of None was stopped and is killed by the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedsq_plugin.hosts.fedml.local import free_addresses

from .conftest import MPIRUN
from .test_distributed import FEDSQ, ROADS, recipe, start

LIMIT_S = 300
"""For any one step of a row; nothing may hang."""
AT_ONCE = 8
"""Rows."""
SILENCE = 5
CONSTANTS = {
    **{"SILENCE_S": float(SILENCE), "ALIVE_S": 0.4, "MARGIN_S": 5.0, "HANGING_S": 2.0},
    **{"GRACE_S": 12.0, "KILL_S": 1.0},
}


@dataclass(frozen=True)
class Row:
    road: str
    """sp; GRPC, each process started by itself; launch GRPC, launch MPI: by `fedsq launch`."""
    faults: dict[int, str]
    """By rank, see `faults`."""
    ends: tuple[int | None, ...]
    """Exit status of every rank, or of the one command."""
    says: dict[int, str]
    """In the one line on standard error of a rank."""
    rounds: int | None = 3
    """In metrics.csv; None: whatever."""
    notes: tuple[str, ...] = ()
    """What the server says at the end of a run that went on."""
    options: dict[str, Any] = field(default_factory=dict)
    then: Callable[[Running], None] | None = None

    def __str__(self) -> str:
        quorum = ", quorum" if "min_clients" in self.options else ""
        what = ", ".join(f"{rank} {fault}" for rank, fault in self.faults.items())
        return f"{self.road}, {what}{quorum}{f', {self.then.__name__}' if self.then else ''}"


@dataclass
class Running:
    """The processes of a row, by rank; those that are started by another one only by their ids."""

    row: Row
    folder: Path
    python: Path
    cache: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *arguments: str, faults: Mapping[int, str] | None = None) -> subprocess.Popen[str]:
        wanted = {"constants": CONSTANTS, **(self.row.faults if faults is None else faults)}
        known = {"FAULTS": json.dumps(wanted), "FAULTS_FOLDER": str(self.folder)}
        return start(self.python, *FEDSQ, *arguments, "--out", str(self.out), **known)

    def start_rank(self, rank: int, faults: Mapping[int, str] | None = None) -> subprocess.Popen[str]:
        return self.start("node", str(self.folder / "recipe.yaml"), "--rank", str(rank), faults=faults)

    def start_all(self) -> None:
        road = self.row.road.rpartition(" ")[2]
        options = {"comm_round": 3, "client_num_in_total": 2, "client_num_per_round": 2, **self.row.options}
        timeout = options.pop("round_timeout_s", 30.0)
        families = recipe(
            self.cache, backend=road, training_type=ROADS.get(road, "simulation"), worker_num=2, **options
        )
        families["fedsq_args"]["round_timeout_s"] = timeout
        families["warm_start_args"]["warm_start_public"] = 0.85  # little is left to train on
        if self.row.road == "GRPC":
            table = self.folder / "table.csv"
            table.write_text(free_addresses(3))
            families["comm_args"]["grpc_ipconfig_path"] = str(table)
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(families))
        if self.row.road == "GRPC":
            self.processes = [self.start_rank(rank) for rank in range(3)]
        elif road == "sp":
            self.processes = [self.start("run", str(path))]
        else:
            self.processes = [self.start("launch", str(path), "--clients", "2")]

    def pid(self, rank: int) -> int:
        return int((self.folder / f"{rank}.pid").read_text())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < until, f"waited in vain; log: {self.log()[-2000:]}"
            time.sleep(0.05)

    def log(self) -> str:
        path = self.out / "fedml.log"
        return path.read_text() if path.exists() else ""

    def go(self) -> None:
        (self.folder / "go").touch()

    def finish(self) -> Result:
        ends, said = [], []
        try:
            if self.row.then:
                self.row.then(self)
            until = time.monotonic() + LIMIT_S
            for process, expected in zip(self.processes, self.row.ends, strict=True):
                if expected is None:
                    continue
                said.append(process.communicate(timeout=max(1.0, until - time.monotonic())))
                ends.append(process.returncode)
        finally:
            for process in self.processes:
                process.kill()
        kept = iter(zip(ends, said, strict=True))
        all_ends: list[int | None] = []
        all_said: list[tuple[str, str]] = []
        for expected in self.row.ends:
            end, words = (None, ("", "")) if expected is None else next(kept)
            all_ends.append(end)
            all_said.append(words)
        until = time.monotonic() + 10  # what was stopped is killed by now, and ends soon
        while (left := self.living()) and time.monotonic() < until:
            time.sleep(0.1)
        rounds = len(pd.read_csv(self.out / "metrics.csv")) if (self.out / "metrics.csv").exists() else 0
        happened = {int(path.stem) for path in self.folder.glob("*.fault")}
        return Result(all_ends, all_said, rounds, left, happened)

    def living(self) -> list[str]:
        return [path.stem for path in self.folder.glob("*.pid") if _lives(int(path.read_text()))]


@dataclass
class Result:
    ends: list[int | None]
    said: list[tuple[str, str]]
    rounds: int
    left: list[str]
    """Ranks whose process is there yet."""
    happened: set[int]
    """Ranks whose fault was reached."""


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def comes_back(run: Running) -> None:
    """Rank 2 is started anew when it is missed; rank 1 waits for it in round 3."""
    run.wait_for(lambda: "rank 2 is lost" in run.log())
    run.processes[2].wait()
    run.processes[2] = run.start_rank(2, faults={})
    run.wait_for(lambda: run.log().count("rank 2 is there") == 2)
    run.go()


def comes_late(run: Running) -> None:
    run.wait_for(lambda: "rank 2 did not come" in run.log())
    run.go()


def answers_late(run: Running) -> None:
    run.wait_for(lambda: "an answer of rank 2 for silo 1 is refused" in run.log())
    run.go()


def continues(run: Running) -> None:
    run.wait_for(lambda: "rank 2 is lost" in run.log())
    os.kill(run.pid(2), signal.SIGCONT)
    run.wait_for(lambda: "rank 2 shows life again" in run.log())
    run.go()


QUORUM: dict[str, Any] = {"min_clients": 1}
SHORT: dict[str, Any] = {"round_timeout_s": 8.0}
LATER: dict[str, Any] = {"comm_round": 5}
LOST = "rank 2 is lost: "
"""It showed no life, or its task did not reach it: what is seen first."""
TOO_FEW = "; 1 of 2 client processes are left, 2 are needed (fedsq_args.min_clients)"
GONE = f"the server is gone: rank 1 heard nothing of it for {SILENCE} s"
TOLD = "the server ended the run: "
USER = 'KeyError: "the user\'s own code"'
FAILED = f"rank 2 is lost: silo 1 failed in train: {USER}"
EXITED = "rank 2 is lost: silo 1 failed in train: SystemExit: 0"
NEVER = "rank 2 did not come within 8 s (fedsq_args.round_timeout_s)"
SLOW = "rank 2 is lost: it did not answer within 8 s (fedsq_args.round_timeout_s)"
ABSENT = "silo 1 is not there"


def lost(fault: str, why: str, rounds: int | None, ends: Any = (2, 2, -9), **options: Any) -> Row:
    """Without a quorum."""
    return Row("GRPC", {2: fault}, ends, {0: why, 1: TOLD + why}, rounds, options=options)


def server(fault: str, rounds: int | None, says: str = GONE, ends: Any = (-9, 2, 2), **options: Any) -> Row:
    return Row("GRPC", {0: fault}, ends, {1: says}, rounds, options=options)


def own(fault: str, line: str, rounds: int, **options: Any) -> Row:
    """Of the server's user code."""
    return Row("GRPC", {0: fault}, (2, 2, 2), {0: line, 1: TOLD}, rounds, options=options)


def on_without(fault: str, note: str, end: int | None = -9, **options: Any) -> Row:
    return Row("GRPC", {2: fault}, (0, 0, end), {}, 3, (note, ABSENT), {**QUORUM, **options})


def mpi(fault: dict[int, str], end: int, says: str, rounds: int | None, **options: Any) -> Row:
    return Row("launch MPI", fault, (end,), {0: says}, rounds, options=options)


IN_ONE = [
    Row("sp", {0: "start:kill"}, (-9,), {}, 0),
    Row("sp", {0: "training:kill:2"}, (-9,), {}, 1),
    Row("sp", {0: "aggregating:kill:2"}, (-9,), {}, 1),
    Row("sp", {0: "saving:kill"}, (-9,), {}, 3),
    Row("sp", {0: "loading:raise"}, (2,), {0: USER}, 0),
    Row("sp", {0: "training:raise:2"}, (2,), {0: USER}, 1),
    Row("sp", {0: "aggregating:raise:2"}, (2,), {0: USER}, 1),
    Row("sp", {0: "training:exit:2"}, (2,), {0: "the run called sys.exit(0) before its end"}, 1),
]

OVER_GRPC = [
    # a client is killed
    lost("start:kill", NEVER, 0, **SHORT),
    lost("training:kill:2", LOST, 1),
    lost("sending:kill:2", LOST, 1),
    lost("sent:kill:2", LOST, None),
    Row("GRPC", {2: "end:kill"}, (0, 0, -9), {}),
    Row("GRPC", {2: "start:kill"}, (0, 0, -9), {}, 3, (NEVER, ABSENT), {**QUORUM, **SHORT}),
    on_without("training:kill:2", LOST),
    on_without("sending:kill:2", LOST),
    Row("GRPC", {2: "training:kill:2", 1: "training:hold:3"}, (0, 0, 0), {}, 5, (LOST,),
        {**QUORUM, **LATER}, comes_back),
    # the server is killed
    server("start:kill", 0, "rank 1 cannot reach rank 0", **SHORT),
    server("waiting:kill:2", 1),
    server("giving:kill:2", 1),
    server("aggregating:kill:2", 1),
    server("over:kill", 3),
    Row("GRPC", {0: "waiting:kill:2", 1: "training:hang:2"}, (-9, 2, 2), {1: GONE}, 1),
    # user code fails, ends the process or hangs
    lost("loading:raise", NEVER, 0, (2, 2, 2), **SHORT),
    lost("training:raise:2", FAILED + TOO_FEW, 1, (2, 2, 2)),
    lost("training:exit:2", EXITED, 1, (2, 2, 2)),
    lost("training:hang:2", SLOW, 1, (2, 2, 2), **SHORT),
    on_without("training:raise:2", FAILED, 2),
    on_without("training:hang:2", SLOW, 2, **SHORT),
    Row("GRPC", {0: "loading:raise"}, (2, 2, 2), {0: USER, 1: "rank 1 cannot reach rank 0"}, 0,
        options=SHORT),
    own("aggregating:raise:2", USER, 1),
    own("aggregating:exit:2", "round 2: the aggregator called sys.exit(0)", 1),
    own("evaluating:hang:2", "round 2: the server's own work, aggregation and evaluation, is not done within "
        "13 s (fedsq_args.round_timeout_s and 5 s)", 1, **SHORT),
    # late and slow clients
    Row("GRPC", {2: "start:slow2"}, (0, 0, 0), {}),
    Row("GRPC", {2: "start:hold", 1: "training:hold:2"}, (0, 0, 0), {}, 5, (NEVER,),
        {**QUORUM, **LATER, **SHORT}, comes_late),
    Row("GRPC", {2: "training:slow2:2"}, (0, 0, 0), {}),
    Row("GRPC", {2: "training:slow10:1", 1: "training:hold:2"}, (0, 0, 0), {}, 5,
        (SLOW, "an answer of rank 2 for silo 1 is refused"), {**QUORUM, **LATER, **SHORT}, answers_late),
    # stopped processes
    server("waiting:stop:2", 1, ends=(None, 2, 2)),
    lost("training:stop:2", LOST, 1, (2, 2, None)),
    on_without("training:stop:2", LOST, None),
    Row("GRPC", {2: "sent:stop:1", 1: "training:hold:2"}, (0, 0, 0), {}, 5,
        ("rank 2 is lost: rank 0 cannot reach rank 2", "rank 2 shows life again"), {**QUORUM, **LATER},
        continues),
    # all of it started by one command
    Row("launch GRPC", {2: "start:kill"}, (2,), {0: "client process 2 was ended by signal 9"}, 0),
    Row("launch GRPC", {0: "waiting:kill:2"}, (137,), {0: "the server was ended by signal 9"}, 1),
    Row("launch GRPC", {0: "waiting:stop:2"}, (2,), {0: GONE}, 1),
    Row("launch GRPC", {2: "training:stop:2"}, (2,), {0: LOST}, 1),
    Row("launch GRPC", {2: "training:stop:2"}, (0,), {0: "client process 2 does not end"}, 3, (LOST,),
        QUORUM),
]  # fmt: skip

KILLED = "the process of rank 2 was ended by signal 9"
SERVER_KILLED = "the process of rank 0 was ended by signal 9"
OVER_MPI = [
    *(mpi({2: f"{when}:kill"}, 137, KILLED, rounds)
      for when, rounds in (("start", 0), ("training", 0), ("sending", 0), ("sent", None), ("end", None))),
    *(mpi({0: f"{when}:kill"}, 137, SERVER_KILLED, rounds)
      for when, rounds in (("start", 0), ("waiting", 0), ("giving", 0), ("aggregating", 0), ("over", 3))),
    mpi({2: "loading:raise"}, 2, USER, 0),
    mpi({2: "training:raise:2"}, 2, FAILED + TOO_FEW, 1),
    mpi({2: "training:exit:2"}, 2, EXITED + TOO_FEW, 1),
    mpi({0: "loading:raise"}, 2, USER, 0),
    mpi({0: "aggregating:exit:2"}, 2, "round 2: the aggregator called sys.exit(0)", 1),
    mpi({0: "evaluating:hang:2"}, 2, "round 2: the server's own work", 1, **SHORT),
    mpi({0: "waiting:stop:2"}, 2, "rank 0 took no message of rank", 1, **SHORT),
    mpi({0: "evaluating:stop:2"}, 2, "heard nothing of it for 18 s", 1, **SHORT),
    mpi({2: "training:stop:2"}, 2, SLOW + TOO_FEW, 1, **SHORT),
    mpi({2: "start:stop"}, 2, NEVER + TOO_FEW, 0, **SHORT),
    Row("launch MPI", {2: "training:raise:2"}, (0,), {}, 3, (FAILED, ABSENT), QUORUM),
    Row("launch MPI", {2: "training:stop:2"}, (0,), {}, 3, (SLOW, ABSENT), {**QUORUM, **SHORT}),
    Row("launch MPI", {2: "training:hang:2"}, (0,), {}, 3, (SLOW, ABSENT), {**QUORUM, **SHORT}),
    Row("launch MPI", {2: "start:slow2"}, (0,), {}),
]  # fmt: skip

TABLE = [*IN_ONE, *OVER_GRPC, *(OVER_MPI if MPIRUN else [])]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, python: Path
) -> Iterator[dict[str, Future[Result]]]:
    """Of the rows that are asked for, several at a time."""
    if not Path("/proc").is_dir():
        pytest.skip("finds processes in /proc")
    base = tmp_path_factory.mktemp("faults")
    wanted = {
        str(item.callspec.params["row"]): item.callspec.params["row"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec")
    }

    def result(row: Row) -> Result:
        running = Running(row, tmp_path_factory.mktemp("row"), python, base / "cache")
        running.start_all()
        return running.finish()

    first = Row("sp", {}, (0,), {})  # leaves the warm start in the cache
    assert result(first).ends == [0]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(result, row) for name, row in wanted.items()}


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_how_every_process_ends(row: Row, results: dict[str, Future[Result]]) -> None:
    result = results[str(row)].result()
    said = "\n".join(f"-- {rank}: {out[-1500:]}{wrong}" for rank, (out, wrong) in enumerate(result.said))
    assert result.ends == list(row.ends), said
    assert result.happened == row.faults.keys(), said
    assert not result.left, said
    assert row.rounds in (None, result.rounds), said
    for rank, (out, wrong) in enumerate(result.said):
        assert row.says.get(rank, "") in wrong, said
        assert "Traceback" not in out + wrong, said
        if row.ends[rank] == 2:
            assert wrong.count("fedsq: error:") == 1, said
    for line in row.notes:
        assert line in " ".join(result.said[0][0].split()), said  # the console folds long lines
