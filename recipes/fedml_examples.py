"""FedML's own examples under FedSQ, as a table in Markdown.

    python recipes/fedml_examples.py CHECKOUT [WORD]

CHECKOUT is a clone of FedML's repository, WORD a part of an example's path. Every example of
`python/examples/federate/{simulation,cross_silo}` that trains one of MODELS on one of DATASETS runs by its
own script, through the launcher, with `federated_optimizer: FedSQ`, on small random data in the layout of
FedML's loaders. What else is changed: SIZES, `data_cache_dir`, and what ALSO names.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

DATASETS = ("cifar10", "cifar100", "cinic10", "femnist", "fed_cifar100")
MODELS = ("resnet56", "resnet18_gn", "mobilenet", "mobilenet_v3", "cnn", "efficientnet")
SIZES: dict[str, Any] = {
    **{"client_num_in_total": 4, "client_num_per_round": 2, "comm_round": 2, "epochs": 1, "batch_size": 8},
    **{"frequency_of_the_test": 1, "using_gpu": False},
}
ALSO: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cross_silo/mqtt_s3_fedavg_cifar10_lr_example/config/fedml_config.yaml", {"backend": "GRPC"}),
    (
        "cross_silo/grpc_fedavg_mnist_lr_example/one_line/config/fedml_config.yaml",
        {"dataset": "cifar10", "model": "resnet56"},
    ),
)
"""Examples with another change, for the road across silos: without a broker, and on a network with gates."""
CLIENTS = 2
"""Client processes of an example over MPI or GRPC."""
LIMIT_S = 600
"""For one example; nothing may hang."""
# torchvision takes only the genuine archives, by their MD5 sums; that check alone is off in these trials.
LAUNCHER = """
import os, runpy, torchvision.datasets.cifar as cifar
cifar.check_integrity = lambda path, md5=None: os.path.isfile(path)
runpy.run_module("fedsq_plugin", run_name="__main__", alter_sys=True)
"""


def make_data(root: Path) -> None:
    """A small data set of every kind, of random images, in `root/<name>`."""
    draw = np.random.default_rng(0)

    def pickled(folder: Path, parts: dict[str, int], meta: str, names: str, label: str, classes: int) -> None:
        folder.mkdir(parents=True)
        for part, size in parts.items():
            content: dict[str, Any] = {"data": draw.integers(256, size=(size, 3072), dtype=np.uint8)}
            content[label] = [n % classes for n in range(size)]
            (folder / part).write_bytes(pickle.dumps(content))
        (folder / meta).write_bytes(pickle.dumps({names: [str(n) for n in range(classes)]}))

    batches = {**{f"data_batch_{n}": 20 for n in range(1, 6)}, "test_batch": 20}
    pickled(root / "cifar10/cifar-10-batches-py", batches, "batches.meta", "label_names", "labels", 10)
    parts, label = {"train": 200, "test": 20}, "fine_labels"
    pickled(root / "cifar100/cifar-100-python", parts, "meta", "fine_label_names", label, 100)
    for part, count in (("train", 10), ("test", 2)):
        for name in range(10):
            folder = root / "cinic10" / part / str(name)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    grey, colour = (28, 28), (32, 32, 3)
    hdf5(root / "femnist/fed_emnist", "pixels", draw.random((22, *grey), np.float32), 62, (3400, 3400))
    images = draw.integers(256, size=(22, *colour), dtype=np.uint8)
    hdf5(root / "fed_cifar100/fed_cifar100", "image", images, 100, (500, 100))


def hdf5(path: Path, key: str, images: Any, classes: int, clients: Sequence[int]) -> None:
    """FedML's loaders ask for thousands of clients; here `classes` of them are stored, and many names lead to
    each: clients of 20 training and 2 test images of one class."""
    path.parent.mkdir()
    for split, part, count in (("train", images[:20], clients[0]), ("test", images[20:], clients[1])):
        with h5py.File(f"{path}_{split}.h5", "w") as file:
            examples = file.create_group("examples")
            for client in range(count):
                if client >= classes:
                    examples[f"f{client:04}"] = examples[f"f{client % classes:04}"]
                    continue
                group = examples.create_group(f"f{client:04}")
                group[key] = part
                group["label"] = np.full((len(part), 1), client, np.int32)


def examples(root: Path, word: str) -> Iterator[Path]:
    """The YAML files that the table is about, by their text: not all of FedML's are YAML."""
    for path in sorted(root.glob("simulation/**/*.yaml")) + sorted(root.glob("cross_silo/**/*.yaml")):
        text = path.read_text()
        wanted = value(text, "dataset") in DATASETS and value(text, "model") in MODELS
        if wanted and word in str(path.relative_to(root)):
            yield path


def value(text: str, key: str) -> str:
    """A key's value in the text of a flat YAML file."""
    found = re.search(rf"^ +{key}:([^#\n]*)", text, re.MULTILINE)
    return found[1].strip().strip("\"'") if found else ""


