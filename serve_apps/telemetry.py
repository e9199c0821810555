"""OpenTelemetry: a span and measurements per request, in the words of its GenAI conventions.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ or _METRICS_ form) says where to send them;
all other OTEL_* settings work as everywhere. Prompts and answers are never part of it.

A span is made when its request has ended, from what is known then: nothing is done per token.
"""

import os
from typing import Any

from market import __version__
from market.types import FinishReason
from serve_apps.observed import Seen

# Advised boundaries of the conventions.
DURATION_BUCKETS = [0.01 * 2**n for n in range(14)]
FIRST_TOKEN_BUCKETS = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0),
]
PER_TOKEN_BUCKETS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
TOKEN_BUCKETS = [4.0**n for n in range(14)]
PROVIDER = "compute_market"
_ENDPOINTS = tuple(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT" for kind in ("", "TRACES_", "METRICS_"))


def telemetry_wanted() -> bool:
    """Whether the environment says where telemetry goes."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


def start_telemetry(gateway: str) -> "Telemetry":
    """Telemetry to the collector that the environment names."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    return Telemetry(gateway, BatchSpanProcessor(OTLPSpanExporter()), reader)


class Telemetry:
    """Spans and measurements of one gateway."""

    def __init__(self, gateway: str, spans: Any, measurements: Any) -> None:
        """``spans`` is a SpanProcessor, ``measurements`` a MetricReader."""
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        known = {"service.name": "compute-market", "service.version": __version__}
        resource = Resource.create(known | {"service.instance.id": gateway})
        self._traces = TracerProvider(resource=resource)
        self._traces.add_span_processor(spans)
        self._meters = MeterProvider([measurements], resource=resource)
        self._tracer = self._traces.get_tracer("market.gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()
        meter = self._meters.get_meter("market.gateway", __version__)
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Until the last token",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Until the first token",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN_BUCKETS,
        )
        self._per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Between tokens after the first",
            explicit_bucket_boundaries_advisory=PER_TOKEN_BUCKETS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a request",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        )

    def __call__(self, seen: Seen) -> None:
        """Report a request that has ended, if it was for a model."""
        if seen.operation is None:
            return
        common: dict[str, Any] = {
            "gen_ai.operation.name": seen.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": seen.model or "",
        }
        failure = _failure(seen)
        if failure is not None:
            common["error.type"] = failure
        self._trace(seen, common, failure)
        self._measure(seen, common)

    def shutdown(self) -> None:
        """Send what is left."""
        self._traces.shutdown()
        self._meters.shutdown()

    def _trace(self, seen: Seen, common: dict[str, Any], failure: str | None) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in seen.headers.items()
            if name in (b"traceparent", b"tracestate")
        }
        began_ns = round(seen.began.timestamp() * 1e9)
        span = self._tracer.start_span(
            f"{seen.operation} {seen.model or ''}".strip(),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=common | _request_attributes(seen) | _answer_attributes(seen),
            start_time=began_ns,
        )
        if failure is not None:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(began_ns + round(seen.duration_s * 1e9))

    def _measure(self, seen: Seen, common: dict[str, Any]) -> None:
        self._duration.record(seen.duration_s, common)
        record = seen.record
        if record is None:
            return
        for kind, count in (("input", record.input_tokens), ("output", record.output_tokens)):
            self._tokens.record(count, common | {"gen_ai.token.type": kind})
        if record.ttft_ms is None or record.duration_ms is None:
            return
        self._first_token.record(record.ttft_ms / 1000, common)
        if record.output_tokens > 1:
            between_s = (record.duration_ms - record.ttft_ms) / 1000 / (record.output_tokens - 1)
            self._per_token.record(between_s, common)


def _failure(seen: Seen) -> str | None:
    if seen.error_code is not None:
        return seen.error_code
    record = seen.record
    if record is not None and record.finish_reason == FinishReason.CLIENT_DISCONNECT:
        return str(FinishReason.CLIENT_DISCONNECT)
    return str(seen.status) if seen.status >= 400 else None


def _request_attributes(seen: Seen) -> dict[str, Any]:
    found: dict[str, Any] = {
        "http.request.method": seen.method,
        "url.path": seen.path,
        "http.response.status_code": seen.status,
        "gen_ai.request.stream": seen.stream,
    }
    if seen.caller is not None:
        found["market.subject"] = seen.caller.subject_id
        found["market.api_key_id"] = seen.caller.api_key_id
    if seen.sampling is not None:
        sampling = seen.sampling
        asked = {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.choice.count": seen.answers if seen.answers > 1 else None,
        }
        found |= {name: value for name, value in asked.items() if value is not None}
    return found


def _answer_attributes(seen: Seen) -> dict[str, Any]:
    record = seen.record
    if record is None:
        return {}
    found: dict[str, Any] = {
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": [record.finish_reason or ""],
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_input_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "market.lane": str(record.lane),
        "market.provider": record.provider_id,
        "market.node": record.node_id,
        "market.price_id": record.price_id,
        "market.queue_ms": record.queue_ms,
        "gen_ai.response.time_to_first_chunk": None
        if record.ttft_ms is None
        else record.ttft_ms / 1000,
    }
    return {name: value for name, value in found.items() if value is not None}
