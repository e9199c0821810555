#!/usr/bin/env python3
"""The market beside the same engine without it, in one run, interleaved.

Four stacks answer the same requests: ``direct`` (``vllm serve``; for the paced engine a bare
uvicorn application), ``bare`` (the same engine in a bare Ray Serve application behind Serve's
proxy, without keys or metering), ``market``, and ``litellm`` (LiteLLM's proxy without a database
in front of ``direct``). Two engines: ``tiny`` (vLLM on the CPU, which is the bottleneck: this shows
cost) and ``paced`` (20 ms a step, as on a GPU: this shows delay).

Stacks that are not being measured are stopped with SIGSTOP. Client, front ends and the processes
that hold an engine's front half run at real-time priority where that is allowed; it is printed
whether it was. An error or an unfinished answer counts as failed.

    .venv/bin/python scripts/bench_gateway.py [--engines paced,tiny] [--concurrency 1,8,32,128]
        [--rounds 3] [--stacks direct,bare,market,litellm] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import paced_engine
import psutil
from loadgen import Answer, http_request, load, percentile
from own_market import MODEL, SCRIPTS, OwnMarket, free_port, install_paced, tiny_model

BIN = Path(sys.executable).parent
CONTEXT = 2048
SEQUENCES = 128
START_TIMEOUT_S = 300
REQUEST_TIMEOUT_S = 180
JITTER_S = paced_engine.STEP_S
LITELLM = "litellm[proxy]==1.106.0"
# Processes whose command line holds one of these are back halves of engines; all others are front
# ends, or serve them.
ENGINES = ("EngineCore", "VLLM::Worker", "VLLM::")


@dataclass
class Stack:
    """A server under test: where it is and which process trees it consists of."""

    name: str
    url: str
    key: str
    pids: tuple[int, ...]

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to it, now."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                found += [root, *root.children(recursive=True)]
        return found

    def signal(self, number: int) -> None:
        """Send a signal to all of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def cpu_s(self) -> float:
        """CPU seconds it has used."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def prioritise(self) -> bool:
        """Run its front ends at real-time priority; False if that is not allowed."""
        done = True
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if not any(name in line for name in ENGINES):
                    done = real_time(process.pid) and done
        return done


def real_time(pid: int) -> bool:
    """Give all threads of a process the lowest real-time priority."""
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
    except (OSError, PermissionError):
        return False
    return True


@dataclass
class Result:
    """What one stack did at one concurrency, over all rounds."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    failed: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)

    def add(self, answer: Answer, stream: bool, max_tokens: int) -> None:
        """Count an answer."""
        late = stream and answer.first_s is None
        if not answer.complete or late or answer.tokens != max_tokens:
            self.failed += 1
            return
        self.tokens += answer.tokens
        self.latency_ms.append((answer.ended_s - answer.began_s) * 1000)
        if answer.first_s is not None:
            self.ttft_ms.append((answer.first_s - answer.began_s) * 1000)

    def summary(self) -> dict[str, float]:
        """The figures that are printed."""
        return {
            "requests_per_s": len(self.latency_ms) / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_p50_ms": percentile(self.ttft_ms, 50),
            "ttft_p99_ms": percentile(self.ttft_ms, 99),
            "latency_p50_ms": percentile(self.latency_ms, 50),
            "latency_p99_ms": percentile(self.latency_ms, 99),
            "cpu_s_per_mtok": self.cpu_s / max(1, self.tokens) * 1e6,
            "failed": self.failed,
        }


@contextlib.contextmanager
def process(
    name: str, command: list[str], url: str, logs: Path, health: str = "/health", **env: str
) -> Iterator[Stack]:
    """A server as a child process, until ``health`` answers; ended with its whole tree."""
    log_path = logs / f"{name}.log"
    with log_path.open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)
    stack = Stack(name, url, "none", (child.pid,))
    try:
        wait_for(f"{url}{health}", child, log_path)
        yield stack
    finally:
        family = stack.processes()
        stack.signal(signal.SIGCONT)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)
        for orphan in psutil.wait_procs(family, timeout=20)[1]:
            orphan.kill()


