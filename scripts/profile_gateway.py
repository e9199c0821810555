#!/usr/bin/env python3
"""Where a gateway's time goes: its CPU, sampled under load and sorted by what it was spent on.

A market of its own with the paced engine (20 ms a token, so that everything measured is ours) gets
streamed chats from so many clients; py-spy samples the gateway meanwhile. Each sample belongs to
the innermost frame that is listed in LAYERS.

    .venv/bin/python scripts/profile_gateway.py [--clients 64] [--seconds 20] [--max-tokens 64]
"""

import argparse
import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import paced_engine
import psutil
from loadgen import Answer, http_request, load
from own_market import MODEL, OwnMarket, paced_market

PY_SPY = "py-spy==0.4.1"
RATE = 500
# Where in the story a frame belongs, by a part of its file's path; the first that fits.
LAYERS = {
    "authentication": ("serve_apps/auth",),
    "body and template": ("serve_apps/wire", "pydantic", "serve_apps/tokenization", "jinja2"),
    "tokenizer": ("transformers", "tokenizers"),
    "admission, slices, limits": (
        *("market/inference", "market/slic", "market/limits", "market/pricing"),
        *("market/accounts", "market/credit"),
    ),
    "queue and fairness": ("market/queueing", "market/fairness"),
    "usage records": ("market/ledger", "serve_apps/metrics", "prometheus_client"),
    "access log, telemetry": ("serve_apps/observed", "serve_apps/telemetry", "logging"),
    "link to replicas": ("serve_apps/link", "serve_apps/frames"),
    "writing events": ("serve_apps/shapes", "serve_apps/streams", "serve_apps/openai_api"),
    "HTTP framework": ("starlette", "fastapi", "serve_apps/http"),
    "HTTP server": ("uvicorn", "httptools"),
    "routes and scheduler": ("serve_apps/live", "serve_apps/gateway", "market/scheduler"),
    "event loops": ("asyncio", "uvloop", "selectors", "/ray/"),  # uvloop has no frames of its own
}


def py_spy() -> Path:
    """The sampler in an environment of its own beside ours, made at the first run."""
    folder = Path(sys.executable).parent.parent / "py-spy"
    tool = folder / "bin" / "py-spy"
    if not tool.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", PY_SPY]
        subprocess.run(pip, check=True)
    return tool


def layer_of(stack: str) -> str:
    """The layer of a collapsed stack: its innermost frame that is known."""
    for frame in reversed(stack.split(";")):
        for layer, parts in LAYERS.items():
            if any(part in frame for part in parts):
                return layer
    return "other"


def gateway_of(pid: int) -> psutil.Process:
    """The gateway's process in a market's tree."""
    for process in psutil.Process(pid).children(recursive=True):
        if any("ServeReplica:gateway" in part for part in process.cmdline()):
            return process
    raise RuntimeError("no gateway runs")


def profile(own: OwnMarket, key: str, arguments: argparse.Namespace) -> None:
    """Load, sample, print."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is a dictionary in Python?"}],
        "max_tokens": arguments.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = http_request(own.url, key, "/v1/chat/completions", body)
    answers: list[Answer] = []
    per_answer_s = arguments.max_tokens * paced_engine.STEP_S
    count = max(arguments.clients, int(arguments.clients * arguments.seconds / per_answer_s))

    def send(requests: int) -> float:
        answers.clear()
        return asyncio.run(
            load(
                own.url,
                [request] * requests,
                arguments.clients,
                True,
                answers.append,
                jitter_s=paced_engine.STEP_S,
            )
        )

    send(2 * arguments.clients)  # warm
    gateway = gateway_of(own.pid)
    raw = arguments.stacks or own.home / "stacks"
    before = gateway.cpu_times()
    command = [str(py_spy()), "record", "--pid", str(gateway.pid), "--format", "raw"]
    command += ["--rate", str(RATE), "--output", str(raw), "--full-filenames", "--nonblocking"]
    sampler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = send(count)
    after = gateway.cpu_times()
    sampler.send_signal(2)
    sampler.wait(60)
    done = [answer for answer in answers if answer.complete]
    cpu_s = after.user + after.system - before.user - before.system
    samples: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        samples[layer_of(stack)] += int(number)
    total = sum(samples.values())
    tokens = sum(answer.tokens for answer in done)
    print(f"{len(done)} of {count} answers, {tokens:,} tokens in {seconds:.1f} s", end="")
    print(f" with {arguments.clients} clients; the gateway used {cpu_s:.2f} CPU s")
    print(f"{'':<28} {'share':>6} {'us a request':>13} {'us a token':>11}")
    for layer, number in samples.most_common():
        share = number / total
        spent_us = share * cpu_s * 1e6
        print(f"{layer:<28} {share:>6.1%} {spent_us / len(done):>13.0f} {spent_us / tokens:>11.2f}")


def main() -> None:
    """Start a market with the paced engine and profile its gateway."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, help="folder of the tiny model, made if missing")
    parser.add_argument("--stacks", type=Path, help="keep the sampled stacks here")
    arguments = parser.parse_args()
    with paced_market(arguments.model) as own:
        profile(own, own.tenant("bench"), arguments)


if __name__ == "__main__":
    main()
