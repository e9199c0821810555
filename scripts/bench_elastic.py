#!/usr/bin/env python3
"""What scaling to zero costs those who ask, and saves those who pay.

    scripts/bench_elastic.py                       cold and burst, on a real market, here
    scripts/bench_elastic.py --parts cold --engines vllm --rounds 3
    scripts/bench_elastic.py --parts day --trace FILE.parquet
    scripts/bench_elastic.py --parts forecast --rates FILE.parquet
    scripts/bench_elastic.py --parts hybrid --tenant-trace FILE.parquet --gpu-prices FILE.csv \
        --token-prices FILE.csv

cold: a request for a model at zero replicas, without and with a spare process, beside the engine
alone; each split into its parts by what the engine says. burst: twenty times what one replica is
asked at once, on a pool at zero, by several tenants; fails unless several replicas answer all and
each tenant is billed what it was told. day: a trace (columns arrival_s, session, prompt_tokens,
output_tokens; each session as a model of its own) through the scheduler's own decisions with
virtual replicas; what is assumed of them is printed, and swept; then all on so few GPUs that models
put each other out. forecast: the seventh day of real counts per tenant and ten minutes (columns
model, client, window_start_s, requests), with and without starts ahead of what was usual on the six
before. hybrid: a tenant's trace on leases of its own that spill to a pool, by routing.py's own
decisions: cost against lease only and tokens only.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import httpx
import marked_engine
import numpy as np
import pandas as pd
import psutil
from marked_engine import INNER
from marked_engine import NAME as MARKED
from own_market import MODEL, SCRIPTS, OwnMarket, tiny_model

from market.autoscaling import WHOLE_MILLI, Costs, keep_alive_s
from market.forecast import BUCKET_S, Bucket, History
from market.simulation.hybrid import HybridOutcome, simulate_hybrid
from market.simulation.pools import Arrival, Gpus, Machine, Outcome, simulate, simulate_shared
from market.types import Bounds

BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is a list?"}],
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}
# The burst: twenty times what one replica serves at once, from so many tenants; answers are long
# enough that all replicas are there before the last one begins.
BURST = 20
BURST_PLACES = 2
BURST_TENANTS = 4
BURST_TOKENS = 512
POLL_S = 0.02
PATIENCE_S = 300.0
DEPOSIT = Decimal(1000)  # of each tenant (own_market.py)
REPLICA = "ServeReplica:model-"
# The parts of a cold start, by what was done at their end; vLLM says some of them itself.
PARTS = (
    "decision",
    "new process",
    "imports",
    "told to load",
    "engine process",
    "worker process",
    "weights",
    "compile",
    "KV cache",
    "graphs",
    "profile and warm-up",
    "load",
    "asked",
    "first token",
    "to the client",
)
VLLM_SAYS = {
    "Initializing a V1 LLM engine": "engine process",
    "Starting to load model": "worker process",
    "Loading weights took": "weights",
    "torch.compile took": "compile",
    "KV cache size: ": "KV cache",
    "Graph capturing finished": "graphs",
    "init engine (": "profile and warm-up",
}
AGAIN = "again"
DAY_S = 86_400.0
REPLICAS_MAX = 1024
HOUR_PICO = 2 * 10**12
# One GPU of the replay: a mid-size model on a current card.
MACHINE = Machine(places=32, prompt_tokens_per_s=8_000, output_tokens_per_s=40, start_s=20)
# Of a GPU that a model needs where it shares one.
SHARE = 0.25
GPU = "H100"
# By model of the counts per tenant: one request in so many, mean tokens of prompt and answer.
THINNED = {"m-large": (100, 593, 174), "m-mid": (1000, 521, 89), "m-small": (400, 159, 27)}
KNOWN_DAYS = 6
KEPT_LONGER = 1.5
SEED = 1
# Of a tenant's requests so many must have their first token within two seconds.
GOOD = 0.99


@contextmanager
def elastic_market(
    engine: str, bounds: str, size: Sequence[str] = (), **settings: str
) -> Iterator[OwnMarket]:
    """A market with the tiny model (of a size) at zero replicas."""
    with tempfile.TemporaryDirectory(prefix="market-bench-") as name:
        folder = Path(name)
        model = tiny_model(folder / MODEL, *size)
        with OwnMarket(folder / "home", model, **settings) as own:
            options = ("--engine", engine, "--replicas", bounds, "--keep-alive", "2s")
            own.cli("deploy", MODEL, *options)
            yield own


def mark_in(line: str, now: float) -> tuple[str, float] | None:
    """What a process says in a line that it has done, and when."""
    if line.startswith("mark "):
        _, at, done = line.rstrip().split(" ", 2)
        return done, float(at)
    return next(((done, now) for words, done in VLLM_SAYS.items() if words in line), None)


def parts_of(asked: float, marks: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each part; what was done before it was asked for took none.

    Nothing is later than what comes after it, though it may have been seen later.
    """
    names = [name for name in PARTS if name in marks]
    backwards = list(accumulate((marks[name] for name in reversed(names)), min))
    moments = [max(asked, moment) for moment in reversed(backwards)]
    seconds = (moment - before for before, moment in pairwise([asked, *moments]))
    return dict(zip(names, seconds, strict=True)) | {"in all": moments[-1] - asked}


