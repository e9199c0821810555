"""GPUs, their links and their memory, from listings as drivers print them."""

import subprocess

import pytest

from market.cluster import hardware
from market.cluster.hardware import (
    declared_gpus,
    parse_gpu_memory,
    parse_nvlinks,
    with_domains,
)
from market.errors import InvalidRequest, MarketFault
from market.types import Gpu

ESCAPED_HEADER = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"

# DGX A100: every pair over NVSwitch, two network cards.
A100 = (
    "\t"
    + "\t".join(f"GPU{n}" for n in range(8))
    + "\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    + "".join(
        f"GPU{row}\t"
        + "\t".join(" X " if row == column else "NV12" for column in range(8))
        + "\tPXB\tSYS\t48-63,176-191\t3\t\tN/A\n"
        for row in range(8)
    )
    + "NIC0\t"
    + "\t".join(["PXB"] * 8)
    + "\t X \tSYS\n"
    + "NIC1\t"
    + "\t".join(["SYS"] * 8)
    + "\tSYS\t X \n"
    + """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  PXB  = Connection traversing multiple PCIe bridges
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
)

# Four L4 on one board.
PCIE = """\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNODE\tSYS\tSYS\t0-23,48-71\t0\t\tN/A
GPU1\tNODE\t X \tSYS\tSYS\t0-23,48-71\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tPHB\t24-47,72-95\t1\t\tN/A
GPU3\tSYS\tSYS\tPHB\t X \t24-47,72-95\t1\t\tN/A

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""

# Workstation: bridges join 0 with 2 and 1 with 3, and 4 is alone.
BRIDGES = """\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tCPU Affinity\tNUMA Affinity
GPU0\t X \tPHB\tNV4\tPHB\tPHB\t0-31\tN/A
GPU1\tPHB\t X \tPHB\tNV4\tPHB\t0-31\tN/A
GPU2\tNV4\tPHB\t X \tPHB\tPHB\t0-31\tN/A
GPU3\tPHB\tNV4\tPHB\t X \tPHB\t0-31\tN/A
GPU4\tPHB\tPHB\tPHB\tPHB\t X \t0-31\tN/A
"""

# V100 cubes: each GPU has NVLink to some of the others only; 0 reaches 5 through a third.
CUBE = """\tGPU0\tGPU1\tGPU4\tGPU5\tCPU Affinity
GPU0\t X \tNV1\tNV2\tSYS\t0-19
GPU1\tNV1\t X \tSYS\tNV2\t0-19
GPU4\tNV2\tSYS\t X \tNV1\t20-39
GPU5\tSYS\tNV2\tNV1\t X \t20-39
"""

ONE = """\x1b[4m\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \t0-15\t0\t\tN/A

Legend:

  X    = Self
"""


def cards(*indices):
    return tuple(Gpu(index, "a100", 81_920) for index in indices)


def domains(indices, matrix):
    return [gpu.domain for gpu in with_domains(cards(*indices), parse_nvlinks(matrix))]


def test_nvswitch_makes_one_domain_of_eight():
    assert len(parse_nvlinks(A100)) == 28
    assert domains(range(8), A100) == [0] * 8


def test_without_nvlink_all_gpus_are_one_domain():
    assert parse_nvlinks(PCIE) == frozenset()
    assert domains(range(4), PCIE) == [0] * 4


def test_bridged_pairs_are_domains_and_so_is_a_gpu_alone():
    assert parse_nvlinks(BRIDGES) == {(0, 2), (1, 3)}
    assert domains(range(5), BRIDGES) == [0, 1, 0, 1, 2]


def test_links_join_through_a_third_gpu_only_if_it_is_ours():
    assert domains((0, 1, 4, 5), CUBE) == [0, 0, 0, 0]
    assert domains((0, 1, 5), CUBE) == [0, 0, 0]
    assert domains((0, 5), CUBE) == [0, 0], "no link is left: as without NVLink"
    assert domains((0, 4, 1), CUBE.replace("NV1", "SYS")) == [0, 0, 1]


def test_one_gpu_and_nothing_at_all():
    assert parse_nvlinks(ONE) == frozenset()
    assert domains((0,), ONE) == [0]
    assert parse_nvlinks("") == frozenset()


def test_underlined_header_and_missing_cells_are_read():
    matrix = ESCAPED_HEADER + "GPU0\t X \tNV18\nGPU1\tNV18\n"
    assert parse_nvlinks(matrix) == {(0, 1)}


def test_declared_gpus():
    assert declared_gpus(2, "h100", 81_920) == (
        Gpu(0, "h100", 81_920, domain=0),
        Gpu(1, "h100", 81_920, domain=0),
    )
    for count, memory_mib in ((0, 81_920), (-1, 81_920), (2, 0)):
        with pytest.raises(InvalidRequest, match="at least 1 GPU"):
            declared_gpus(count, "h100", memory_mib)


def test_memory_by_index_without_cards_that_tell_nothing():
    listing = "0, 71234, 81920\n1, [N/A], [N/A]\n3, 0, 81920\n"
    assert parse_gpu_memory(listing) == {0: (71_234, 81_920), 3: (0, 81_920)}
    assert parse_gpu_memory("\n") == {}


class Driver:
    """Plays nvidia-smi: an answer by first argument, or an error."""

    def __init__(self, monkeypatch, answers):
        self.answers = answers
        monkeypatch.setattr(hardware.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(hardware.subprocess, "run", self)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def __call__(self, command, **_options):
        answer = self.answers[command[1].partition(",")[0]]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, stdout=answer)


LISTING = "".join(f"{n}, NVIDIA RTX A6000, 49140\n" for n in range(5))
BROKEN = subprocess.CalledProcessError(9, "nvidia-smi")


def test_gpus_of_the_driver_carry_their_domains(monkeypatch):
    Driver(monkeypatch, {"--query-gpu=index": LISTING, "topo": BRIDGES})
    assert [gpu.domain for gpu in hardware.gpus()] == [0, 1, 0, 1, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3")
    assert [(gpu.index, gpu.domain) for gpu in hardware.gpus()] == [(1, 0), (2, 1), (3, 0)]


def test_gpus_are_found_even_if_their_links_are_not(monkeypatch):
    Driver(monkeypatch, {"--query-gpu=index": LISTING, "topo": BROKEN})
    assert [gpu.domain for gpu in hardware.gpus()] == [0] * 5


def test_memory_that_nobody_saw_is_an_error_and_no_driver_is_none(monkeypatch):
    Driver(monkeypatch, {"--query-gpu=index": BROKEN})
    assert hardware.gpus() == ()
    with pytest.raises(MarketFault, match="nvidia-smi failed"):
        hardware.gpu_memory()
    monkeypatch.setattr(hardware.shutil, "which", lambda _name: None)
    assert hardware.gpu_memory() == {}
