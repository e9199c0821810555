#!/usr/bin/env python3
"""The market's gateway beside ``vllm serve`` on the same model, in one run, interleaved.

Both serve the tiny model with vLLM and the same limits; the one not being measured is stopped
with SIGSTOP. Every request streams; an error or an unfinished stream counts as failed. Prints
requests/s, output tokens/s, time to first token and latency, and the ratios market / direct.

    .venv/bin/python scripts/bench_gateway.py [--concurrency 1,8,32] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
SCRIPTS = Path(__file__).parent
MODEL = "tiny-qwen"
CONTEXT = 2048
SEQUENCES = 64
START_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 120


@dataclass
class Target:
    """A server under test: where it is and which processes it consists of."""

    name: str
    url: str
    key: str
    pid: int

    def signal(self, number: int) -> None:
        """Send a signal to the whole process tree."""
        root = psutil.Process(self.pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@dataclass
class Result:
    """What one server did at one concurrency, over all rounds."""

    seconds: float = 0.0
    tokens: int = 0
    failed: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The figures that are printed."""
        done = len(self.latency_ms)
        return {
            "requests_per_s": done / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_p50_ms": percentile(self.ttft_ms, 50),
            "ttft_p99_ms": percentile(self.ttft_ms, 99),
            "latency_p50_ms": percentile(self.latency_ms, 50),
            "latency_p99_ms": percentile(self.latency_ms, 99),
            "failed": self.failed,
        }


def percentile(values: list[float], percent: int) -> float:
    """Linear interpolation between order statistics; not a number without values."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask(client: httpx.AsyncClient, target: Target, max_tokens: int, result: Result) -> None:
    """One streamed chat request."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is a dictionary in Python?"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"authorization": f"Bearer {target.key}"}
    began = time.perf_counter()
    first, tokens, finished = None, 0, False
    try:
        async with client.stream(
            "POST", f"{target.url}/v1/chat/completions", json=body, headers=headers
        ) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    finished = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if first is None and any(c["delta"].get("content") for c in chunk["choices"]):
                        first = time.perf_counter()
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        print(f"  {target.name}: {type(error).__name__}: {error}", file=sys.stderr)
    if not finished or first is None or tokens != max_tokens:
        result.failed += 1
        return
    result.tokens += tokens
    result.ttft_ms.append((first - began) * 1000)
    result.latency_ms.append((time.perf_counter() - began) * 1000)