class Watcher(threading.Thread):
    """Notes when each thing was first seen while a model starts."""

    def __init__(self, own: OwnMarket) -> None:
        super().__init__(daemon=True)
        self._url = f"{own.url}/market/v1/deployments"
        key = (own.home / "operator.key").read_text().strip()
        self._headers = {"authorization": f"Bearer {key}"}
        self._head = psutil.Process(own.pid)
        cluster = json.loads((own.home / "state" / "cluster.json").read_text())
        self._logs = Path(cluster["temp_dir"]) / "session_latest" / "logs"
        self._read = {path: path.stat().st_size for path in self._logs.glob("worker-*.out")}
        self._over = threading.Event()
        self._seen: dict[str, float] = {}

    def run(self) -> None:
        """Until told to end."""
        with httpx.Client(headers=self._headers) as client:
            while not self._over.wait(POLL_S):
                with suppress(httpx.TimeoutException):  # while all CPUs are busy
                    (deployment,) = client.get(self._url).json()
                    if deployment["places"]:
                        self._seen.setdefault("decision", time.time())
                if "new process" not in self._seen:
                    self._look_for_process()
                self._look_for_marks()

    def _look_for_process(self) -> None:
        for process in self._head.children(recursive=True):
            try:
                if any(REPLICA in part for part in process.cmdline()):
                    # Its own word depends on a clock that stood still with the machine.
                    self._seen["new process"] = time.time()
            except psutil.NoSuchProcess:
                continue

    def _look_for_marks(self) -> None:
        for path in self._logs.glob("worker-*.out"):
            with path.open("rb") as log:
                log.seek(self._read.get(path, 0))
                said, _, _ = log.read().rpartition(b"\n")
            if said:
                self._read[path] = self._read.get(path, 0) + len(said) + 1
            for line in said.decode(errors="replace").splitlines():
                if mark := mark_in(line, time.time()):
                    self._seen.setdefault(*mark)

    def end(self) -> dict[str, float]:
        """What was seen, in seconds since the epoch."""
        self._over.set()
        self.join()
        self._look_for_marks()
        return self._seen


