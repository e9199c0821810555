"""``/metrics``: what this gateway has recorded and how the ledger is, for Prometheus."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from market.ports import UsageSink
from market.types import CURRENCY, Lease, UsageRecord


class Metrics:
    """Counters of one gateway process, and gauges made of the ledger's status when asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["lane", "model", "provider", "kind"]
        self._tokens = Counter("market_tokens", "Recorded tokens", labels, registry=self._registry)
        self._requests = Counter(
            "market_requests", "Recorded requests", ["model", "reason"], registry=self._registry
        )
        self._charge = Counter(
            "market_charge", "Charged to tenants", ["currency"], registry=self._registry
        )
        self._unpriced = Counter(
            "market_unpriced_requests",
            "Requests refused because their model has no price",
            ["model"],
            registry=self._registry,
        )

    def observe(self, record: UsageRecord) -> None:
        """Count a record that is safe."""
        where = (record.lane, record.model or "", record.provider_id)
        fresh = record.input_tokens - record.cached_input_tokens
        self._tokens.labels(*where, "input").inc(fresh)
        self._tokens.labels(*where, "cached_input").inc(record.cached_input_tokens)
        self._tokens.labels(*where, "output").inc(record.output_tokens)
        self._requests.labels(record.model or "", record.finish_reason or "").inc()
        self._charge.labels(record.currency).inc(record.charge_pico / 1e12)

    def unpriced(self, model: str) -> None:
        """Count a request that was refused because its model has no price."""
        self._unpriced.labels(model).inc()

    def page(self, ledger: dict[str, Any], leases: Sequence[Lease], now: datetime) -> bytes:
        """The page, with the ledger's ``status`` and the open leases as they are now."""
        asked = CollectorRegistry()
        asked.register(_LedgerGauges(ledger))
        asked.register(_LeaseGauges(leases, now))
        return generate_latest(self._registry) + generate_latest(asked)


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
