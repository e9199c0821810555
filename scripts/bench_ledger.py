#!/usr/bin/env python3
"""The usage ledger beside the bare limits of its parts, in one run on this machine.

What is compared takes turns, round by round; each aim says whether it was met. Rows are like a
market's: Zipf tenants, charges that follow from rate cards and draw on slices. Best run on
an idle machine. It starts a Ray head of its own and ends it.

    .venv/bin/python scripts/bench_ledger.py [--quick] [--only ingest,ack] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from market import pricing
from market.accounts import CASH, Transfer, TransferKind, tenant_account
from market.clock import SystemClock
from market.cluster import node
from market.config import Config
from market.ledger import manifest, publisher, settling, snapshot
from market.ledger.inflight import InflightTable
from market.ledger.manifest import Dataset
from market.ledger.producer import BATCH_DELAY_S, FULL_BATCH, REQUESTS_PER_EPOCH, Producer
from market.ledger.schema import BATCH, MONEY, decode, encode, encode_batch
from market.ledger.service import Ledger
from market.ledger.spool import Spool
from market.metering import Admission, Ask, Meter, make_record
from market.ports import Clock
from market.routing import Choice
from market.slices import PurseKey
from market.types import (
    CURRENCY,
    EngineChunk,
    FinishReason,
    HoldRequest,
    Lane,
    Principal,
    RecordKind,
    Role,
    Route,
    Sampling,
    TokenCounts,
    UsageQuality,
    UsageRecord,
)

BATCHES = (1, 100, 1_000, 10_000)
CLIENTS = 4
BUILD_BATCH = 16_384
MONTH, MONTH_END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
DAYS = (MONTH_END - MONTH).days
NEVER_S = 1e9
TOKEN_IDS = tuple(range(300))
SPAWN = multiprocessing.get_context("spawn")

TENANTS = [f"tenant-{n:02d}" for n in range(50)]
KEYS = [f"key-{tenant}-{n}" for tenant in TENANTS for n in range(2)]
PROVIDERS = ["northern", "harbour", "atlas"]
MODELS = ["qwen3-8b", "llama-3.3-70b", "deepseek-v3"]
PRICES = ((100_000, 25_000, 300_000), (550_000, 140_000, 790_000), (280_000, 28_000, 1_100_000))
CARDS = [
    pricing.make_rate_card(model, prices, datetime(2025, 1, 1, tzinfo=UTC), CURRENCY)
    for model, prices in zip(MODELS, PRICES, strict=True)
]
# The first model is served in two places, the others in one.
DEPLOYMENTS = ["qwen3-8b-1", "qwen3-8b-2", "llama-3.3-70b-1", "deepseek-v3-1"]
MODEL_OF, PROVIDER_OF = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
GPUS = ["l40s", "h100-80gb", "h100-80gb", "h200"]
ENDINGS, ENDING_SHARES = ["stop", "length", "tool_calls", "client_disconnect"], (0.8, 0.12, 0.05)
ALWAYS = {"kind": "tokens", "lane": "tokens", "usage_quality": "engine", "currency": CURRENCY}
BARE_SUMS = (
    "SELECT tenant_id, provider_id, model, lane, kind, price_id, currency, count(*), "
    "sum(input_tokens), sum(cached_input_tokens), sum(output_tokens), sum(gpu_us), sum(charge) "
    "FROM read_parquet($files, hive_partitioning = false) GROUP BY ALL"
)
AUDIT = (
    "SELECT producer, epoch, max(seq) - min(seq) + 1 - count(*), min(lsn), max(lsn), count(*) "
    "FROM read_parquet($files, hive_partitioning = false) GROUP BY ALL"
)


@dataclass(frozen=True)
class Scale:
    """How long and how much."""

    seconds: float = 3.0
    rounds: int = 3
    seal_s: float = publisher.SEAL_INTERVAL_S
    actor_s: float = 10.0
    metered: int = 51_200
    ack_s: float = 30.0
    bytes_rows: int = 400_000
    rows: int = 10_000_000
    restart_rows: int = 1_000_000


QUICK = Scale(0.4, 2, 1.0, 1.0, 5_120, 3.0, 20_000, 310_000, 50_000)


class SetClock(SystemClock):
    """A clock that shows what it was set to."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self) -> datetime:
        """The time it was set to."""
        return self.moment


# -- rows ------------------------------------------------------------------------------------