def wait_cold(own: OwnMarket, spares: int = 0) -> None:
    """Until nothing of the model is left, and so many processes wait for one."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        (deployment,) = own.cli("deployments")
        ready = own.cli("status")["scheduler"]["spares_ready"]
        if deployment["state"] == "cold" and not deployment["places"] and ready >= spares:
            return
        time.sleep(0.2)
    raise RuntimeError("the model did not fall asleep")


def cold_start(own: OwnMarket, key: str, spares: int) -> dict[str, float]:
    """One cold request; the seconds of its parts."""
    wait_cold(own, spares)
    headers = {"authorization": f"Bearer {key}"}
    body = BODY | {"stream": True}
    first = None
    with httpx.Client(base_url=own.url, headers=headers, timeout=PATIENCE_S) as client:
        watcher = Watcher(own)
        watcher.start()
        asked = time.time()
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if first is None and '"content":"' in line and '"content":""' not in line:
                    first = time.time()
    assert first is not None, "no token came"
    return parts_of(asked, watcher.end() | {"to the client": first})


def bare_load(engine: str, model: Path) -> dict[str, dict[str, float]]:
    """The parts of the seconds until the engine alone has its first text: in a new process, and
    once more in the same one, with all that it imports behind it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template(BODY["messages"], add_generation_prompt=True)
    prompt = tuple(asked["input_ids"])
    code = f"""
import sys
sys.path[:0] = [{str(SCRIPTS.parent)!r}, {str(SCRIPTS)!r}]
import asyncio
from contextlib import aclosing
from pathlib import Path
import marked_engine
from serve_apps.engines.base import EngineSettings
from market.types import EngineRequest, Sampling
async def once():
    engine = await marked_engine.start(EngineSettings(Path({str(model)!r}), 2048, 0.0))
    sampling = Sampling({BODY["max_tokens"]}, temperature=0, ignore_eos=True)
    async with aclosing(engine.generate(EngineRequest("r", {prompt!r}, sampling, "s"))) as chunks:
        async for chunk in chunks:
            if chunk.text:
                break
    await engine.close()
async def main():
    marked_engine.mark("new process")
    marked_engine.import_all()
    await once()
    marked_engine.mark({AGAIN!r})
    await once()
asyncio.run(main())
"""
    one_thread = {"OMP_NUM_THREADS": "1"}  # as Ray gives it to a replica on CPUs
    runs: list[tuple[float, dict[str, float]]] = [(time.time(), {})]
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | one_thread | {INNER: engine},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            mark = mark_in(line, time.time())
            if mark and mark[0] == AGAIN:
                runs.append((mark[1], {}))
            elif mark:
                runs[-1][1].setdefault(*mark)
    if process.returncode:
        raise RuntimeError(f"{engine} alone failed:\n{''.join(lines[-50:])}")
    new, again = (parts_of(*run) for run in runs)
    return {"new process": new, "imports warm": again}


def said(parts: Mapping[str, float]) -> str:
    """Parts in a line."""
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def bench_cold(engine: str, rounds: int, size: Sequence[str]) -> dict[str, Any]:
    """Cold requests, the median of each part, before there were spare processes and after."""
    with tempfile.TemporaryDirectory(prefix="market-bench-") as name:
        bare = bare_load(engine, tiny_model(Path(name) / MODEL, *size))
        install_marked(Path(name), engine)
        print(f"\ncold request, {engine}, median of {rounds} (seconds)")
        for kind, parts in bare.items():
            print(f"  engine alone, {kind}: {said(parts)}")
        results: dict[str, Any] = {"engine": engine, "bare": bare}
        for spares in (0, 1):
            settings = {"MARKET_SPARES": str(spares)}
            with elastic_market(MARKED, "0:1", size, **settings) as own:
                key = own.tenant("acme")
                tries = [cold_start(own, key, spares) for _ in range(rounds)]
            names = [part for part in (*PARTS, "in all") if any(part in one for one in tries)]
            medians = {
                part: statistics.median(one.get(part, 0.0) for one in tries) for part in names
            }
            results[f"MARKET_SPARES={spares}"] = medians
            print(f"  market, MARKET_SPARES={spares}: {said(medians)}")
            for kind, parts in bare.items():
                ratio = medians["in all"] / parts["in all"]
                print(f"    in all / engine alone, {kind}: {ratio:.2f}")
    return results