async def load(
    target: Target, concurrency: int, requests: int, max_tokens: int, result: Result
) -> None:
    """Keep ``concurrency`` requests under way until ``requests`` are done."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(limits=limits, timeout=REQUEST_TIMEOUT_S) as client:
        left = iter(range(requests))

        async def worker() -> None:
            for _ in left:
                await ask(client, target, max_tokens, result)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        result.seconds += time.perf_counter() - began


@contextlib.contextmanager
def vllm_serve(model: Path, logs: Path) -> Iterator[Target]:
    """``vllm serve`` with the same limits as the market's replica."""
    port = free_port()
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [
        # What the command ``vllm serve`` runs; the command itself looks for a package named vllm.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(CONTEXT)),
        *("--max-num-seqs", str(SEQUENCES), "--enforce-eager", "--dtype", "bfloat16"),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    with (logs / "vllm-serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    target = Target("vllm serve", f"http://127.0.0.1:{port}", "none", process.pid)
    try:
        wait_for(f"{target.url}/health", process, logs / "vllm-serve.log")
        yield target
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            target.signal(signal.SIGCONT)
            process.terminate()
            process.wait(timeout=60)
            for orphan in psutil.wait_procs(family, timeout=20)[1]:
                orphan.kill()


@contextlib.contextmanager
def market(model: Path, home: Path) -> Iterator[Target]:
    """A market of its own with the model on vLLM, one tenant and its key."""
    url = f"http://127.0.0.1:{free_port()}"
    environment = os.environ | {"MARKET_HOME": str(home), "MARKET_URL": url}
    environment.pop("MARKET_API_KEY", None)
    (home / "models").mkdir(parents=True)
    (home / "models" / MODEL).symlink_to(model)

    def cli(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [str(BIN / "market"), *arguments, "--output", "json"],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        return dict(json.loads(done.stdout))

    cli("up")
    pid = json.loads((home / "state" / "cluster.json").read_text())["pid"]
    try:
        cli("deploy", MODEL, "--mode", "tokens", "--engine", "vllm")
        cli("tenants", "create", "bench")
        cli("tenants", "deposit", "bench", "1000")
        key = str(cli("keys", "create", "--tenant", "bench", "--no-save")["api_key"])
        yield Target("market", url, key, pid)
    finally:
        Target("market", url, "", pid).signal(signal.SIGCONT)
        cli("down")


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the address answers. Raises RuntimeError with the log's end if it never does."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{url} did not come up:\n{log.read_text()[-2000:]}")


def measure(
    targets: list[Target], concurrencies: list[int], rounds: int, max_tokens: int
) -> dict[int, dict[str, Result]]:
    """Interleave the servers round by round; the first request of each is a warm-up."""
    results = {c: {t.name: Result() for t in targets} for c in concurrencies}
    for target in targets:
        target.signal(signal.SIGSTOP)
    for number in range(rounds):
        for concurrency in concurrencies:
            for target in targets:
                target.signal(signal.SIGCONT)
                asyncio.run(load(target, concurrency, concurrency + 1, 8, Result()))
                requests = max(16, 4 * concurrency)
                result = results[concurrency][target.name]
                asyncio.run(load(target, concurrency, requests, max_tokens, result))
                target.signal(signal.SIGSTOP)
                print(f"  round {number + 1}, {concurrency} clients, {target.name}", flush=True)
    for target in targets:
        target.signal(signal.SIGCONT)
    return results


def report(results: dict[int, dict[str, Result]]) -> list[dict[str, object]]:
    """Print the table; returns its rows."""
    rows: list[dict[str, object]] = []
    head = (
        f"{'clients':>7} {'server':<11} {'req/s':>8} {'tok/s':>8} {'TTFT p50':>9} {'p99':>8} "
        f"{'lat. p50':>9} {'p99':>8} {'failed':>6}"
    )
    print(f"\n{head}\n{'-' * len(head)}")
    for concurrency, by_server in results.items():
        figures = {name: result.summary() for name, result in by_server.items()}
        for name, f in figures.items():
            print(
                f"{concurrency:>7} {name:<11} "
                f"{f['requests_per_s']:>8.2f} {f['tokens_per_s']:>8.0f} "
                f"{f['ttft_p50_ms']:>9.1f} {f['ttft_p99_ms']:>8.1f} {f['latency_p50_ms']:>9.1f} "
                f"{f['latency_p99_ms']:>8.1f} {f['failed']:>6.0f}"
            )
            rows.append({"concurrency": concurrency, "server": name, **f})
        direct, ours = figures["vllm serve"], figures["market"]
        ratio = {name: ours[name] / direct[name] for name in ours if name != "failed"}
        print(
            f"{concurrency:>7} {'ratio':<11} {ratio['requests_per_s']:>8.2f} "
            f"{ratio['tokens_per_s']:>8.2f} {ratio['ttft_p50_ms']:>9.2f} "
            f"{ratio['ttft_p99_ms']:>8.2f} {ratio['latency_p50_ms']:>9.2f} "
            f"{ratio['latency_p99_ms']:>8.2f}"
        )
        rows.append({"concurrency": concurrency, "server": "ratio", **ratio})
    print("\ntimes in ms; ratio = market / vllm serve")
    return rows


def main() -> None:
    """Start both servers, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    concurrencies = [int(part) for part in arguments.concurrency.split(",")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="market-bench-")))
        model = folder / MODEL
        script = [sys.executable, str(SCRIPTS / "make_tiny_model.py"), str(model)]
        subprocess.run(script, check=True, stderr=subprocess.DEVNULL)
        print("starting vllm serve", flush=True)
        direct = stack.enter_context(vllm_serve(model, folder))
        direct.signal(signal.SIGSTOP)
        print("starting the market", flush=True)
        ours = stack.enter_context(market(model, folder / "home"))
        results = measure([direct, ours], concurrencies, arguments.rounds, arguments.max_tokens)
        rows = report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
