"""What this machine has: GPUs as the driver names them and joins them, CPUs and memory."""

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace

import psutil

from market.errors import InvalidRequest, MarketFault
from market.types import Gpu

MIB = 1024 * 1024
QUERY_TIMEOUT_S = 20
DRIVER_TOOL = "nvidia-smi"

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_GPU_NAME = re.compile(r"GPU(\d+)")
_NVLINK = re.compile(r"NV\d+")


def gpus() -> tuple[Gpu, ...]:
    """GPUs that nvidia-smi lists, honouring CUDA_VISIBLE_DEVICES; none without a driver."""
    try:
        listing = _ask_driver(
            "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"
        )
    except MarketFault:
        return ()
    found = parse_gpus(listing or "", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if len(found) < 2:
        return found
    try:
        topology = _ask_driver("topo", "-m")
    except MarketFault:
        return found  # no word about links counts as none
    return with_domains(found, parse_nvlinks(topology or ""))


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


def parse_nvlinks(matrix: str) -> frozenset[tuple[int, int]]:
    """Pairs of GPU indices, the smaller first, that ``nvidia-smi topo -m`` shows as NV<lanes>.

    Rows and columns of network cards, affinities and the legend are passed over.
    """
    columns: list[int] = []
    links = set()
    for line in _ESCAPES.sub("", matrix).splitlines():
        cells = line.split()
        if not columns:
            columns = [int(number) for number in _GPU_NAME.findall(line)]
        elif cells and (row := _GPU_NAME.fullmatch(cells[0])):
            index = int(row[1])
            for other, cell in zip(columns, cells[1:], strict=False):
                if _NVLINK.fullmatch(cell):
                    links.add((min(index, other), max(index, other)))
    return frozenset(links)


def with_domains(found: Iterable[Gpu], links: Iterable[tuple[int, int]]) -> tuple[Gpu, ...]:
    """The GPUs, numbered by what NVLink joins: 0 for all if it joins nothing.

    Only links between given GPUs count: one that is hidden from us forwards nothing.
    """
    cards = tuple(found)
    group = {gpu.index: gpu.index for gpu in cards}
    joined = [link for link in links if link[0] in group and link[1] in group]
    if not joined:
        return tuple(replace(gpu, domain=0) for gpu in cards)
    for left, right in joined:
        kept, merged = group[left], group[right]
        group = {index: kept if name == merged else name for index, name in group.items()}
    names = list(dict.fromkeys(group[gpu.index] for gpu in cards))
    return tuple(replace(gpu, domain=names.index(group[gpu.index])) for gpu in cards)


def declared_gpus(count: int, gpu_type: str, memory_mib: int) -> tuple[Gpu, ...]:
    """Logical GPUs for a machine without any, as if one NVLink domain joined them.

    Raises InvalidRequest if there would be none, or one without memory.
    """
    if count < 1 or memory_mib < 1:
        raise InvalidRequest(f"declare at least 1 GPU with memory, not {count} of {memory_mib} MiB")
    return tuple(Gpu(index, gpu_type, memory_mib) for index in range(count))


def gpu_memory() -> dict[int, tuple[int, int]]:
    """(used, total) MiB of every GPU by index; empty without a driver.

    Raises MarketFault if there is a driver and it does not answer: memory unseen is not free.
    """
    listing = _ask_driver(
        "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"
    )
    return parse_gpu_memory(listing or "")


def parse_gpu_memory(listing: str) -> dict[int, tuple[int, int]]:
    """nvidia-smi's CSV (index, used MiB, total MiB); GPUs that tell no figures are left out."""
    rows = csv.reader(listing.strip().splitlines(), skipinitialspace=True)
    return {
        int(index): (int(used), int(total))
        for index, used, total in rows
        if used.isdigit() and total.isdigit()
    }


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def memory_mib() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total // MIB)


def _ask_driver(*arguments: str) -> str | None:
    """What nvidia-smi prints, None where there is none. Raises MarketFault if it fails."""
    if shutil.which(DRIVER_TOOL) is None:
        return None
    try:
        answer = subprocess.run(
            [DRIVER_TOOL, *arguments],
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise MarketFault(f"{DRIVER_TOOL} failed: {error}") from error
    return answer.stdout