def install_marked(folder: Path, engine: str) -> None:
    """Make the marked engine one of those that markets started from here know."""
    plugins = folder / "plugins"
    plugins.mkdir()
    marked_engine.installed(plugins)
    paths = (str(plugins), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ[INNER] = engine


def bench_burst(engine: str, times: int) -> dict[str, Any]:
    """Many at once on a pool at zero: what was answered, by how many replicas, and what was billed.

    Ends the program if a request was lost, a tenant billed otherwise than told, or if one replica
    served alone.
    """
    count = times * BURST_PLACES
    with elastic_market(engine, "0:4", MARKET_SEQUENCES=str(BURST_PLACES)) as own:
        tenants = [f"tenant-{n}" for n in range(BURST_TENANTS)]
        keys = {name: own.tenant(name) for name in tenants}
        # Each of them asks more than the one before.
        turns = [name for n, name in enumerate(tenants, 1) for _ in range(n)]
        askers = [turns[n % len(turns)] for n in range(count)]
        wait_cold(own)
        body = BODY | {"max_tokens": BURST_TOKENS}

        async def burst() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=count)
            async with httpx.AsyncClient(
                base_url=own.url, timeout=PATIENCE_S, limits=limits
            ) as client:
                headers = [{"authorization": f"Bearer {keys[name]}"} for name in askers]
                return await asyncio.gather(
                    *(client.post("/v1/chat/completions", json=body, headers=h) for h in headers)
                )

        began = time.monotonic()
        answers = asyncio.run(burst())
        seconds = time.monotonic() - began
        rows = usage_rows(own, count)
        left = {name: Decimal(own.cli("tenants", "show", name)["balance"]) for name in tenants}
    good = [answer.status_code == 200 for answer in answers]
    whole = [
        ok and answer.json()["usage"]["completion_tokens"] == BURST_TOKENS
        for ok, answer in zip(good, answers, strict=True)
    ]
    served = Counter(dict(attrs)["replica"] for attrs in rows["attrs"])
    print(
        f"\nburst of {count} ({times} x {BURST_PLACES} places of a replica) from {BURST_TENANTS} "
        f"tenants on a pool at zero, {engine}: {sum(whole)} answered, {count - sum(whole)} not, "
        f"all in {seconds:.1f} s, by {len(served)} replicas ({sorted(served.values())})"
    )
    is_right = sum(whole) == count and len(rows) == count and len(served) > 1
    for name in tenants:
        said = sum(
            Decimal(answer.headers["x-market-cost"])
            for who, ok, answer in zip(askers, good, answers, strict=True)
            if who == name and ok
        )
        booked = sum(rows[rows["tenant_id"] == name]["charge"])
        billed = DEPOSIT - left[name]
        print(f"  {name}: said {said}, in the ledger {booked}, billed {billed}")
        is_right = is_right and said == booked == billed
    if not is_right:
        raise SystemExit("a request was lost, billed wrongly, or one replica served all of them")
    return {"burst": count, "replicas": len(served), "seconds": seconds}


