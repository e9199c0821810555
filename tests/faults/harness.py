"""Kills a real ledger and its producers again and again, and checks what is left.

One case is one seed. The ledger and each producer are forked processes that really die (SIGKILL at
a named point, or at any moment); they speak over a Unix socket that drops, doubles and delays.
Meanwhile plain pandas, DuckDB and Polars read the Parquet files. In the end everything that was
accepted must be booked once, to the last digit, and ``ledger verify`` must find nothing.

Forking a process with everything imported keeps a case under a second or two.
"""

import asyncio
import logging
import multiprocessing
import os
import pickle
import random
import signal
import struct
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import msgspec
import pandas as pd
import polars as pl

from market import crash, pricing
from market.config import Config, UsageSync
from market.errors import MarketError, Overloaded
from market.ledger import producer as producing
from market.ledger.producer import Producer
from market.ledger.service import Ledger
from market.ledger.verify import verify
from market.types import FinishReason, HoldChange, Lane, TokenCounts, UsageQuality
from tests.samples import CARD, deposit, hold_request, token_record

LEDGER_POINTS = (
    *("before-commit", "committed", "staged", "prepared", "renamed", "synced", "published"),
    *("repaired", "repair-renamed", "compact-built", "compact-prepared", "compact-exchanged"),
    *("compact-committed", "compact-buried", "settle-lines", "settle-file", "settle-commit"),
)
RECORD_POINTS = ("spooled", "acknowledged")
SWEEP_POINTS = ("swept", "recovered")
START = datetime(2026, 10, 30, 12, 0, tzinfo=UTC)
DEADLINE_S = 180.0
TENANTS = ("acme", "bolt", "coil")
REASONS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.PROVIDER_ERROR)


class SteppingClock:
    """Wall time from a file that the case advances, also backwards; durations are real."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def now(self):
        with suppress(FileNotFoundError, ValueError):
            self._last = START + timedelta(seconds=float(self._path.read_text()))
        return self._last + timedelta(milliseconds=time.monotonic() * 1000 % 1000)

    def monotonic(self):
        return time.monotonic()

    _last = START


@dataclass
class Case:
    """A seed's plan."""

    seed: int
    home: Path
    rng: random.Random = field(init=False)
    kills: int = 0
    points: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    missing_files: int = 0

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.config = Config(self.home, "http://127.0.0.1:1")
        self.socket = self.home / "s"
        self.clock_file = self.home / "clock"
        self.set_clock(0)
        self.producers = [f"gw{n}" for n in range(self.rng.randint(1, 2))]
        self.records = self.rng.randint(20, 60)
        self.sync = self.rng.choice(list(UsageSync))

    def set_clock(self, seconds):
        fresh = self.clock_file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self.clock_file)
        self.elapsed = seconds


# -- the ledger's process -------------------------------------------------------------------


def ledger_process(case: Case, plan: str) -> None:
    crash.arm(plan)
    asyncio.run(_serve_ledger(case))


class TorturedLedger(Ledger):
    """The real one, but it verifies in its own process (starting another takes two seconds) and
    draws no statements.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case.config, SteppingClock(case.clock_file))
        self._auditor._in_own_process = _verify_here

    async def _write_statements(self, period):
        return 0


async def _verify_here(picture):
    finding, looked_at = await asyncio.to_thread(verify, picture)
    return {"finding": finding and asdict(finding), **looked_at}


async def _serve_ledger(case: Case) -> None:
    ledger = TorturedLedger(case)
    await ledger.open()
    stop = asyncio.Event()

    async def answer(reader, writer):
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = struct.unpack("<I", await reader.readexactly(4))[0]
                method, arguments = pickle.loads(await reader.readexactly(size))
                if method == "stop":
                    stop.set()
                    return
                try:
                    result = (True, await getattr(ledger, method)(*arguments))
                except MarketError as error:
                    result = (False, error)
                content = pickle.dumps(result)
                writer.write(struct.pack("<I", len(content)) + content)
                await writer.drain()

    async def work():
        while True:
            await asyncio.sleep(0.04)
            await ledger.publish()
            await ledger.keep_house()

    case.socket.unlink(missing_ok=True)
    async with await asyncio.start_unix_server(answer, case.socket):
        working = asyncio.create_task(work())
        await stop.wait()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await ledger.close()


class Wire:
    """The ledger as a client sees it through a bad network; safe commands only."""

    def __init__(self, case: Case, rng: random.Random | None = None) -> None:
        self._socket = case.socket
        self._rng = rng

    def __getattr__(self, method):
        async def call(*arguments):
            return await self._call(method, arguments)

        return call

    async def _call(self, method, arguments):
        trouble = self._rng.random() if self._rng else 1.0
        if trouble < 0.05:  # sent twice, the second answer counts
            await self._once(method, arguments)
        result = await self._once(method, arguments)
        if trouble > 0.95 and self._rng:
            raise Overloaded("the answer was lost", retry_after_s=0.001)
        return result

    async def _once(self, method, arguments):
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket)
            try:
                content = pickle.dumps((method, arguments))
                writer.write(struct.pack("<I", len(content)) + content)
                await writer.drain()
                size = struct.unpack("<I", await reader.readexactly(4))[0]
                done, value = pickle.loads(await reader.readexactly(size))
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Overloaded("no ledger answers", retry_after_s=0.01) from error
        if not done:
            raise value
        return value


async def patiently(call, *arguments):
    """Repeat a safe command until the ledger answers."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return await call(*arguments)
        except Overloaded:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


