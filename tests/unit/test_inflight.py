"""Requests under way survive the death of their process, half-written ones do not count."""

import os
import signal
import subprocess
import sys

import msgspec
import pytest

from market.errors import MarketFault
from market.ledger.inflight import SLOT_BYTES, InflightTable, unfinished
from tests.samples import hold_request, token_record


def record(number=0):
    return token_record(hold_request(), request_id=f"req-{number}")


@pytest.fixture
def table(tmp_path):
    table = InflightTable(tmp_path, "gw0", 3)
    yield table
    table.close(keep=False)


def kept(tmp_path):
    return [[record.request_id for record in one.records] for one in unfinished(tmp_path)]


def test_a_living_owners_table_is_no_orphan(table, tmp_path):
    table.add(record())
    assert unfinished(tmp_path) == []


def test_what_is_left_is_found_with_the_next_sequence_number(table, tmp_path):
    for number in range(3):
        table.add(record(number))
    table.remove("req-1")
    table.set_next_seq(17)
    table.close(keep=True)
    (found,) = unfinished(tmp_path)
    assert (found.producer, found.epoch, found.next_seq) == ("gw0", 3, 17)
    assert sorted(found.records, key=lambda one: one.request_id) == [record(0), record(2)]


def test_nothing_left_leaves_no_file(table, tmp_path):
    table.add(record())
    assert table.used
    table.remove("req-0")
    table.remove("of another")
    assert not table.used
    table.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_it_grows(table, tmp_path):
    for number in range(3000):
        table.add(record(number))
    for number in range(2990):
        table.remove(f"req-{number}")
    table.close(keep=True)
    assert sorted(kept(tmp_path)[0]) == [f"req-{n}" for n in range(2990, 3000)]


def test_a_torn_slot_is_none(table, tmp_path):
    table.add(record())
    table.close(keep=True)
    content = bytearray(table.path.read_bytes())
    content[40] ^= 1
    table.path.write_bytes(content)
    assert kept(tmp_path) == [[]]


def test_a_record_that_does_not_fit_is_refused(table):
    long = msgspec.structs.replace(record(), model="m" * SLOT_BYTES)
    with pytest.raises(MarketFault, match="does not fit"):
        table.add(long)
    assert not table.used


def test_the_kernel_keeps_what_a_killed_process_wrote(tmp_path):
    program = """
import os, sys
from pathlib import Path
from market.ledger.inflight import InflightTable
from tests.unit.test_inflight import record
table = InflightTable(Path(sys.argv[1]), "gw9", 1)
for number in range(5):
    table.add(record(number))
table.remove("req-0")
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert unfinished(tmp_path) == []
        os.kill(process.pid, signal.SIGKILL)
    (found,) = kept(tmp_path)
    assert sorted(found) == [f"req-{n}" for n in range(1, 5)]