def changed(text: str, options: dict[str, Any]) -> str:
    """The text with other values; a key that is not there is put after `federated_optimizer`."""
    for key, new in options.items():
        line = rf"^( +){key}:[^\n]*"
        if re.search(line, text, re.MULTILINE):
            text = re.sub(line, rf"\g<1>{key}: {new}", text, flags=re.MULTILINE)
        else:
            text = re.sub(r"^( +)(federated_optimizer:[^\n]*)", rf"\1\2\n\1{key}: {new}", text, flags=re.M)
    return text


def run(path: Path, also: dict[str, Any], data: Path, work: Path) -> str:
    """What an example's processes said, the server first; `also` is what is changed besides sizes."""
    home = next(folder for folder in path.parents if scripts(folder))
    here = work / "example"
    shutil.copytree(home, here)
    recipe = here / path.relative_to(home)
    text = changed(path.read_text(), {"federated_optimizer": "FedSQ", **SIZES, **also})
    text = changed(text, {"data_cache_dir": data / value(text, "dataset")})
    if value(text, "backend") == "GRPC":
        text = changed(text, {"grpc_ipconfig_path": addresses(here / "addresses.csv"), "worker_num": CLIENTS})
    recipe.write_text(text)
    commands = [[sys.executable, "-c", LAUNCHER, name, "--cf", str(recipe)] for name in scripts(home)]
    if value(text, "backend") == "MPI":
        mpirun = str(Path(sys.executable).with_name("mpirun"))
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(CLIENTS + 1)]
        commands = [[mpirun, *options, *commands[0]]]
    elif value(text, "training_type") == "cross_silo":
        server, client = commands
        commands = [[*server, "--rank", "0", "--role", "server", "--run_id", "1"]]
        for rank in range(1, CLIENTS + 1):
            commands.append([*client, "--rank", str(rank), "--role", "client", "--run_id", "1"])
    return together(commands, here)


def scripts(folder: Path) -> list[str]:
    """The names of an example's own scripts: its main one, or the server's and the client's."""
    starts = re.compile(r"FedMLRunner\(|run_cross_silo_\w+\(")
    names = [path.name for path in folder.glob("*.py") if starts.search(path.read_text(errors="replace"))]
    return sorted(names, reverse=True)


def addresses(path: Path) -> Path:
    """FedML's table of addresses, with free ports of this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(CLIENTS + 1)]
    rows = [f"{rank},{rank},127.0.0.1,{one.getsockname()[1]}" for rank, one in enumerate(sockets)]
    for one in sockets:
        one.close()
    path.write_text("\n".join(["eid,rank,grpc_server_ip,grpc_server_port", *rows, ""]))
    return path


def together(commands: Sequence[Sequence[str]], here: Path) -> str:
    """Run processes side by side, each ending with those that it started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    files = [here / f"said-{number}" for number, _ in enumerate(commands)]
    processes = [
        subprocess.Popen(
            command, cwd=here, env=environment, stdout=file.open("wb"), stderr=subprocess.STDOUT, start_new_session=True
        )
        for command, file in zip(commands, files, strict=True)
    ]
    until = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        ending = ""
    except subprocess.TimeoutExpired:
        ending = f"\nTimeoutError: no end within {LIMIT_S} s\n"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "".join(file.read_text(errors="replace") for file in files) + ending


def outcome(said: str) -> str:
    """One line: what the rounds gave, or why there were none."""
    rounds = re.findall(r"FedSQ round (\d+)/\d+: test accuracy ([\d.]+|nan).*loss ([\d.]+|nan)", said)
    notes = re.findall(r"model \w+ has (\d+ outputs for \d+ classes)", said)
    errors = re.findall(r"^fedsq: error: (.*)", said, re.MULTILINE)
    failures = re.findall(r"^\w*Error: .*", said, re.MULTILINE)
    if errors or failures:
        return f"ends: {(errors or failures)[0]}"
    if len(rounds) != SIZES["comm_round"]:
        return f"ends after {len(rounds)} rounds without a reason"
    losses = ", ".join(loss for _, _, loss in rounds)
    return f"runs; loss {losses}{f' ({notes[0]})' if notes else ''}"


def main(checkout: Path, word: str) -> None:
    root = checkout / "python/examples/federate"
    trials: list[tuple[Path, dict[str, Any]]] = [(path, {}) for path in examples(root, word)]
    trials += [(root / name, also) for name, also in ALSO if word in name]
    if not trials:
        sys.exit(f"no such example under {root}")
    reasons: list[str] = []
    print("| example | data, model | back end | under FedSQ |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data")
        for number, (path, also) in enumerate(trials):
            work = Path(folder) / str(number)
            work.mkdir()
            found = outcome(run(path, also, Path(folder) / "data", work))
            if found.startswith("ends: "):
                reason = found.removeprefix("ends: ")
                reasons += [reason] if reason not in reasons else []
                found = f"ends with reason {reasons.index(reason) + 1}"
            text = changed(path.read_text(), also)
            what = [f"{value(text, 'dataset')}, {value(text, 'model')}", value(text, "backend")]
            marks = f" with {', '.join(f'{key}: {new}' for key, new in also.items())}" if also else ""
            print("|", " | ".join([f"`{path.relative_to(root)}`{marks}", *what, found]), "|", flush=True)
    print(*(f"\n{number}. {reason}" for number, reason in enumerate(reasons, 1)), sep="")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "")