# -- a producer's process -------------------------------------------------------------------


def producer_process(case: Case, name: str, life: int, plan: str) -> None:
    crash.arm(plan)
    producing.BATCH_DELAY_S = 0.003
    asyncio.run(_produce(case, name, life))


async def _produce(case: Case, name: str, life: int) -> None:
    rng = random.Random(f"{case.seed}/{name}/{life}")
    wire = Wire(case, rng)
    producer = Producer(wire, name, case.config.spool_dir, case.sync)
    await patiently(producer.start)
    slices: dict[str, Slice] = {}
    with (
        (case.home / f"begun-{name}").open("a") as begun,
        (case.home / f"attempted-{name}").open("a") as attempted,
        (case.home / f"accepted-{name}").open("a") as accepted,
    ):
        under_way = []
        for _ in range(case.records):
            record = await _served(wire, producer, rng, slices)
            producer.begin(_unfinished(record))
            os.write(begun.fileno(), f"{record.request_id} 0\n".encode())
            under_way.append(record)
            if rng.random() < 0.3:  # several are under way when the process dies
                continue
            rng.shuffle(under_way)
            while under_way:
                record = under_way.pop()
                line = f"{record.request_id} {record.charge_pico}\n"
                os.write(attempted.fileno(), line.encode())
                await producer.record(record)
                os.write(accepted.fileno(), line.encode())
            if rng.random() < 0.1:
                await asyncio.sleep(0.002)
        for record in under_way:
            line = f"{record.request_id} {record.charge_pico}\n"
            os.write(attempted.fileno(), line.encode())
            await producer.record(record)
            os.write(accepted.fileno(), line.encode())
    await producer.stop()
    for held in slices.values():
        await patiently(wire.end_hold, name, producer.identity()[1], held.hold_id)
    (case.home / f"finished-{name}").touch()


@dataclass
class Slice:
    """What a producer has reserved of a tenant's money."""

    hold_id: str
    granted_pico: int
    spent_pico: int = 0
    version: int = 0


async def _served(wire, producer, rng, slices):
    """A finished request that its tenant's slice can pay."""
    name, epoch = producer.identity()
    tenant = rng.choice(TENANTS)
    counts = TokenCounts(rng.randint(1, 500), 0, rng.randint(1, 200))
    reason = rng.choice(REASONS)
    charge_pico = pricing.charge(counts, CARD, reason, Lane.TOKENS)
    hold_id = f"slice-{name}-{epoch}-{tenant}"
    request = hold_request(
        hold_id,
        producer=name,
        epoch=epoch,
        tenant_id=tenant,
        wanted_pico=10**9,
        minimum_pico=10**9,
    )
    if tenant not in slices:
        result = await patiently(wire.open_hold, request)
        assert result.hold is not None, result
        slices[tenant] = Slice(hold_id, 10**9)
    held = slices[tenant]
    if held.spent_pico + charge_pico > held.granted_pico or rng.random() < 0.05:
        held.version += 1
        wanted = held.spent_pico + charge_pico + rng.choice((0, 10**8, 10**9))
        held.granted_pico = min(held.granted_pico, wanted)
        change = HoldChange(hold_id, held.version, wanted, wanted)
        result = await patiently(wire.resize_hold, name, epoch, change)
        assert result.hold is not None, result
        held.granted_pico = wanted
    held.spent_pico += charge_pico
    return token_record(
        request,
        request_id=producer.next_request_id(),
        counts=counts,
        finished_at=datetime.now(UTC),
        charge_pico=charge_pico,
        finish_reason=reason,
    )


def _unfinished(record):
    """What is booked of it if its process dies."""
    return msgspec.structs.replace(
        record,
        input_tokens=0,
        output_tokens=0,
        charge_pico=0,
        finish_reason=FinishReason.MARKET_FAULT,
        usage_quality=UsageQuality.RECOVERED,
    )


# -- the case -------------------------------------------------------------------------------


# Readers have threads (polars, arrow), which a fork does not survive: children are forked from a
# process that has imported all this and done nothing.
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload([__name__])