def usage_rows(own: OwnMarket, count: int) -> pd.DataFrame:
    """The usage ledger as soon as it has so many rows, or as it is when patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    rows = pd.DataFrame()
    while len(rows) < count and time.monotonic() < deadline:
        time.sleep(0.5)
        with suppress(FileNotFoundError):
            rows = pd.read_parquet(own.home / "ledger" / "usage")
    return rows


def bench_day(
    trace: Path,
    starts: list[float],
    capacities: list[float],
    fleets: list[int],
    switches: list[float],
) -> list[dict[str, Any]]:
    """The trace under four ways to hold GPUs, for several times to start, and at the middle one of
    them for other capacities of a GPU and for so many GPUs for all.
    """
    frame = pd.read_parquet(trace).sort_values("arrival_s")
    pools = [
        [
            Arrival(*row)
            for row in rows[["arrival_s", "prompt_tokens", "output_tokens"]].itertuples(index=False)
        ]
        for _, rows in frame.groupby("session")
    ]
    requests = sum(map(len, pools))
    shared = MACHINE.part(SHARE)
    print(
        f"\na day of {requests:,} requests for {len(pools)} models; a GPU has {MACHINE.places} "
        f"places, {MACHINE.prompt_tokens_per_s:,.0f} prompt tokens/s, times its capacity; an "
        f"answer {MACHINE.output_tokens_per_s:.0f} tokens/s whatever it shares; a GPU costs "
        f"{HOUR_PICO / 1e12:.0f} an hour; a replica on {SHARE:.0%} of a GPU has that part of both "
        f"({shared.places}, {shared.prompt_tokens_per_s:,.0f}; at least one place)"
    )
    head = f"{'start':>6} {'capacity':>8} {'held':<34} {'GPU-hours':>10} {'of always on':>12}"
    print(f"{head} {'starts':>7} {'TTFT <= 2 s':>12} {'p99 s':>7}\n{'-' * (len(head) + 29)}")
    results = []
    middle_s = starts[len(starts) // 2]
    points = [(start_s, 1.0) for start_s in starts]
    points += [(middle_s, capacity) for capacity in capacities if capacity != 1]
    for start_s, capacity in points:
        gpu = replace(MACHINE.part(capacity), start_s=start_s)
        base = None
        for name, outcomes, share in ways(pools, gpu):
            row = day_row(outcomes, share, requests)
            base = base or row["gpu_hours"]
            print(
                f"{start_s:>5.0f}s {capacity:>7g}x {name:<34} {row['gpu_hours']:>10,.0f} "
                f"{row['gpu_hours'] / base:>12.2f} {row['starts']:>7,} "
                f"{row['within_2s']:>12.2%} {row['p99_s']:>7.1f}"
            )
            results.append({"start_s": start_s, "capacity": capacity, "held": name} | row)
    return results + bench_fleets(pools, replace(MACHINE, start_s=middle_s), fleets, switches)


def ways(pools: list[list[Arrival]], gpu: Machine) -> Iterator[tuple[str, list[Outcome], float]]:
    """Ways to hold GPUs of a kind, what came of them, and how much of a GPU a replica has."""

    def day(bounds: Bounds, share: float) -> list[Outcome]:
        part, hour_pico = gpu.part(share), round(HOUR_PICO * share)
        return [simulate(rows, part, bounds, hour_pico, DAY_S) for rows in pools]

    elastic = day(Bounds(0, REPLICAS_MAX), 1.0)
    always = [
        simulate(rows, gpu, Bounds(peak.peak, peak.peak), HOUR_PICO, DAY_S)
        for rows, peak in zip(pools, elastic, strict=True)
    ]
    yield "whole GPUs, always on, for the peak", always, 1.0
    yield "whole GPUs, MIN 1", day(Bounds(1, REPLICAS_MAX), 1.0), 1.0
    yield "whole GPUs, MIN 0", elastic, 1.0
    yield f"{SHARE:.0%} of a GPU, MIN 0", day(Bounds(0, REPLICAS_MAX), SHARE), SHARE


def bench_fleets(
    pools: list[list[Arrival]], gpu: Machine, fleets: list[int], switches: list[float]
) -> list[dict[str, Any]]:
    """The same day on so many GPUs: who needs one puts out who is idle for longest."""
    requests = sum(map(len, pools))
    print(
        f"\nthe same on so many GPUs for all models, MIN 0, a start takes {gpu.start_s:.0f} s "
        "and, where an idle replica is put out for it, the switch"
    )
    head = f"{'GPUs':>6} {'switch':>7} {'held':<34} {'GPU-hours':>10} {'starts':>7} {'put out':>8}"
    print(f"{head} {'TTFT <= 2 s':>12} {'p99 s':>7}\n{'-' * (len(head) + 21)}")
    results = []
    for count, share, switch_s in product(fleets, (1.0, SHARE), switches):
        if share == 1.0 and count < max(fleets):
            continue  # models queue for hours there, and the replay takes as long
        outcomes = simulate_shared(
            pools,
            gpu.part(share),
            Bounds(0, REPLICAS_MAX),
            round(HOUR_PICO * share),
            DAY_S,
            Gpus(count, round(WHOLE_MILLI * share), switch_s),
        )
        row = day_row(outcomes, share, requests)
        name = "whole GPUs" if share == 1.0 else f"{share:.0%} of a GPU"
        evicted = sum(outcome.evicted for outcome in outcomes)
        print(
            f"{count:>6} {switch_s:>6.0f}s {name:<34} {row['gpu_hours']:>10,.0f} "
            f"{row['starts']:>7,} {evicted:>8,} {row['within_2s']:>12.2%} {row['p99_s']:>7.1f}"
        )
        results.append({"gpus": count, "switch_s": switch_s, "held": name} | row)
    return results


def day_row(outcomes: list[Outcome], share: float, requests: int) -> dict[str, Any]:
    """What all pools' days come to; who was not served by the end of it has waited for ever."""
    ttft = sorted(seconds for outcome in outcomes for seconds in outcome.ttft_s)
    ttft += [math.inf] * (requests - len(ttft))
    return {
        "gpu_hours": sum(outcome.replica_s for outcome in outcomes) * share / 3600,
        "starts": sum(outcome.starts for outcome in outcomes),
        "within_2s": sum(seconds <= 2 for seconds in ttft) / requests,
        "p99_s": ttft[int(requests * 0.99)],
    }


