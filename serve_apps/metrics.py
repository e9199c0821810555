"""``/metrics``: what this gateway has recorded and how the ledger is, for Prometheus."""

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from market.ports import UsageSink
from market.routing import LANE_REASON
from market.types import CURRENCY, Lane, Lease, UsageRecord
from serve_apps.observed import Seen

ADMISSION_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1, 5)
COLD_BUCKETS = (0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)
TIME_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """Counters and histograms of one gateway, and gauges made of the ledger's status when asked.

    With PROMETHEUS_MULTIPROC_DIR in the environment all gateways of a machine write there, and each
    answers for all of them.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        labels = ["lane", "model", "provider", "kind"]
        where = ["lane", "model"]
        self._tokens = Counter("market_tokens", "Recorded tokens", labels, registry=registry)
        self._requests = Counter(
            "market_requests", "Recorded requests", ["model", "reason"], registry=registry
        )
        self._spills = Counter(
            "market_spills", "Recorded requests that spilled", ["reason"], registry=registry
        )
        self._charge = Counter(
            "market_charge", "Charged to tenants", ["currency"], registry=registry
        )
        self._unpriced = Counter(
            "market_unpriced_requests",
            "Requests refused because their model has no price",
            ["model"],
            registry=registry,
        )
        self._refused = Counter(
            "market_requests_refused",
            "Requests answered with an error",
            ["code"],
            registry=registry,
        )
        self._grants = Counter("market_slice_grants", "Slices asked for", registry=registry)
        self._admission = Histogram(
            "market_admission_seconds",
            "From a request's body to its admission",
            buckets=ADMISSION_BUCKETS,
            registry=registry,
        )
        self._cold_start = Histogram(
            "market_cold_start_seconds",
            "How long requests waited for their model to start",
            ["model"],
            buckets=COLD_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "market_queue_seconds",
            "Until dispatch to a replica",
            where,
            buckets=TIME_BUCKETS,
            registry=registry,
        )
        self._ttft = Histogram(
            "market_time_to_first_token_seconds",
            "Until the first token",
            where,
            buckets=TIME_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "market_request_duration_seconds",
            "Until the last token",
            where,
            buckets=TIME_BUCKETS,
            registry=registry,
        )
        self._pools = Gauge(
            "market_pool_requests",
            "Requests of a pool",
            ["pool", "state"],
            multiprocess_mode="livesum",
            registry=registry,
        )

    def observe(self, record: UsageRecord) -> None:
        """Count a record that is safe."""
        model = record.model or ""
        tokens = (record.lane, model, record.provider_id)
        fresh = record.input_tokens - record.cached_input_tokens
        self._tokens.labels(*tokens, "input").inc(fresh)
        self._tokens.labels(*tokens, "cached_input").inc(record.cached_input_tokens)
        self._tokens.labels(*tokens, "output").inc(record.output_tokens)
        self._requests.labels(model, record.finish_reason or "").inc()
        if record.lane is Lane.SPILL:
            self._spills.labels(dict(record.attrs).get(LANE_REASON, "")).inc()
        self._charge.labels(record.currency).inc(record.charge_pico / 1e12)
        for histogram, milliseconds in (
            (self._queue, record.queue_ms),
            (self._ttft, record.ttft_ms),
            (self._duration, record.duration_ms),
        ):
            if milliseconds is not None:
                histogram.labels(record.lane, model).observe(milliseconds / 1000)

    def unpriced(self, model: str) -> None:
        """Count a request that was refused because its model has no price."""
        self._unpriced.labels(model).inc()

    def refused(self, seen: Seen) -> None:
        """Count a request that ended with an error."""
        if seen.error_code is not None:
            self._refused.labels(seen.error_code).inc()

    def started(self, model: str, seconds: float) -> None:
        """A request has waited for its model to start."""
        self._cold_start.labels(model).observe(seconds)

    def admitted(self, seconds: float) -> None:
        """How long an admission took."""
        self._admission.observe(seconds)

    def granted(self, count: int) -> None:
        """Slices were asked for."""
        self._grants.inc(count)

    def pools(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Requests (under way, waiting) by pool."""
        for pool, (running, waiting) in counts.items():
            self._pools.labels(pool, "running").set(running)
            self._pools.labels(pool, "waiting").set(waiting)

    def page(self, ledger: dict[str, Any], leases: Sequence[Lease], now: datetime) -> bytes:
        """The page, with the ledger's ``status`` and the open leases as they are now."""
        asked = CollectorRegistry()
        asked.register(_LedgerGauges(ledger))
        asked.register(_LeaseGauges(leases, now))
        return self._own_page() + generate_latest(asked)

    def _own_page(self) -> bytes:
        if self._folder is None:
            return generate_latest(self._registry)
        for file in Path(self._folder).glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):
                multiprocess.mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
        everybody = CollectorRegistry()
        multiprocess.MultiProcessCollector(everybody, self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)


