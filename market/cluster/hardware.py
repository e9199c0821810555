"""What this machine has: GPUs as the driver names them, CPUs and memory."""

import csv
import os
import shutil
import subprocess

import psutil

from market.types import Gpu

MIB = 1024 * 1024
QUERY_TIMEOUT_S = 20


def gpus() -> tuple[Gpu, ...]:
    """GPUs that nvidia-smi lists, honouring CUDA_VISIBLE_DEVICES; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = [
        "nvidia-smi",
        "--query-gpu=index,name,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return ()
    return parse_gpus(answer.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """nvidia-smi's CSV (index, name, MiB) as values, cut down to the visible indices."""
    found = []
    for row in csv.reader(listing.strip().splitlines(), skipinitialspace=True):
        index, name, memory = row
        gpu_type = name.replace("NVIDIA", "").strip().replace(" ", "-").lower()
        found.append(Gpu(int(index), gpu_type, int(memory)))
    if visible is None:
        return tuple(found)
    wanted = {int(part) for part in visible.split(",") if part.strip().isdigit()}
    return tuple(gpu for gpu in found if gpu.index in wanted)


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def memory_mib() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total // MIB)