class Traffic:
    """What one gateway records: rows in the order answers end, ids in the order requests came."""

    def __init__(self, name: str, epoch: int = 1, per_s: float = 1_000, ordered: bool = False):
        self.name, self.epoch, self.next_seq = name, epoch, 0
        self.per_s, self.ordered = per_s, ordered
        self.now_us = int(MONTH.timestamp() * 1e6)
        self._random = np.random.default_rng(zlib.crc32(name.encode()) + epoch)
        self._next_request = epoch * REQUESTS_PER_EPOCH + 1
        weights = 1 / np.arange(1, len(TENANTS) + 1) ** 1.1
        self._weights = weights / weights.sum()

    def rows(self, count: int) -> pa.RecordBatch:
        """The next ``count`` rows. With ``ordered``, answers end as their requests came."""
        random = self._random
        tenant = random.choice(len(TENANTS), count, p=self._weights)
        key = 2 * tenant + (random.random(count) < 0.3)
        model = key % len(MODELS)
        place = np.where(model == 0, random.integers(0, 2, count), model + 1)
        fresh = np.clip(random.lognormal(6, 1, count), 1, 30_000).astype(np.int64)
        cached = np.where(random.random(count) < 0.3, fresh * 2 // 16 * 16, 0)
        output = np.clip(random.lognormal(5, 0.8, count), 1, 4_000).astype(np.int64)
        ttft = 20 + random.lognormal(3.5, 0.6, count).astype(np.int64)
        duration = ttft + (output * random.uniform(8, 20, count)).astype(np.int64)
        gaps_us = random.exponential(1e6 / self.per_s, count).astype(np.int64)
        finished = self.now_us + np.cumsum(gaps_us)
        started = finished - duration * 1_000 - random.integers(0, 1_000, count)
        arrival = np.arange(count) if self.ordered else np.argsort(np.argsort(started))
        requests = pa.array(self._next_request + arrival).cast(pa.string())
        rates = np.array(PRICES)[model]
        words = np.zeros((count, 2), np.int64)
        words[:, 0] = fresh * rates[:, 0] + cached * rates[:, 1] + output * rates[:, 2]
        ending = random.choice(4, count, p=(*ENDING_SHARES, 1 - sum(ENDING_SHARES)))
        nodes = [f"node-{name}" for name in PROVIDERS]
        slices = [self.slice_of(name) for name in TENANTS]
        columns = {
            **{name: pa.repeat(value, count) for name, value in ALWAYS.items()},
            "request_id": pc.binary_join_element_wise(f"req-{self.name}", requests, "-"),
            "tenant_id": pa.array(TENANTS).take(pa.array(tenant)),
            "api_key_id": pa.array(KEYS).take(pa.array(key)),
            "model": pa.array(MODELS).take(pa.array(model)),
            "deployment_id": pa.array(DEPLOYMENTS).take(pa.array(place)),
            "slice_id": pa.array(slices).take(pa.array(tenant)),
            "provider_id": pa.array(PROVIDERS).take(pa.array(PROVIDER_OF[place])),
            "node_id": pa.array(nodes).take(pa.array(PROVIDER_OF[place])),
            "gpu_type": pa.array(GPUS).take(pa.array(place)),
            "gpu_milli": pa.repeat(1_000, count),
            "started_at": pa.array(started),
            "finished_at": pa.array(finished),
            "input_tokens": pa.array(fresh + cached),
            "cached_input_tokens": pa.array(cached),
            "output_tokens": pa.array(output),
            "claimed_output_tokens": pa.array(output),
            "queue_ms": pa.array(random.integers(1, 5, count)),
            "ttft_ms": pa.array(ttft),
            "duration_ms": pa.array(duration),
            "finish_reason": pa.array(ENDINGS).take(pa.array(ending)),
            "price_id": pa.array([card.price_id for card in CARDS]).take(pa.array(model)),
            "charge": pa.Array.from_buffers(MONEY, count, [None, pa.py_buffer(words)]),
        }
        self.now_us = int(finished[-1])
        self._next_request += count
        nothing = [None] * count
        arrays = [
            columns[f.name].cast(f.type) if f.name in columns else pa.array(nothing, f.type)
            for f in BATCH
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=BATCH)

    def payloads(self, size: int, count: int) -> list[bytes]:
        """The next ``count`` batches of ``size`` rows, as a producer sends them."""
        rows = self.rows(size * count)
        return [encode(rows.slice(n * size, size)) for n in range(count)]

    async def send(self, ledger: Any, payload: bytes) -> None:
        """Have a batch booked."""
        self.next_seq = await ledger.append(self.name, self.epoch, self.next_seq, payload)

    def slice_of(self, tenant_id: str) -> str:
        """The slice on which this gateway's records of a tenant draw."""
        return f"slice-{self.name}-{self.epoch}-{tenant_id}"

    def hold(self, tenant_id: str) -> HoldRequest:
        """A slice large enough for the whole run."""
        money = (10**6 * pricing.PICO, 10**6 * pricing.PICO)
        owner = (self.slice_of(tenant_id), self.name, self.epoch, tenant_id)
        return HoldRequest(*owner, *money, MODELS[0], Lane.TOKENS, CURRENCY, MONTH)


def distinct(size: int) -> int:
    """How many different batches are made before the clock starts; then they come again."""
    return max(16, min(256, 200_000 // size))


async def stock(ledger: Any) -> None:
    """Prices, providers, and tenants with money."""
    await ledger.add_rate_cards(CARDS, only_new_models=False)
    for provider in PROVIDERS:
        await ledger.create_provider(provider)
    for tenant in TENANTS:
        await ledger.create_tenant(tenant)
        deposit = (f"deposit-{tenant}", TransferKind.DEPOSIT, CASH, tenant_account(tenant))
        await ledger.transfer(Transfer(*deposit, 10**9 * pricing.PICO, CURRENCY, "bench", "bench"))


async def join(ledger: Any, name: str, per_s: float = 1_000, ordered: bool = False) -> Traffic:
    """A gateway with a new epoch and a shared hold for each tenant."""
    gateway = Traffic(name, await ledger.register_producer(name), per_s, ordered)
    held = await asyncio.gather(*(ledger.open_hold(gateway.hold(t)) for t in TENANTS))
    assert all(result.hold for result in held)
    return gateway


async def opened(home: Path, seal_s: float, clock: Clock | None = None) -> Ledger:
    """A ledger in this process that publishes every ``seal_s``."""
    publisher.SEAL_INTERVAL_S = seal_s
    ledger = Ledger(Config(home, ""), clock or SystemClock())
    await ledger.open()
    return ledger


# -- figures ---------------------------------------------------------------------------------


@dataclass
class Report:
    """Prints tables and aims, and keeps them for the JSON file."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    aims: list[dict[str, Any]] = field(default_factory=list)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print rows under ``columns``; the first column is text."""
        self.tables[title] = [dict(zip(columns, row, strict=True)) for row in rows]
        cells = [list(columns), *([shown(value) for value in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print(f"\n{title}")
        for first, *others in cells:
            padded = map(str.rjust, others, widths[1:])
            print("  " + "  ".join([first.ljust(widths[0]), *padded]), flush=True)

    def aim(self, what: str, sign: str, wanted: float, unit: str, found: float) -> None:
        """Print whether an aim was met."""
        met = found >= wanted if sign == ">=" else found <= wanted
        self.aims.append({"what": what, "aim": f"{sign} {wanted} {unit}", "found": found})
        self.aims[-1]["met"] = bool(met)
        answer = f"{shown(found)} {unit} {'yes' if met else 'no'}"
        print(f"  {what}: aim {sign} {shown(wanted)} {unit}: {answer}", flush=True)


def shown(value: Any) -> str:
    """A figure as it is printed."""
    if not isinstance(value, float | int):
        return "" if value is None else str(value)
    digits = 0 if value == int(value) or abs(value) >= 1_000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What the coroutine ``work`` returns in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(_run, work, *arguments).result()


def _run(work: Callable[..., Any], *arguments: Any) -> Any:
    return asyncio.run(work(*arguments))


def peak_mib() -> float:
    """Most memory this process had. (ru_maxrss would count what its parent had at the fork.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# -- ingest ----------------------------------------------------------------------------------

Load = tuple[int, float, float]
"""Rows acknowledged between two readings of the machine's monotonic clock."""


async def load(
    ledger: Any, names: Sequence[str], size: int, seconds: float, processes: int = 1
) -> Load:
    """Gateways that each keep one batch under way, beginning with those of other processes."""
    gateways = [await join(ledger, name) for name in names]
    payloads = [gateway.payloads(size, distinct(size)) for gateway in gateways]
    if processes > 1:
        await asyncio.to_thread(_barrier.wait, 300)
    began_s = time.monotonic()

    async def drive(gateway: Traffic, batches: list[bytes]) -> None:
        for batch in itertools.cycle(batches):
            if time.monotonic() - began_s >= seconds:
                return
            await gateway.send(ledger, batch)

    await asyncio.gather(*map(drive, gateways, payloads))
    return sum(gateway.next_seq for gateway in gateways), began_s, time.monotonic()


def rate(*loads: Load) -> float:
    """Rows per second of loads that ran at the same time."""
    rows, began_s, ended_s = zip(*loads, strict=True)
    return sum(rows) / (max(ended_s) - min(began_s))


def bare_sqlite(folder: Path, size: int, seconds: float) -> float:
    """Rows/s of one transaction per batch: the same bytes and one high-water row."""
    payloads = Traffic("gw0").payloads(size, distinct(size))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        connection = sqlite3.connect(f"{place}/bare.db", isolation_level=None)
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("CREATE TABLE journal (entry INTEGER PRIMARY KEY, usage BLOB)")
        connection.execute("CREATE TABLE producers (producer TEXT PRIMARY KEY, next_seq INTEGER)")
        connection.execute("INSERT INTO producers VALUES ('gw0', 0)")
        done, began_s = 0, time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            connection.execute("BEGIN IMMEDIATE")
            batch = payloads[done % len(payloads)]
            connection.execute("INSERT INTO journal VALUES (?, ?)", (done, batch))
            done += 1
            high = (done * size, "gw0")
            connection.execute("UPDATE producers SET next_seq = ? WHERE producer = ?", high)
            connection.execute("COMMIT")
        passed_s = time.perf_counter() - began_s
        connection.close()
    return done * size / passed_s


def bare_parquet(folder: Path, seconds: float) -> float:
    """Rows/s of the publisher's Parquet writer: parts of as many rows as it seals, no sync."""
    size = manifest.ROWS_PER_PART // 64
    named = {"producer": "gw0", "epoch": 1, "booked_at": MONTH}
    entries: list[Any] = [
        SimpleNamespace(**named, usage=payload, lsn_lo=1 + n * size, first_seq=n * size)
        for n, payload in enumerate(Traffic("gw0").payloads(size, 64))
    ]
    table = manifest.entries_table(Dataset.USAGE, entries)
    done, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        with publisher.writer(folder / "bare.parquet", Dataset.USAGE) as parquet:
            parquet.write_table(table)
        done += table.num_rows
    return done / (time.perf_counter() - began_s)


async def below(scale: Scale, folder: Path, size: int, rates: dict[str, list[float]]) -> None:
    """The ledger in this process, in turns with the bare limits."""
    ledger = await opened(folder / "quiet", NEVER_S)
    await stock(ledger)
    for _ in range(scale.rounds):
        rates["SQLite"].append(bare_sqlite(folder, size, scale.seconds))
        rates["Parquet writer"].append(bare_parquet(folder, scale.seconds / 3))
        for count in (1, 8):
            loaded = await load(ledger, [f"gw{n}" for n in range(count)], size, scale.seconds)
            rates[f"below the actor, {count} at once"].append(rate(loaded))


async def sealing(scale: Scale, folder: Path, size: int, rates: dict[str, list[float]]) -> None:
    """The same with publishing under way, then publishing alone."""
    ledger = await opened(folder / "sealing", scale.seal_s)
    await stock(ledger)
    loaded = await load(ledger, [f"gw{n}" for n in range(8)], size, 3 * scale.seal_s)
    rates[f"8 at once, publishing every {scale.seal_s:g} s"].append(rate(loaded))
    status = await ledger.status()
    left = status["next_lsn"] - 1 - status["sealed_until"]
    began_s = time.perf_counter()
    await ledger.close()
    if left >= manifest.ROWS_PER_PART:
        rates["publishing the rest alone"].append(left / (time.perf_counter() - began_s))


def through(
    clients: "Clients", scale: Scale, folder: Path, size: int, rates: dict[str, list[float]]
) -> None:
    """The ledger in its actor, which publishes as ever, in turns with SQLite."""
    names = [f"gw{n}" for n in range(CLIENTS)]
    ways = {"1 client": [names[:1]], f"{CLIENTS} tasks of 1 process": [names]}
    ways[f"{CLIENTS} processes"] = [[name] for name in names]
    for _ in range(scale.rounds):
        rates["SQLite"].append(bare_sqlite(folder, size, scale.seconds))
        for way, groups in ways.items():
            work = (size, scale.actor_s, len(groups))
            jobs = [clients.start(load, group, *work) for group in groups]
            rates[f"actor, {way}"].append(rate(*(job.result() for job in jobs)))
            clients.start(publish).result()


def ingest(scale: Scale, folder: Path, report: Report) -> None:
    """Durable rows/s by size of batch."""
    with Clients(folder / "actor") as clients:
        for size in BATCHES:
            rates: dict[str, list[float]] = defaultdict(list)
            place = folder / f"batch-{size}"
            place.mkdir()
            asyncio.run(below(scale, place, size, rates))
            asyncio.run(sealing(scale, place, size, rates))
            through(clients, scale, place, size, rates)
            shutil.rmtree(place)
            print_ingest(report, size, rates)


def print_ingest(report: Report, size: int, rates: dict[str, list[float]]) -> None:
    """One table per size of batch."""
    middle = {way: median(found) for way, found in rates.items()}
    sqlite, parquet = middle["SQLite"], middle["Parquet writer"]
    payloads = Traffic("gw0").payloads(size, 16)
    parties = [decode(payload).select(["tenant_id", "provider_id"]) for payload in payloads]
    transfers = mean(len({tuple(row.values()) for row in rows.to_pylist()}) for rows in parties)
    row_bytes = sum(map(len, payloads)) / 16 / size
    title = f"ingest, {size:,} rows a batch ({row_bytes:,.0f} B a row, {transfers:.0f} transfers)"
    columns = ("", "rows/s, median", "best", "worst", "% of SQLite", "% of Parquet")
    rows = [
        (way, found, max(rates[way]), min(rates[way]), 100 * found / sqlite, 100 * found / parquet)
        for way, found in middle.items()
    ]
    report.table(title, columns, rows)
    if size == 1_000:
        best = max(found for way, found in middle.items() if way.startswith("actor"))
        report.aim("through the actor", ">=", 100_000, "rows/s", best)
        for way in (way for way in middle if way.startswith("below")):
            report.aim(f"{way}, of SQLite", ">=", 60, "%", 100 * middle[way] / sqlite)


# -- the actor and its clients, each in a process of its own ---------------------------------

_barrier: Any = None


class Clients:
    """Processes connected to a Ray head in which the ledger runs as ``market up`` starts it."""

    def __init__(self, home: Path) -> None:
        self._config = Config(home, "")
        self._barrier = SPAWN.Barrier(CLIENTS)
        settings = (self._config, self._barrier)
        self._pool = ProcessPoolExecutor(CLIENTS, SPAWN, _connect, settings)

    def start(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run the coroutine ``work`` of the ledger's proxy and ``arguments`` in a client."""
        return self._pool.submit(_run_client, work, *arguments)

    def __enter__(self) -> "Clients":
        self._config.state_dir.mkdir(parents=True)
        folders = (self._config.state_dir, self._config.logs_dir)
        self._head = node.start_head(*folders, max(8, os.cpu_count() or 1), 0)
        try:
            for ready in [self.start(everybody) for _ in range(CLIENTS)]:
                ready.result()
            self.start(stock).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._barrier.abort()
        with contextlib.suppress(Exception):
            self.start(end).result(60)
        self._pool.shutdown(cancel_futures=True)
        node.stop_head(self._head, self._config.state_dir)
        shutil.rmtree(self._head.temp_dir, ignore_errors=True)


def _connect(config: Config, barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    node.enter_environment(config.state_dir)
    import ray

    from market.cluster.actors import start_service
    from market.services import LEDGER

    head = node.load_head(config.state_dir)
    assert head is not None
    ray.init(head.address, namespace=node.NAMESPACE, log_to_driver=False, logging_level="ERROR")
    start_service(LEDGER, "market.services:make_ledger", config)


def _run_client(work: Callable[..., Any], *arguments: Any) -> Any:
    from market import services

    return asyncio.run(work(services.ledger_client(), *arguments))


async def everybody(_: Any) -> None:
    """Return when all clients are connected."""
    await asyncio.to_thread(_barrier.wait, 300)


async def publish(ledger: Any) -> None:
    """Let the next round begin without a backlog."""
    await ledger.publish()


async def end(_: Any) -> None:
    """End the actor; its head would wait for it."""
    from market.cluster.actors import stop_service
    from market.services import LEDGER

    stop_service(LEDGER)


# -- metering --------------------------------------------------------------------------------


class Instant:
    """A ledger that books nothing and answers at once."""

    async def register_producer(self, producer: str) -> int:
        """Always the first epoch."""
        return 1

    async def append(self, producer: str, epoch: int, first_seq: int, payload: bytes) -> int:
        """All of it is booked."""
        return first_seq + FULL_BATCH


def answered(number: int, gateway: Traffic) -> tuple[Admission, Meter]:
    """A request at its end, as Inference.admit and its stream leave it."""
    hold, card = gateway.hold(TENANTS[number % 7]), CARDS[0]
    who = Principal(f"key-{hold.tenant_id}-0", Role.TENANT, hold.tenant_id)
    place = (PROVIDERS[0], f"node-{PROVIDERS[0]}", GPUS[0], 1_000)
    route = Route(hold.model, hold.lane, DEPLOYMENTS[0], "app", "/model", 8_192, *place)
    draft = UsageRecord(
        kind=RecordKind.TOKENS,
        request_id=f"req-gw0-{REQUESTS_PER_EPOCH + number}",
        tenant_id=hold.tenant_id,
        api_key_id=who.api_key_id,
        model=hold.model,
        lane=hold.lane,
        deployment_id=route.deployment_id,
        provider_id=route.provider_id,
        node_id=route.node_id,
        gpu_type=route.gpu_type,
        gpu_milli=route.gpu_milli,
        started_at=MONTH,
        finished_at=MONTH,
        input_tokens=0,
        cached_input_tokens=0,
        output_tokens=0,
        price_id=card.price_id,
        charge_pico=0,
        currency=CURRENCY,
        finish_reason=FinishReason.MARKET_FAULT,
        usage_quality=UsageQuality.RECOVERED,
        slice_id=hold.hold_id,
    )
    admission = Admission(
        request_id=draft.request_id or "",
        principal=who,
        choice=Choice(route),
        route=route,
        card=card,
        ask=Ask((TOKEN_IDS,), Sampling(256)),
        draft=draft,
        output_limit=256,
        key=PurseKey(hold.tenant_id, hold.model),
        reservation=None,
        started_at=MONTH,
        arrived_s=number / 1_000,
    )
    meter = Meter(admission)
    meter.dispatched_s = number / 1_000 + 0.002
    meter.add(EngineChunk("", TOKEN_IDS, TokenCounts(300, 64, 300)), number / 1_000 + 0.05)
    return admission, meter


async def record(folder: Path, records: Sequence[UsageRecord]) -> None:
    """A whole producer's work on records that end faster than batches leave."""
    producer = Producer(Instant(), "gw1", folder)
    await producer.start()
    for start in range(0, len(records), FULL_BATCH):
        for one in records[start : start + FULL_BATCH]:
            await producer.record(one)
        while producer.unbooked:
            await asyncio.sleep(0)
    await producer.stop()


def metering(scale: Scale, folder: Path, report: Report) -> None:
    """CPU per request at the gateway, part by part."""
    gateway = Traffic("gw0")
    requests = [answered(n, gateway) for n in range(scale.metered)]
    spent: dict[str, list[float]] = defaultdict(list)
    gc.collect()
    gc.freeze()  # a gateway does not keep requests that have ended
    for number in range(scale.rounds + 1):
        marks = [time.process_time()]
        records = [
            make_record(request, meter, FinishReason.STOP, MONTH, request.arrived_s + 2.5)
            for request, meter in requests
        ]
        marks.append(time.process_time())
        table = InflightTable(folder, "gw0", number)
        for start in range(0, len(requests), FULL_BATCH):
            for admission, _ in requests[start : start + FULL_BATCH]:
                table.add(admission.draft)
            for admission, _ in requests[start : start + FULL_BATCH]:
                table.remove(admission.request_id)
        table.close(keep=False)
        marks.append(time.process_time())
        spool = Spool(folder, "gw0", number)
        for one in records:
            seq = spool.append(one)
            if seq % FULL_BATCH == 0:
                spool.trim(seq)
        marks.append(time.process_time())
        for start in range(0, len(records), FULL_BATCH):
            encode_batch(records[start : start + FULL_BATCH])
        marks.append(time.process_time())
        asyncio.run(record(folder / str(number), records))
        marks.append(time.process_time())
        us = [(b - a) / scale.metered * 1e6 for a, b in pairwise(marks)]
        if number:  # the first warms up
            names = (
                *("make_record", "InflightTable.add and remove", "Spool.append and trim"),
                f"encode_batch of {FULL_BATCH}",
            )
            figures = dict(zip((*names, "sum"), (*us[:4], sum(us[:4])), strict=True))
            figures["make_record and a whole Producer"] = us[0] + us[4]
            for name, value in figures.items():
                spent[name].append(value)
    gc.unfreeze()
    rows = [(part, median(us), min(us)) for part, us in spent.items()]
    report.table("metering at the gateway", ("", "us CPU a request, median", "best"), rows)
    report.aim("sum", "<=", 10, "us", rows[4][1])


# -- acknowledgement -------------------------------------------------------------------------


async def pace(ledger: Any, per_s: int, seconds: float) -> tuple[list[float], list[float]]:
    """Batches on a fixed schedule; seconds to the acknowledgement from sending, from being due."""
    gateway = await join(ledger, f"paced-{per_s}", per_s)
    size = min(FULL_BATCH, round(per_s * BATCH_DELAY_S))
    warm_up = per_s // size
    payloads = gateway.payloads(size, warm_up + round(seconds * per_s / size))
    from_sending, from_due = [], []
    began_s = time.monotonic() + 0.1
    for number, payload in enumerate(payloads):
        due_s = began_s + number * size / per_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        sent_s = time.monotonic()
        await gateway.send(ledger, payload)
        from_sending.append(time.monotonic() - sent_s)
        from_due.append(time.monotonic() - due_s)
    return from_sending[warm_up:], from_due[warm_up:]


def ack(scale: Scale, folder: Path, report: Report) -> None:
    """Time to the acknowledgement at a fixed rate, one gateway, through the actor."""
    rows: list[tuple[Any, ...]] = []
    with Clients(folder / "actor") as clients:
        for per_s in (1_000, 10_000):
            timings = clients.start(pace, per_s, scale.ack_s).result()
            for since, waited in zip(("sending", "being due"), timings, strict=True):
                ranks = quantiles([1_000 * s for s in waited], n=100, method="inclusive")
                figures = (len(waited), ranks[49], ranks[89], ranks[98], 1_000 * max(waited))
                rows.append((f"{per_s:,} rows/s, from {since}", *figures))
    columns = ("", "batches", "p50 ms", "p90 ms", "p99 ms", "worst ms")
    report.table(f"acknowledgement through the actor, {scale.ack_s:g} s each", columns, rows)
    report.aim("p99 at 10,000 rows/s, from sending", "<=", 10, "ms", rows[2][4])


# -- bytes -----------------------------------------------------------------------------------


async def kept(home: Path, rows: int, ordered: bool) -> list[tuple[Any, ...]]:
    """A day of four gateways at 500 rows/s each, sealed every 5 s, then compacted."""
    clock = SetClock(MONTH)
    ledger = await opened(home, NEVER_S, clock)
    await stock(ledger)
    gateways = [await join(ledger, f"gw{n}", 500, ordered) for n in range(4)]
    size = round(500 * BATCH_DELAY_S)
    batches = [gateway.payloads(size, rows // 4 // size) for gateway in gateways]
    for number, together in enumerate(zip(*batches, strict=True)):
        clock.moment += timedelta(seconds=BATCH_DELAY_S)
        await asyncio.gather(*(g.send(ledger, b) for g, b in zip(gateways, together, strict=True)))
        if number % round(5 / BATCH_DELAY_S) == 0:
            await ledger.publish()
    await ledger.publish()
    order = "as requests came" if ordered else "as answers end"
    figures = []
    for state in ("parts of 5 s", "compacted"):
        sizes = [_disk_bytes(home / "ledger" / dataset) / rows for dataset in Dataset]
        figures.append((f"rows {order}, {state}", sizes[0], sizes[1], sum(sizes)))
        clock.moment += timedelta(days=1)
        await ledger.compact()
    await ledger.close()
    return figures


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("part-0*.parquet")) or sum(
        path.stat().st_size for path in folder.rglob("compact-*.parquet")
    )


def row_bytes(scale: Scale, folder: Path, report: Report) -> None:
    """Bytes per row on disk, by state and by column."""
    rows = asyncio.run(kept(folder / "came", scale.bytes_rows, True))
    rows += asyncio.run(kept(folder / "ended", scale.bytes_rows, False))
    columns = ("", "usage B/row", "transfers B/row", "together")
    report.table(f"bytes per row of usage, {scale.bytes_rows:,} rows", columns, rows)
    report.aim("usage, compacted, rows as answers end", "<=", 25, "B", rows[3][1])
    (path,) = (folder / "ended" / "ledger" / "usage").rglob("compact-*.parquet")
    found: dict[str, float] = defaultdict(float)
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for place in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(place)
                found[column.path_in_schema] += (
                    column.total_compressed_size / file.metadata.num_rows
                )
    largest = sorted(found.items(), key=lambda item: -item[1])
    rest = ("all others", sum(value for _, value in largest if value < 0.05))
    shares = [*(item for item in largest if item[1] >= 0.05), rest]
    report.table("by column, compacted, rows as answers end", ("", "B/row"), shares)


# -- settlement, audit, verify ---------------------------------------------------------------


async def build(home: Path, rows: int) -> float:
    """A finished month through the real path, day by day; returns the seconds it took."""
    began_s = time.perf_counter()
    clock = SetClock(MONTH)
    ledger = await opened(home, NEVER_S, clock)
    await stock(ledger)
    share = rows // DAYS // 4
    gateways = [await join(ledger, f"gw{n}", share / 80_000) for n in range(4)]
    for day in range(DAYS):
        today = MONTH + timedelta(days=day)
        sent = []
        for gateway in gateways:
            gateway.now_us = int(today.timestamp() * 1e6)
            content = gateway.rows(share)
            starts = range(0, share, BUILD_BATCH)
            sent.append([encode(content.slice(start, BUILD_BATCH)) for start in starts])
        for number, together in enumerate(zip(*sent, strict=True)):
            clock.moment = today + timedelta(hours=1 + 22 * number / len(sent[0]))
            jobs = (g.send(ledger, b) for g, b in zip(gateways, together, strict=True))
            await asyncio.gather(*jobs)
        await ledger.publish()
        await ledger.keep_house()
    clock.moment = MONTH_END
    await ledger.keep_house()
    await ledger.close()
    return time.perf_counter() - began_s


def usage_files(home: Path) -> list[Path]:
    """The public files of usage, in order."""
    return sorted((home / "ledger" / "usage").rglob("*.parquet"))


def query(text: str, home: Path) -> list[Any]:
    """What bare DuckDB answers over the files, with the threads that the market uses."""
    with duckdb.connect(config={"threads": snapshot.THREADS}) as connection:
        files = [str(path) for path in usage_files(home)]
        return connection.execute(text, {"files": files}).fetchall()


async def race(home: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of settling's aggregate, a whole dry run and the audit, in turns with DuckDB."""
    ledger = await opened(home, NEVER_S, SetClock(MONTH_END))
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        bare = query(BARE_SUMS, home)
        marks.append(time.perf_counter())
        lines = settling.sum_lines(usage_files(home), 0, rows)
        marks.append(time.perf_counter())
        summary = await ledger.settle("2026-01", "bench", dry_run=True)
        marks.append(time.perf_counter())
        audit = query(AUDIT, home)
        marks.append(time.perf_counter())
        assert len(bare) == len(lines)
        assert sum(row[7] for row in bare) == summary["rows"] == rows
        assert not any(row[2] for row in audit)
        assert max(row[4] for row in audit) == rows
        names = ("bare DuckDB", "settle: its aggregate", "settle, dry run", "audit")
        for name, (begin, after) in zip(names, pairwise(marks), strict=True):
            seconds[name].append(after - begin)
    await ledger.close()
    return {name: times[1:] for name, times in seconds.items()}  # the first warms up


async def aggregate(home: Path, rows: int) -> tuple[float, float]:
    """Peak memory before and after settling's aggregate."""
    before = peak_mib()
    settling.sum_lines(usage_files(home), 0, rows)
    return before, peak_mib()


async def close_month(home: Path, verify: bool) -> dict[str, Any]:
    """Verify or settle for good; seconds, CPU of child processes, peak memory."""
    ledger = await opened(home, NEVER_S, SetClock(MONTH_END))
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    own_s = time.process_time()
    if verify:
        report = await ledger.verify()
        assert report["finding"] is None, report
    else:
        report = await ledger.settle("2026-01", "bench")
    seconds, own_s = time.perf_counter() - began_s, time.process_time() - own_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    await ledger.close()
    peaks = {"peak_mib": peak_mib(), "child_mib": after.ru_maxrss / 1024}
    return report | peaks | {"wall_s": seconds, "cpu_s": cpu_s + own_s}


def settle(scale: Scale, home: Path, rows: int, report: Report) -> None:
    """Settlement and audit beside bare DuckDB over the same files. It closes the month."""
    seconds = alone(race, home, rows, scale.rounds)
    before, peak = alone(aggregate, home, rows)
    bare_s = median(seconds["bare DuckDB"])
    figures = [
        (name, rows / median(times), rows / min(times), 100 * bare_s / median(times))
        for name, times in seconds.items()
    ]
    whole = alone(close_month, home, False)
    figures.append(("settle, whole", rows / whole["wall_s"], None, 100 * bare_s / whole["wall_s"]))
    files = len(usage_files(home))
    columns = ("", "rows/s, median", "best", "% of DuckDB")
    report.table(f"settle and audit, {rows:,} rows in {files} files", columns, figures)
    memory = [
        ("aggregate alone (before it)", peak, before),
        ("settle, whole: the ledger (its verify)", whole["peak_mib"], whole["child_mib"]),
    ]
    report.table("memory of settle", ("", "peak MiB", "other MiB"), memory)
    print(f"  settle, whole: {whole['wall_s']:.1f} s with verify, {whole['statements']} statements")
    report.aim("settle, dry run, of DuckDB", ">=", 60, "%", figures[2][3])
    report.aim("settle's aggregate, memory", "<=", 1_024, "MiB", peak)


def verify(home: Path, rows: int, report: Report) -> None:
    """Recompute everything."""
    found = alone(close_month, home, True)
    wall_s, cpu_s = found["wall_s"], found["cpu_s"]
    every = found["rows"]
    figures = [
        ("rows of usage", rows, rows / wall_s, rows / cpu_s),
        ("with transfers", every, every / wall_s, every / cpu_s),
    ]
    columns = ("", "rows", "per s", "per s of CPU")
    report.table(f"verify: {wall_s:.1f} s, {cpu_s:.1f} s CPU", columns, figures)
    print(f"  its process had at most {found['child_mib']:,.0f} MiB")
    report.aim("rows of usage per core", ">=", 200_000, "rows/s", rows / cpu_s)


# -- restart ---------------------------------------------------------------------------------


async def fill(home: Path, rows: int, done: Any) -> None:
    """Book rows that nobody publishes, say so, and wait for the end."""
    ledger = await opened(home, NEVER_S)
    await stock(ledger)
    gateway = await join(ledger, "gw0")
    for payload in gateway.payloads(1_000, rows // 1_000):
        await gateway.send(ledger, payload)
    done.set()
    await asyncio.sleep(NEVER_S)


async def reopen(home: Path, next_seq: int) -> tuple[float, float]:
    """Seconds until the ledger is open, and until it has acknowledged a batch."""
    (payload,) = Traffic("gw0").payloads(1, 1)
    began_s = time.perf_counter()
    ledger = await opened(home, publisher.SEAL_INTERVAL_S)
    open_s = time.perf_counter() - began_s
    booked = await ledger.append("gw0", 1, next_seq, payload)
    assert booked == next_seq + 1
    return open_s, time.perf_counter() - began_s


def restart(scale: Scale, folder: Path, report: Report) -> None:
    """From SIGKILL with unpublished rows to the first acknowledgement."""
    done = SPAWN.Event()
    victim = SPAWN.Process(target=_run, args=(fill, folder, scale.restart_rows, done))
    victim.start()
    while not done.wait(1):
        assert victim.is_alive(), "the ledger to be killed ended by itself"
    victim.kill()
    victim.join()
    timings = [
        alone(reopen, folder, scale.restart_rows // 1_000 * 1_000 + number)
        for number in range(scale.rounds)
    ]
    code = "import time; b = time.perf_counter(); import market.ledger.service as s; "
    code += "print(time.perf_counter() - b)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    opens, acks = zip(*timings, strict=True)
    rows = [
        ("import, not counted", float(imported.stdout), None),
        ("open", median(opens), max(opens)),
        ("first acknowledgement", median(acks), max(acks)),
    ]
    title = f"restart after SIGKILL, {scale.restart_rows:,} rows unpublished"
    report.table(title, ("", "s, median", "worst"), rows)
    report.aim("first acknowledgement, worst", "<=", 2, "s", max(acks))


SECTIONS = ("ingest", "metering", "ack", "bytes", "settle", "verify", "restart")


def run(wanted: Sequence[str], scale: Scale, home: Path, report: Report) -> None:
    """The sections asked for, in their order; settle and verify share a ledger."""
    separate = {"ingest": ingest, "metering": metering, "ack": ack, "bytes": row_bytes}
    for name in (name for name in separate if name in wanted):
        (home / name).mkdir()
        separate[name](scale, home / name, report)
        shutil.rmtree(home / name)
    if {"settle", "verify"} & {*wanted}:
        rows = scale.rows // DAYS // 4 * 4 * DAYS
        built_s = alone(build, home / "month", rows)
        print(f"\n{rows:,} rows booked, published and compacted in {built_s:,.0f} s", flush=True)
        if "verify" in wanted:
            verify(home / "month", rows, report)
        if "settle" in wanted:
            settle(scale, home / "month", rows, report)
        shutil.rmtree(home / "month")
    if "restart" in wanted:
        restart(scale, home / "restart", report)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--rows", type=int, help="rows to settle and verify (default 10,000,000)")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION[,SECTION]")
    parser.add_argument("--home", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := {*wanted} - {*SECTIONS}:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    scale = QUICK if arguments.quick else Scale()
    scale = replace(scale, rows=arguments.rows or scale.rows)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended
    report = Report()
    with tempfile.TemporaryDirectory(prefix="market-bench-", dir=arguments.home) as home:
        run(wanted, scale, Path(home), report)
    if arguments.json:
        content = {"tables": report.tables, "aims": report.aims}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