def known_days(rates: Path) -> list[tuple[History, list[Arrival]]]:
    """Six days of each tenant's counts, and the requests of its seventh.

    Counts are thinned as in servegen_sampled_24h and spread evenly at random over their window;
    prompts and answers have their model's mean length.
    """
    frame = pd.read_parquet(rates)
    frame = frame[frame["model"].isin(THINNED)].copy()
    random = np.random.default_rng(SEED)
    frame["requests"] = random.binomial(
        frame["requests"], frame["model"].map({name: 1 / THINNED[name][0] for name in THINNED})
    )
    frame["second"] = frame["window_start_s"] - KNOWN_DAYS * DAY_S
    pools = []
    for _, rows in frame[frame["requests"] > 0].groupby("client"):
        _, prompt, output = THINNED[rows["model"].iloc[0]]
        busy_s = output / MACHINE.output_tokens_per_s
        buckets, arrivals = {}, []
        for second, count in rows[["second", "requests"]].itertuples(index=False):
            if second < 0:
                buckets[int(second // BUCKET_S)] = Bucket(count, count * busy_s)
            else:
                moments = second + random.uniform(0, BUCKET_S, count)
                arrivals += [Arrival(at_s, prompt, output) for at_s in moments]
        if arrivals and buckets:
            arrivals.sort(key=lambda arrival: arrival.at_s)
            pools.append((History(min(buckets), buckets), arrivals))
    return pools


def bench_forecast(rates: Path, starts: list[float]) -> list[dict[str, Any]]:
    """The seventh day, with and without the six before; and with idle pools kept longer blindly."""
    pools = known_days(rates)
    requests = sum(len(arrivals) for _, arrivals in pools)
    print(f"\nday 7 with {requests:,} requests for {len(pools)} models, MIN 0, six days known")
    head = f"{'start':>6} {'idle, kept by':<17} {'GPU-hours':>10} {'starts':>7} {'TTFT <= 2 s':>12}"
    print(f"{head} {'later':>8}\n{'-' * (len(head) + 9)}")
    results = []
    for start_s in starts:
        machine = replace(MACHINE, start_s=start_s)
        break_even_s = keep_alive_s(Bounds(), Costs(HOUR_PICO, start_s))
        kept = Bounds(0, 64, keep_alive_s=KEPT_LONGER * break_even_s)
        ways = [
            ("break-even", Bounds(0, 64), False),
            (f"{KEPT_LONGER:g} x break-even", kept, False),
            ("forecast", Bounds(0, 64), True),
        ]
        for name, bounds, knows in ways:
            outcomes = [
                simulate(rows, machine, bounds, HOUR_PICO, DAY_S, history if knows else None)
                for history, rows in pools
            ]
            hours = sum(outcome.replica_s for outcome in outcomes) / 3600
            count = sum(outcome.starts for outcome in outcomes)
            late = sum(seconds > 2 for outcome in outcomes for seconds in outcome.ttft_s)
            print(
                f"{start_s:>5.0f}s {name:<17} {hours:>10,.0f} {count:>7,} "
                f"{1 - late / requests:>12.2%} {late:>8,}"
            )
            results.append({"start_s": start_s, "kept": name, "gpu_hours": hours, "late": late})
    return results


def bench_hybrid(
    trace: Path, gpu_prices: Path, token_prices: Path, model: str, gpus: int, ttft_s: float
) -> list[dict[str, Any]]:
    """A tenant's trace by leases that spill, from none to as many as it ever needs."""
    frame = pd.read_parquet(trace).sort_values("arrival_s")
    columns = frame[["arrival_s", "prompt_tokens", "output_tokens"]]
    arrivals = [Arrival(*row) for row in columns.itertuples(index=False)]
    hours = (arrivals[-1].at_s - arrivals[0].at_s) / 3600
    offers = pd.read_csv(gpu_prices)
    offers = offers[(offers["gpu"] == GPU) & (offers["pricing_type"] == "on-demand")]
    gpu_hour = float(offers["usd_per_gpu_hour"].median())
    cards = pd.read_csv(token_prices)
    cards = cards[cards["model_key"].str.fullmatch(model, na=False)]
    prices = [float(cards[f"{side}_usd_per_1m"].median()) for side in ("input", "output")]
    print(
        f"\n{len(arrivals):,} requests in {hours:.2f} h; {model}: median of {len(cards)} sellers "
        f"{prices[0]:.3g} in, {prices[1]:.3g} out per million tokens; median of {len(offers)} "
        f"offers {gpu_hour:.3g} per {GPU}-hour, {gpus} a replica; a replica has {MACHINE.places} "
        f"places, {MACHINE.prompt_tokens_per_s:,.0f} prompt and {MACHINE.output_tokens_per_s:.0f} "
        f"output tokens/s (per answer); spills from a first token of {ttft_s:g} s on"
    )
    head = f"{'replicas':>8} {'mode':<7} {'cost/h':>8} {'of tokens only':>14} {'spilled':>8}"
    print(f"{head} {'TTFT <= 2 s':>12} {'p99 s':>8}\n{'-' * (len(head) + 22)}")
    results: list[dict[str, Any]] = []

    def row(replicas: int, mode: str, outcome: HybridOutcome) -> None:
        spilled = outcome.spilled_prompt_tokens, outcome.spilled_output_tokens
        tokens = sum(n * price / 1e6 for n, price in zip(spilled, prices, strict=True)) / hours
        cost = replicas * gpus * gpu_hour + tokens
        of_tokens = cost / results[0]["cost"] if results else 1.0
        ttft = sorted(outcome.ttft_s)
        within = sum(seconds <= 2 for seconds in ttft) / len(ttft)
        p99 = ttft[int(len(ttft) * 0.99)]
        print(
            f"{replicas:>8} {mode:<7} {cost:>8.2f} {of_tokens:>14.2f} "
            f"{outcome.spilled / len(arrivals):>8.1%} {within:>12.1%} {p99:>8.1f}"
        )
        results.append({"replicas": replicas, "mode": mode, "cost": cost, "within_2s": within})

    row(0, "tokens", simulate_hybrid(arrivals, MACHINE, 0, None))
    replicas, spilled = 1, 1
    while spilled:
        row(replicas, "lease", simulate_hybrid(arrivals, MACHINE, replicas, None))
        outcome = simulate_hybrid(arrivals, MACHINE, replicas, ttft_s)
        row(replicas, "hybrid", outcome)
        replicas, spilled = replicas + 1, outcome.spilled
    good = [result for result in results if result["within_2s"] >= GOOD]
    best = min(good, key=lambda result: result["cost"])
    print(f"cheapest with {GOOD:.0%} within 2 s: {best['replicas']} replica(s), {best['mode']}")
    return results


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="cold,burst")
    parser.add_argument("--engines", default="transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden-size", default="128", help="cold: of the model that is made")
    parser.add_argument("--layers", default="4", help="cold: of the model that is made")
    parser.add_argument("--burst", type=int, default=BURST, help="times what one replica serves")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--rates", type=Path, help="forecast: counts per tenant and ten minutes")
    parser.add_argument("--tenant-trace", type=Path, help="hybrid: a trace of one tenant")
    parser.add_argument("--gpu-prices", type=Path)
    parser.add_argument("--token-prices", type=Path)
    parser.add_argument("--model-key", default="llama-3-3-70b-instruct")
    parser.add_argument("--gpus", type=int, default=2, help="hybrid: GPUs of a replica")
    parser.add_argument("--ttft", type=float, default=1.0, help="hybrid: spills from then on")
    parser.add_argument("--starts", default="5,20,60", help="day, forecast: seconds of a start")
    parser.add_argument("--capacities", default="0.1,10", help="day: of a GPU, beside 1")
    parser.add_argument("--fleets", default="12,16,24,48", help="day: GPUs that models share")
    parser.add_argument("--switches", default="0,10", help="day: seconds to put a replica out")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if "day" in parts and arguments.trace is None:
        parser.error("--trace: the day needs a trace")
    if "forecast" in parts and arguments.rates is None:
        parser.error("--rates: the forecast needs counts")
    hybrid = (arguments.tenant_trace, arguments.gpu_prices, arguments.token_prices)
    if "hybrid" in parts and None in hybrid:
        parser.error("hybrid needs --tenant-trace, --gpu-prices and --token-prices")
    size = "--hidden-size", arguments.hidden_size, "--layers", arguments.layers
    starts, capacities, switches = (
        [float(text) for text in texts.split(",")]
        for texts in (arguments.starts, arguments.capacities, arguments.switches)
    )
    fleets = [int(text) for text in arguments.fleets.split(",")]
    for engine in arguments.engines.split(","):
        if "cold" in parts:
            bench_cold(engine, arguments.rounds, size)
        if "burst" in parts:
            bench_burst(engine, arguments.burst)
    if "day" in parts:
        bench_day(arguments.trace, starts, capacities, fleets, switches)
    if "forecast" in parts:
        bench_forecast(arguments.rates, starts)
    if "hybrid" in parts:
        bench_hybrid(*hybrid, arguments.model_key, arguments.gpus, arguments.ttft)


if __name__ == "__main__":
    main()