class Child:
    """A process of its own."""

    def __init__(self, work, *arguments) -> None:
        self.plan = arguments[-1]
        self.killed_by_case = False
        self._process = _forking.Process(target=_in_child, args=(work, arguments))
        self._process.start()

    @property
    def status(self) -> int | None:
        """How it ended; less than zero: by that signal."""
        return self._process.exitcode

    def alive(self) -> bool:
        return self._process.is_alive()

    def died_at(self) -> str:
        return "any moment" if self.killed_by_case else self.plan.split(":")[0]

    def kill(self) -> None:
        if self.alive():
            self._process.kill()
            self._process.join()


def _in_child(work, arguments) -> None:
    logging.disable(logging.CRITICAL)
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001  # the parent sees the exit code
        with (arguments[0].home / "failures").open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def run_case(seed: int, home: Path, point: str | None = None) -> Case:
    """Run a seed; raises AssertionError with the seed if anything is lost, doubled or wrong."""
    home.mkdir(parents=True)
    case = Case(seed, home)
    children: list[Child] = []
    try:
        asyncio.run(_prepare(case))
        _torture(case, children, point)
        _finish(case, children)
        _check(case)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        for child in children:
            child.kill()
    return case


async def _prepare(case: Case) -> None:
    ledger = TorturedLedger(case)
    await ledger.open()
    for tenant in TENANTS:
        await ledger.create_tenant(tenant)
        await ledger.transfer(deposit("100", f"deposit-{tenant}", tenant))
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.close()


def _torture(case: Case, children: list[Child], point: str | None) -> None:
    rng = case.rng
    lives = dict.fromkeys(case.producers, 0)
    ledger_kills = rng.randint(2, 4)
    producer_kills = {name: rng.randint(0, 2) for name in case.producers}
    ledger = None
    running: dict[str, Child] = {}
    reader = Reader(case)
    deadline = time.monotonic() + DEADLINE_S
    while not all((case.home / f"finished-{name}").exists() for name in case.producers):
        assert time.monotonic() < deadline, "the producers did not come to an end"
        if ledger is None or not ledger.alive():
            if ledger is not None:
                _note_death(case, ledger)
            prepared = ledger is not None and ledger.died_at() == "prepared"
            plan = _plan(rng, LEDGER_POINTS, point, prepared) if ledger_kills > 0 else ""
            ledger_kills -= 1
            ledger = Child(ledger_process, case, plan)
            children.append(ledger)
        for name in case.producers:
            ended = name not in running or not running[name].alive()
            # Looked for after that: it may have finished just now.
            if (case.home / f"finished-{name}").exists():
                continue
            if ended:
                if name in running:
                    _note_death(case, running[name])
                producer_kills[name] -= 1
                points = SWEEP_POINTS if lives[name] else RECORD_POINTS  # at first nothing is left
                plan = _plan(rng, points) if producer_kills[name] >= 0 else ""
                running[name] = Child(producer_process, case, name, lives[name], plan)
                lives[name] += 1
                children.append(running[name])
        if point is None and rng.random() < 0.03 and ledger_kills > 0:
            ledger.killed_by_case = True
            ledger.kill()  # at any moment, named or not
        if rng.random() < 0.03:
            step = rng.choice((86_400, 86_400, 3_600, -7_200))
            case.set_clock(min(max(0, case.elapsed + step), 25 * 86_400))
        if rng.random() < 0.3:
            reader.read()
        else:
            time.sleep(0.004)
    case.missing_files = reader.missing


def _plan(rng: random.Random, points, point: str | None = None, prepared: bool = False) -> str:
    """Where to die; ``prepared`` tells that the last life left something to repair."""
    chosen = point or rng.choice(points)
    if chosen.startswith("repair") and not prepared:
        return "prepared:1"
    if chosen.startswith("repair") or chosen in SWEEP_POINTS:  # once in a life, as a rule
        return f"{chosen}:1"
    most = 60 if chosen in ("before-commit", "committed", "spooled") else 3
    return f"{chosen}:{rng.randint(1, most)}"


def _note_death(case: Case, child: Child) -> None:
    if child.status != -signal.SIGKILL:
        failures = case.home / "failures"
        text = failures.read_text()[-2000:] if failures.exists() else ""
        raise AssertionError(f"a process ended with {child.status}: {text}")
    case.kills += 1
    point = child.died_at()
    case.points[point] = case.points.get(point, 0) + 1


def _finish(case: Case, children: list[Child]) -> None:
    """Settle over crashes, then close in good order."""
    case.set_clock(case.elapsed + 32 * 86_400)
    points = [p for p in LEDGER_POINTS if p.startswith(("settle", "compact"))]
    for plan in (f"{points[case.seed % len(points)]}:1", ""):
        for child in children:
            child.kill()
        ledger = Child(ledger_process, case, plan)
        children.append(ledger)
        asyncio.run(_settle(case, ledger))
        if not ledger.alive():
            _note_death(case, ledger)
    asyncio.run(_stop(case, ledger))