def direct(engine: str, model: Path, logs: Path) -> contextlib.AbstractContextManager[Stack]:
    """The engine's own server."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if engine == "paced":
        command = [sys.executable, str(SCRIPTS / "paced_engine.py"), str(port)]
        return process("direct", command, url, logs)
    command = [
        # What the command ``vllm serve`` runs; the command itself looks for a package named vllm.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES)),
        *("--enforce-eager", "--dtype", "bfloat16"),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    return process(
        "direct", command, url, logs, VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1"
    )


def bare(engine: str, model: Path, logs: Path) -> contextlib.AbstractContextManager[Stack]:
    """A bare Ray Serve application around the same engine."""
    port = free_port()
    name = "vllm" if engine == "tiny" else engine
    command = [sys.executable, str(SCRIPTS / "bare_serve.py"), str(port), name, str(model)]
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    return process("bare", command, f"http://127.0.0.1:{port}", logs, PYTHONPATH=path)


@contextlib.contextmanager
def market(engine: str, model: Path, logs: Path) -> Iterator[Stack]:
    """A market of its own with the model, one tenant and its key."""
    with OwnMarket(logs / "home", model) as own:
        stack = Stack("market", own.url, "", (own.pid,))
        try:
            name = "vllm" if engine == "tiny" else engine
            own.cli("deploy", MODEL, "--mode", "tokens", "--engine", name)
            stack.key = own.tenant("bench")
            yield stack
        finally:
            stack.signal(signal.SIGCONT)


@contextlib.contextmanager
def litellm(upstream: Stack, python: Path, logs: Path) -> Iterator[Stack]:
    """LiteLLM's proxy in front of ``direct``; both are one stack."""
    port = free_port()
    config = logs / "litellm.json"  # JSON is YAML
    entry = {
        "model_name": MODEL,
        "litellm_params": {
            "model": f"hosted_vllm/{MODEL}",
            "api_base": f"{upstream.url}/v1",
            "api_key": "none",
        },
    }
    settings = {"model_list": [entry], "litellm_settings": {"telemetry": False}}
    config.write_text(json.dumps(settings))
    url = f"http://127.0.0.1:{port}"
    command = [str(python.parent / "litellm"), "--config", str(config), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--telemetry", "False"]
    key = "sk-" + secrets.token_hex(32)  # without one it does not start
    environment = {"LITELLM_LOG": "ERROR", "NO_DOCS": "True", "LITELLM_MASTER_KEY": key}
    with process("litellm", command, url, logs, "/health/liveliness", **environment) as own:
        yield Stack("litellm", url, key, (*own.pids, *upstream.pids))


def litellm_python() -> Path:
    """LiteLLM in an environment of its own beside ours, made at the first run."""
    folder = BIN.parent / "litellm"
    python = folder / "bin" / "python"
    stamp = folder / LITELLM
    if not stamp.exists():
        print(f"installing {LITELLM} beside this environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", LITELLM]
        subprocess.run(pip, check=True)
        stamp.touch()
    return python


def wait_for(url: str, child: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the address answers. Raises RuntimeError with the log's end if it never does."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code in (200, 401):
                return
        time.sleep(0.3)
    raise RuntimeError(f"{url} did not come up:\n{log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    concurrency: int
    stream: bool


def body(max_tokens: int, stream: bool) -> dict[str, Any]:
    """The request that every client sends."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is a dictionary in Python?"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    if stream:
        asked["stream_options"] = {"include_usage": True}
    return asked


def run(stack: Stack, case: Case, count: int, max_tokens: int, result: Result) -> None:
    """Send ``count`` requests."""
    request = http_request(
        stack.url, stack.key, "/v1/chat/completions", body(max_tokens, case.stream)
    )

    def keep(answer: Answer) -> None:
        if answer.status != 200:
            print(f"  {stack.name}: {answer.status} {answer.body[:300]!r}", file=sys.stderr)
        result.add(answer, case.stream, max_tokens)

    before_s = stack.cpu_s()
    requests = [request] * count
    result.seconds += asyncio.run(
        load(stack.url, requests, case.concurrency, case.stream, keep, REQUEST_TIMEOUT_S, JITTER_S)
    )
    result.cpu_s += stack.cpu_s() - before_s


def measure(
    stacks: list[Stack], cases: list[Case], rounds: int, max_tokens: int
) -> dict[Case, dict[str, Result]]:
    """Interleave the stacks round by round; the first requests of each are a warm-up."""
    results = {case: {stack.name: Result() for stack in stacks} for case in cases}
    allowed = min(stack.prioritise() for stack in stacks) and real_time(os.getpid())
    print(f"real-time priority of front ends and client: {'yes' if allowed else 'not allowed'}")
    for stack in stacks:
        stack.signal(signal.SIGSTOP)
    for number in range(rounds):
        for case in cases:
            turn = stacks[number % len(stacks) :] + stacks[: number % len(stacks)]
            for stack in turn:
                stack.signal(signal.SIGCONT)
                time.sleep(0.5)
                run(stack, case, case.concurrency + 1, 8, Result())
                count = max(24 if case.stream else 16, 4 * case.concurrency)
                run(stack, case, count, max_tokens, results[case][stack.name])
                stack.signal(signal.SIGSTOP)
            kind = "streamed" if case.stream else "whole"
            print(f"  round {number + 1}, {case.concurrency} clients, {kind}", flush=True)
    for stack in stacks:
        stack.signal(signal.SIGCONT)
    return results


COLUMNS: dict[str, tuple[str, int]] = {
    "requests_per_s": ("req/s", 2),
    "tokens_per_s": ("tok/s", 0),
    "ttft_p50_ms": ("TTFT p50", 1),
    "ttft_p99_ms": ("p99", 1),
    "latency_p50_ms": ("lat. p50", 1),
    "latency_p99_ms": ("p99", 1),
    "cpu_s_per_mtok": ("CPU s/Mtok", 0),
    "failed": ("failed", 0),
}


def report(engine: str, results: dict[Case, dict[str, Result]]) -> list[dict[str, Any]]:
    """Print the table and, for the market, the ratios to the others; returns the rows."""
    rows: list[dict[str, Any]] = []
    head = f"{'engine':<6} {'clients':>7} {'':<8} {'stack':<8}"
    head += "".join(f" {title:>10}" for title, _ in COLUMNS.values())
    print(f"\n{head}\n{'-' * len(head)}")
    for case, by_stack in results.items():
        kind = "streamed" if case.stream else "whole"
        figures = {name: result.summary() for name, result in by_stack.items()}
        for name, values in figures.items():
            cells = "".join(
                f" {values[column]:>10.{places}f}" for column, (_, places) in COLUMNS.items()
            )
            print(f"{engine:<6} {case.concurrency:>7} {kind:<8} {name:<8}{cells}")
            rows.append({"engine": engine, "stack": name, **vars(case), **values})
        ours = figures.get("market")
        for name, values in figures.items():
            if ours is None or name == "market" or not values["tokens_per_s"]:
                continue
            added = ours["ttft_p50_ms"] - values["ttft_p50_ms"]
            ratio = ours["tokens_per_s"] / values["tokens_per_s"]
            delay = f", TTFT p50 {added:+.1f} ms" if case.stream else ""
            print(f"{'':<24} market / {name}: tok/s {ratio:.2f}{delay}")
            rows.append(
                {
                    "engine": engine,
                    "stack": f"market/{name}",
                    **vars(case),
                    "tokens_per_s": ratio,
                    "ttft_added_ms": added,
                }
            )
    print("\ntimes in ms; CPU seconds are of the stack's own processes")
    return rows


def bench(engine: str, arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """All stacks around one engine."""
    wanted = arguments.stacks.split(",")
    python = litellm_python() if "litellm" in wanted else Path()
    cases = [
        Case(int(clients), stream)
        for clients in arguments.concurrency.split(",")
        for stream in (True, False)
        if stream or not arguments.streamed_only
    ]
    makers: dict[str, Callable[..., contextlib.AbstractContextManager[Stack]]] = {
        "direct": direct,
        "bare": bare,
        "market": market,
    }
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="market-bench-")))
        stacks = {}
        for name, make in makers.items():
            if name in wanted or (name == "direct" and "litellm" in wanted):
                print(f"starting {name} around {engine}", flush=True)
                stacks[name] = stack.enter_context(make(engine, model, logs))
        if "litellm" in wanted:
            print("starting litellm", flush=True)
            own = litellm(stacks["direct"], python, logs)
            stacks["litellm"] = stack.enter_context(own)
        chosen = [stacks[name] for name in wanted]
        results = measure(chosen, cases, arguments.rounds, arguments.max_tokens)
        rows = report(engine, results)
        if "market" in stacks:
            rows.append(gateway_figures(stacks["market"], logs / "home"))
    return rows


def gateway_figures(stack: Stack, home: Path) -> dict[str, Any]:
    """What the market says of itself: slices of all that was asked, admission of one at a time.

    The time of an admission is that on the wall: beside others it is mostly waiting for the CPU.
    """
    key = (home / "operator.key").read_text().strip()

    def values() -> dict[str, float]:
        headers = {"authorization": f"Bearer {key}"}
        page = httpx.get(f"{stack.url}/metrics", headers=headers).text
        found: dict[str, float] = defaultdict(float)
        for line in page.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
        return found

    before = values()
    run(stack, Case(1, False), 100, 1, Result())
    after = values()
    spent_s, asked = (
        after[f"market_admission_seconds_{part}"] - before[f"market_admission_seconds_{part}"]
        for part in ("sum", "count")
    )
    grants, all_asked = (
        before[name] for name in ("market_slice_grants_total", "market_admission_seconds_count")
    )
    figures = {
        "admission_us": spent_s / asked * 1e6,
        "renewals_per_1000": grants / all_asked * 1000,
    }
    print(
        f"market: admission {figures['admission_us']:.0f} us a request asked alone, "
        f"{figures['renewals_per_1000']:.1f} slice grants per 1,000 requests"
    )
    return figures


def main() -> None:
    """Start the stacks, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="paced,tiny")
    parser.add_argument("--stacks", default="direct,bare,market,litellm")
    parser.add_argument("--concurrency", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--streamed-only", action="store_true")
    parser.add_argument("--model", type=Path, help="folder of the tiny model, made if missing")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="market-bench-") as folder:
        install_paced(Path(folder))
        model = tiny_model(arguments.model or Path(folder) / MODEL)
        for engine in arguments.engines.split(","):
            rows += bench(engine, arguments, model)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
