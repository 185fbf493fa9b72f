"""On what a process trains."""

from __future__ import annotations

from .options import Options, option, runs_rounds


def _one_process(using_gpu: bool, backend: str) -> str | None:
    return "sp is one process, on gpu_id" if using_gpu and backend == "sp" else None


class DeviceOptions(Options):
    """The device of a process, and how it is used."""

    using_gpu: bool = option(False, "device_args", "train on a GPU; an error where there is none", may_change=True)
    gpu_id: int | None = option(
        None,
        "device_args",
        "GPU of this machine; null: 0, or what the mapping of a run of processes says",
        may_change=True,
        ge=0,
    )
    gpu_mapping_file: str | None = option(
        None,
        "device_args",
        "YAML file: key -> host -> processes on each of its GPUs, the server first",
        may_change=True,
        idle=_one_process,
    )
    gpu_mapping_key: str | None = option(
        None, "device_args", "key of gpu_mapping_file to go by", may_change=True, idle=_one_process
    )
    threads: int | None = option(
        None, "fedsq_args", "CPU threads of torch; default: torch's own", may_change=True, ge=1
    )
    channels_last: bool = option(
        False, "fedsq_args", "keep weights and images with channels last in memory", agree=True, idle=runs_rounds
    )
    compile: bool = option(
        False,
        "fedsq_args",
        "train through torch.compile, both copies whole; meant for GPUs",
        agree=True,
        idle=runs_rounds,
    )
