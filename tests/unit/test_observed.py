"""What is seen of requests: the access log, spans and measurements at a collector's door."""

import contextlib
import gzip
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from market.errors import EngineFailed
from market.types import FinishReason
from serve_apps.observed import AccessLog
from serve_apps.telemetry import start_telemetry, telemetry_wanted
from tests.unit.test_http import gateway

SECRET_PROMPT = "tell me of zebras"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 5}
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def seen():
    return []


@pytest.fixture
async def http(seen):
    here = await gateway()
    await here.watch(seen.append)
    return here


class TestSeen:
    async def test_a_whole_answer_with_its_record(self, http, seen):
        await http.http.post("/v1/chat/completions", json=CHAT)
        (one,) = seen
        assert (one.method, one.path, one.status) == ("POST", "/v1/chat/completions", 200)
        assert (one.operation, one.model, one.stream) == ("chat", "tiny", False)
        assert one.caller.subject_id == "acme"
        assert one.record.output_tokens == 5
        assert one.request_id == one.record.request_id
        assert one.error_code is None
        assert one.duration_s > 0

    async def test_a_stream_at_its_end(self, http, seen):
        await http.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}
        )
        (one,) = seen
        assert (one.operation, one.stream) == ("text_completion", True)
        assert one.record.finish_reason == FinishReason.LENGTH

    @pytest.mark.parametrize(
        ("path", "body", "status", "code"),
        [
            ("/v1/chat/completions", {}, 400, "invalid_request"),
            ("/v1/chat/completions", CHAT | {"model": "none"}, 404, "model_not_found"),
            ("/nothing", {}, 404, "not_found"),
        ],
    )
    async def test_refusals_with_their_code(self, http, seen, path, body, status, code):
        await http.http.post(path, json=body)
        assert [(one.status, one.error_code) for one in seen] == [(status, code)]

    async def test_a_wrong_key(self, http, seen):
        await http.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": "x"})
        assert [(one.status, one.caller) for one in seen] == [(401, None)]

    async def test_a_stream_that_breaks(self, http, seen):
        http.engine.fail_at = 2
        await http.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert [(one.status, one.error_code) for one in seen] == [(200, EngineFailed.code)]

    async def test_a_bug(self, http, seen, monkeypatch, caplog):
        monkeypatch.setattr(http.inference, "admit", None)
        await http.http.post("/v1/chat/completions", json=CHAT)
        assert [(one.status, one.error_code) for one in seen] == [(500, "market_fault")]

    async def test_machines_that_ask_for_health_are_not(self, http, seen):
        assert (await http.http.get("/healthz")).status_code == 200
        assert seen == []


class TestAccessLog:
    async def test_has_a_line_per_request_without_texts_or_secrets(self, tmp_path):
        here = await gateway()
        log = AccessLog(tmp_path, "gw0")
        await here.watch(log)
        await here.http.post("/v1/chat/completions", json=CHAT)
        await here.http.get("/v1/models/none")
        log.close()
        text = log.path.read_text()
        assert "zebras" not in text
        assert "sk-" not in text
        answered, refused = [json.loads(line) for line in text.splitlines()]
        assert answered["status"] == 200
        assert answered["request_id"] == "req-gw0-1"
        assert (answered["subject"], answered["api_key_id"]) == ("acme", "key-acme")
        assert (answered["model"], answered["lane"], answered["provider"]) == (
            "tiny",
            "tokens",
            "local",
        )
        assert (answered["input_tokens"], answered["output_tokens"]) == (10, 5)
        assert answered["charge"] == "0.000003"
        assert (refused["status"], refused["error"]) == (404, "model_not_found")

    async def test_a_full_disk_costs_the_line_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(logging, "raiseExceptions", False)
        here = await gateway()
        log = AccessLog(tmp_path, "gw0")
        log.close()
        monkeypatch.setattr(log._handler, "stream", FullDisk())
        await here.watch(log)
        assert (await here.http.post("/v1/chat/completions", json=CHAT)).status_code == 200


class FullDisk(io.StringIO):
    def write(self, _text):
        raise OSError(28, "no space left")


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans, self.metrics = [], []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(body)
            self.server.spans += [
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        else:
            request = ExportMetricsServiceRequest.FromString(body)
            self.server.metrics += [
                metric
                for resource in request.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
            ]
        self.server.raw = getattr(self.server, "raw", b"") + body
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def collector(monkeypatch):
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def attributes(of):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


class TestTelemetry:
    def test_is_off_by_default(self, monkeypatch):
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
        assert not telemetry_wanted()

    async def test_reaches_a_collector_in_the_genai_words(self, collector):
        assert telemetry_wanted()
        here = await gateway()
        telemetry = start_telemetry("gw0")
        await here.watch(telemetry)
        parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        await here.http.post("/v1/chat/completions", json=CHAT | {"seed": 3}, headers=parent)
        await here.http.post("/v1/chat/completions", json=CHAT | {"model": "none"})
        here.engine.fail_at = 0
        await here.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        await here.http.get("/v1/models")
        telemetry.shutdown()
        answered, failed = collector.spans  # what was not for a model is no inference
        assert (answered.name, failed.name) == ("chat tiny", "text_completion tiny")
        assert answered.trace_id.hex() == TRACE
        assert answered.end_time_unix_nano > answered.start_time_unix_nano
        found = attributes(answered)
        assert found["gen_ai.operation.name"] == "chat"
        assert found["gen_ai.request.model"] == "tiny"
        assert found["gen_ai.request.max_tokens"] == 5
        assert found["gen_ai.request.seed"] == 3
        assert found["gen_ai.usage.input_tokens"] == 10
        assert found["gen_ai.usage.output_tokens"] == 5
        assert found["gen_ai.response.id"] == "req-gw0-1"
        assert attributes(failed)["error.type"] == EngineFailed.code
        assert failed.status.code == 2
        points = {metric.name: metric.histogram.data_points for metric in collector.metrics}
        assert sum(point.count for point in points["gen_ai.server.request.duration"]) == 2
        kinds = {
            attributes(point)["gen_ai.token.type"]: point.sum
            for point in points["gen_ai.client.token.usage"]
        }
        assert kinds == {"input": 10, "output": 5}
        assert "gen_ai.server.time_to_first_token" in points
        assert b"zebras" not in collector.raw

    async def test_without_a_collector_requests_go_on(self, monkeypatch, caplog):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
        here = await gateway()
        telemetry = start_telemetry("gw0")
        await here.watch(telemetry)
        assert (await here.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        with contextlib.suppress(Exception):
            telemetry.shutdown()
