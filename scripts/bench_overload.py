#!/usr/bin/env python3
"""The market under more load than it can serve: goodput, fairness, and whom a flood hurts.

Eight tenants with weights 1 to 8 share a pool of a paced engine (20 ms a token for each answer
under way, at most 16). One of them, weight 1, sends half of everything; one, weight 4, keeps well
below its share and is the one that must not notice. Arrivals are Poisson and wait for nobody, at
0.5, 1, 2 and 4 times what the pool can serve. Printed, from one run:

- goodput: tokens of complete answers per second, and its ratio to the best of all levels;
- refusals by status, how many of them said when to come again, and failures, which should be none;
- gap: the largest difference of weighted service between two tenants that had requests waiting all
  the time, beside the bound of VTC (market/fairness.py) with what is served between two reports;
- p99 of the well-behaved tenant's answers beside its own arrivals without the others.

    .venv/bin/python scripts/bench_overload.py [--levels 0.5,1,2,4] [--seconds 60] [--gateways 1]
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paced_engine
from loadgen import Answer, Connection, connect, http_request, percentile
from own_market import MODEL, paced_market

from market.fairness import OUTPUT_WORK, input_work, spare

PLACES = 16
TOKENS = 32
WEIGHTS = {f"t{weight}": weight for weight in range(1, 9)}
FLOODING, WELL_BEHAVED = "t1", "t4"
# Requests a second that the pool can serve.
CAPACITY = PLACES / (TOKENS * paced_engine.STEP_S)
# The well-behaved tenant asks for this part of its fair share.
MODEST = 0.5
WARM_UP_S = 5.0
# Gateways report twice a second (serve_apps/live.py).
REPORT_S = 0.5
TIMEOUT_S = 120


@dataclass
class Seen:
    """What one tenant got in one phase."""

    sent: int = 0
    refused: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    told: int = 0
    failed: int = 0
    latency_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    # (when, weighted tokens), as answers end.
    served: list[tuple[float, float]] = field(default_factory=list)
    tokens: int = 0
    # Intervals in which at least one request waited for its first token.
    waiting: int = 0
    idle_s: float = 0.0
    idle_since: float | None = None


def rates(level: float) -> dict[str, float]:
    """Requests a second by tenant: half of all from one, a modest part from one, the rest even."""
    total = level * CAPACITY
    modest = MODEST * WEIGHTS[WELL_BEHAVED] / sum(WEIGHTS.values()) * CAPACITY
    others = [name for name in WEIGHTS if name not in (FLOODING, WELL_BEHAVED)]
    each = max(0.0, (total / 2 - modest) / len(others))
    return {FLOODING: total / 2, WELL_BEHAVED: modest} | dict.fromkeys(others, each)


class Phase:
    """Arrivals of one level, and what became of them."""

    def __init__(self, url: str, keys: dict[str, str], seconds: float) -> None:
        self._url = url
        self._keys = keys
        self._seconds = seconds
        self._idle: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen = {name: Seen() for name in keys}
        self.began_s = 0.0

    async def run(self, arrivals: dict[str, float]) -> None:
        """Send for the phase's seconds, then wait for all answers."""
        self.began_s = time.perf_counter()
        senders = [
            self._send(name, rate, random.Random(name))  # the same arrivals at every level
            for name, rate in arrivals.items()
            if rate > 0
        ]
        await asyncio.gather(*senders)
        await asyncio.gather(*self._tasks)
        for connection in self._idle:
            connection.close()

    async def _send(self, name: str, rate: float, chance: random.Random) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is a dictionary in Python?"}],
            "max_tokens": TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = http_request(self._url, self._keys[name], "/v1/chat/completions", body)
        due_s = self.began_s
        while True:
            due_s += chance.expovariate(rate)
            if due_s > self.began_s + self._seconds:
                return
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(self._ask(name, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, name: str, request: bytes) -> None:
        seen = self.seen[name]
        seen.sent += 1
        self._begin_waiting(seen)
        connection = self._idle.pop() if self._idle else await connect(self._url)
        if connection.lost:
            connection = await connect(self._url)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await connection.ask(request, stream=True)
        except TimeoutError:
            answer = connection.answer
            connection.close()
        self._end_waiting(seen, answer.first_s or time.perf_counter())
        if not connection.lost:
            self._idle.append(connection)
        self._count(seen, answer)

    def _begin_waiting(self, seen: Seen) -> None:
        if seen.waiting == 0 and seen.idle_since is not None:
            seen.idle_s += time.perf_counter() - seen.idle_since
        seen.waiting += 1

    def _end_waiting(self, seen: Seen, when_s: float) -> None:
        seen.waiting -= 1
        if seen.waiting == 0:
            seen.idle_since = when_s

    def _count(self, seen: Seen, answer: Answer) -> None:
        if answer.status in (402, 429, 503):
            seen.refused[answer.status] += 1
            seen.told += "retry-after" in answer.headers
        elif not answer.complete or answer.tokens != TOKENS or answer.first_s is None:
            seen.failed += 1
        else:
            seen.latency_ms.append((answer.ended_s - answer.began_s) * 1000)
            seen.first_ms.append((answer.first_s - answer.began_s) * 1000)
            seen.served.append((answer.ended_s, OUTPUT_WORK * answer.tokens))
            if self._counts(answer.ended_s):
                seen.tokens += answer.tokens

    def _counts(self, when_s: float) -> bool:
        return WARM_UP_S <= when_s - self.began_s <= self._seconds

    def goodput(self) -> float:
        """Tokens of complete answers a second, after the warm-up."""
        return sum(seen.tokens for seen in self.seen.values()) / (self._seconds - WARM_UP_S)

    def backlogged(self) -> list[str]:
        """Tenants that had something waiting practically all the time."""
        return [
            name
            for name, seen in self.seen.items()
            if seen.sent and seen.idle_s < 0.01 * self._seconds and seen.latency_ms
        ]

    def gap(self) -> float:
        """Largest difference of weighted service between backlogged tenants, at any moment."""
        names = self.backlogged()
        events = sorted(
            (when_s, name, work / WEIGHTS[name])
            for name in names
            for when_s, work in self.seen[name].served
            if self._counts(when_s)
        )
        totals = dict.fromkeys(names, 0.0)
        widest = 0.0
        for _, name, work in events:
            totals[name] += work
            widest = max(widest, max(totals.values()) - min(totals.values()))
        return widest


def bound(names: list[str], gateways: int) -> float:
    """Of VTC for these tenants, with what is served between two reports of several gateways.

    The client sees service when an answer ends: up to one answer per place more or less.
    """
    if len(names) < 2:
        return 0.0
    under_way = OUTPUT_WORK * (PLACES + spare(PLACES)) * TOKENS
    stale = 0.0 if gateways == 1 else OUTPUT_WORK * PLACES * REPORT_S / paced_engine.STEP_S
    smallest = min(WEIGHTS[name] for name in names)
    return (2 * max(under_way, input_work(64)) + stale + under_way) / smallest


def p99(seen: Seen) -> float:
    """Of whole answers, in ms."""
    return percentile(seen.latency_ms, 99)


def show(level: float, phase: Phase, peak: float, alone: Seen, gateways: int) -> dict[str, Any]:
    """Print a level; returns its figures."""
    everybody = phase.seen.values()
    modest = phase.seen[WELL_BEHAVED]
    names = phase.backlogged()
    refused: dict[int, int] = defaultdict(int)
    for seen in everybody:
        for status, count in seen.refused.items():
            refused[status] += count
    figures = {
        "level": level,
        "sent": sum(seen.sent for seen in everybody),
        "goodput": phase.goodput(),
        "of_peak": phase.goodput() / peak,
        "refused": dict(refused),
        "told_when": sum(seen.told for seen in everybody),
        "failed": sum(seen.failed for seen in everybody),
        "backlogged": len(names),
        "gap": phase.gap() if len(names) > 1 else 0.0,
        "bound": bound(names, gateways),
        "p99_ms": p99(modest),
        "p99_of_alone": p99(modest) / p99(alone),
        "ttft_p99_ms": percentile(modest.first_ms, 99),
        "ttft_p99_alone_ms": percentile(alone.first_ms, 99),
        "refused_modest": sum(modest.refused.values()),
    }
    shares = "  ".join(f"{name}:{seen.tokens}" for name, seen in phase.seen.items())
    print(f"\n{level:g} x capacity: {figures['sent']} requests")
    print(f"  goodput {figures['goodput']:.0f} tok/s, {figures['of_peak']:.2f} of the peak")
    print(f"  refused {figures['refused']}, told when {figures['told_when']}", end="")
    print(f", failed {figures['failed']}")
    print(f"  tokens by tenant {shares}")
    print(f"  {len(names)} backlogged, gap {figures['gap']:.0f}, bound {figures['bound']:.0f}")
    print(f"  {WELL_BEHAVED}: p99 {figures['p99_ms']:.0f} ms", end="")
    print(f" = {figures['p99_of_alone']:.2f} of alone; first token p99", end="")
    print(f" {figures['ttft_p99_ms']:.0f} ms, alone {figures['ttft_p99_alone_ms']:.0f} ms", end="")
    print(f"; refused {figures['refused_modest']}")
    return figures


def main() -> None:
    """Start the market, run the levels, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", default="0.5,1,2,4")
    parser.add_argument("--seconds", type=float, default=60, help="of each level")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of the tiny model, made if missing")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    levels = [float(level) for level in arguments.levels.split(",")]
    settings = {"MARKET_GATEWAYS": str(arguments.gateways), "MARKET_SEQUENCES": str(PLACES)}
    with paced_market(arguments.model, **settings) as own:
        keys = {name: own.tenant(name) for name in WEIGHTS}
        for name, weight in WEIGHTS.items():
            own.cli("tenants", "set", name, "--weight", str(weight))
        phases = {}
        for level in (0.0, *levels):  # first the well-behaved one alone
            arrivals = rates(level)
            if level == 0.0:
                arrivals = {WELL_BEHAVED: arrivals[WELL_BEHAVED]}
            print(f"{level:g} x capacity ...", file=sys.stderr, flush=True)
            phases[level] = Phase(own.url, keys, arguments.seconds)
            asyncio.run(phases[level].run(arrivals))
    alone = phases.pop(0.0).seen[WELL_BEHAVED]
    peak = max(phase.goodput() for phase in phases.values())
    print(f"capacity {CAPACITY * TOKENS:.0f} tok/s; {arguments.gateways} gateways")
    figures = [
        show(level, phase, peak, alone, arguments.gateways) for level, phase in phases.items()
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