class CountingSink:
    """A UsageSink that counts what it has recorded."""

    def __init__(self, sink: UsageSink, metrics: Metrics) -> None:
        self._sink = sink
        self._metrics = metrics

    def identity(self) -> tuple[str, int]:
        """Of the sink inside."""
        return self._sink.identity()

    def next_request_id(self) -> str:
        """Of the sink inside."""
        return self._sink.next_request_id()

    @property
    def booked(self) -> int:
        """Of the sink inside."""
        return self._sink.booked

    @property
    def next_seq(self) -> int:
        """Of the sink inside."""
        return self._sink.next_seq

    def begin(self, record: UsageRecord) -> None:
        """Of the sink inside."""
        self._sink.begin(record)

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Record, then count."""
        recorded = await self._sink.record(record)
        self._metrics.observe(recorded)
        return recorded


class _LedgerGauges(Collector):
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The ledger's numbers as gauges."""
        status = self._status
        yield _gauge(
            "market_ledger_lag_seconds", "Age of unpublished rows", status["publish_lag_s"]
        )
        yield _gauge("market_ledger_rows", "Rows booked", status["next_lsn"] - 1)
        yield _gauge("market_ledger_has_room", "1 while the disk has room", status["has_room"])
        yield _gauge("market_holds", "Open holds", status["open_holds"])
        yield _gauge("market_holds_stale", "Holds past their expiry", status["stale_holds"])
        held = GaugeMetricFamily("market_hold", "Money set aside", labels=["state", "currency"])
        held.add_metric(["pending", CURRENCY], status["held_pico"] / 1e12)
        yield held
        alarms = GaugeMetricFamily("market_alarm", "1 per standing alarm", labels=["name", "about"])
        for alarm in status["alarms"]:
            alarms.add_metric([alarm["name"], alarm["about"]], 1)
        yield alarms
        capture = GaugeMetricFamily(
            "market_capture_ratio", "Recorded / delivered tokens", labels=["replica"]
        )
        for replica, ratio in status["capture_ratio"].items():
            capture.add_metric([replica], ratio)
        yield capture


class _LeaseGauges(Collector):
    def __init__(self, leases: Sequence[Lease], now: datetime) -> None:
        self._leases, self._now = leases, now

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """How long leases last, and how much of their time was served."""
        left = GaugeMetricFamily(
            "market_lease_seconds_to_expiry", "Until its end", labels=["lease", "model"]
        )
        served = GaugeMetricFamily(
            "market_lease_healthy_ratio",
            "Charged / decided time; the rest was credited",
            labels=["lease", "model"],
        )
        for lease in self._leases:
            where = [lease.lease_id, lease.model]
            left.add_metric(where, (lease.end - self._now).total_seconds())
            decided_us = lease.healthy_us + lease.credited_us
            if decided_us:
                served.add_metric(where, lease.healthy_us / decided_us)
        yield left
        yield served


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