async def _settle(case: Case, ledger: Child) -> None:
    """Compact, then settle month by month; the last is the one before that of the clock."""
    compacted = False
    month = START
    last = START + timedelta(seconds=case.elapsed)
    while ledger.alive() and f"{month:%Y-%m}" < f"{last:%Y-%m}":
        try:
            if not compacted:
                await Wire(case).compact()
                compacted = True
            await Wire(case).settle(f"{month:%Y-%m}", "key-op", False)
            month = month.replace(day=1) + timedelta(days=32)
        except Overloaded:
            await asyncio.sleep(0.01)
    if ledger.alive():
        return
    assert ledger.status == -signal.SIGKILL, f"settling ended with {ledger.status}"


async def _stop(case: Case, ledger: Child) -> None:
    with suppress(Overloaded):
        await Wire(case)._once("stop", ())
    deadline = time.monotonic() + DEADLINE_S
    while ledger.alive():
        assert time.monotonic() < deadline, "the ledger did not close"
        await asyncio.sleep(0.01)
    assert ledger.status == 0, f"the ledger ended with {ledger.status}"


class Reader:
    """Plain readers, one after the other, that must never see anything wrong."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._folder = case.config.ledger_dir / "usage"
        self._seen = 0
        self.missing = 0

    def read(self) -> None:
        engine = self._case.rng.choice((_with_pandas, _with_duckdb, _with_polars))
        try:
            lsns = engine(self._folder)
        except FileNotFoundError:
            self.missing += 1
            return
        except (duckdb.IOException, pl.exceptions.ComputeError) as error:
            if not any(words in str(error) for words in ("No such file", "No files found")):
                raise
            self.missing += 1
            return
        self._case.reads += 1
        assert len(set(lsns)) == len(lsns), f"{engine.__name__} read rows twice"
        present = set(lsns)
        # Rows that an earlier read had must be there; a newer part may show before an older one.
        absent = [lsn for lsn in range(1, self._seen + 1) if lsn not in present]
        assert not absent, f"{engine.__name__} misses rows {absent[:5]} of {self._seen}"
        while self._seen + 1 in present:
            self._seen += 1


def _with_pandas(folder):
    return pd.read_parquet(folder, columns=["lsn"])["lsn"].tolist()


def _with_duckdb(folder):
    rows = duckdb.sql(f"select lsn from read_parquet('{folder}/**/*.parquet')").fetchall()
    return [row[0] for row in rows]


def _with_polars(folder):
    return pl.scan_parquet(f"{folder}/**/*.parquet").select("lsn").collect()["lsn"].to_list()


def _check(case: Case) -> None:
    """Nothing lost, nothing doubled, every pico unit in its place."""
    usage = pd.read_parquet(case.config.ledger_dir / "usage")
    tokens = usage[usage["kind"] == "tokens"]
    booked = dict(zip(tokens["request_id"], tokens["charge"], strict=True))
    assert len(booked) == len(tokens), "a request is there twice"
    assert sorted(usage["lsn"]) == list(range(1, len(usage) + 1)), "rows are not contiguous"
    accepted, attempted, begun = {}, {}, {}
    for name in case.producers:
        begun |= _read_log(case.home / f"begun-{name}")
        accepted |= _read_log(case.home / f"accepted-{name}")
        attempted |= _read_log(case.home / f"attempted-{name}")
    for request_id, charge in accepted.items():
        assert booked.get(request_id) == charge, f"{request_id}: {booked.get(request_id)}, {charge}"
    assert set(begun) <= set(booked), "a request was forgotten"
    recovered = set(tokens[tokens["usage_quality"] == "recovered"]["request_id"])
    assert set(booked) <= set(attempted) | recovered, "rows that nobody sent"
    asyncio.run(_check_books(case, sum(usage["charge"], Decimal(0))))


def _read_log(path: Path) -> dict[str, Decimal]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {request_id: Decimal(pico).scaleb(-12) for request_id, pico in lines}


async def _check_books(case: Case, charged: Decimal) -> None:
    ledger = TorturedLedger(case)
    await ledger.open()
    for name in case.producers:
        await ledger.register_producer(name)  # whatever is open ends
    accounts = {account.account_id: account for account in await ledger.accounts()}
    assert sum(a.debits_pico for a in accounts.values()) == sum(
        a.credits_pico for a in accounts.values()
    )
    assert all(account.held_pico == 0 for account in accounts.values()), "money stays held"
    left = sum(accounts[f"tenant:{tenant}"].balance_pico for tenant in TENANTS)
    assert 300 * 10**12 - left == int(charged.scaleb(12)), "balances and rows differ"
    report = await ledger.verify()
    assert report["finding"] is None, report["finding"]
    await ledger.close()
