"""A tenant's requests on a lease of its own that spills: routing.py's own decisions, virtual time.

The pool is taken to have room at all times; what its other tenants do is not simulated.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from market import routing
from market.queueing import Lately, Rate
from market.routing import Load
from market.simulation.pools import Arrival, Machine


@dataclass(slots=True)
class HybridOutcome:
    """What came of it. Tokens are those that spilled; ``ttft_s`` per request, in any order."""

    spilled: int = 0
    spilled_prompt_tokens: int = 0
    spilled_output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)


class _Lease:
    def __init__(self, machine: Machine, replicas: int, outcome: HybridOutcome) -> None:
        self.machine = machine
        self.places = machine.places * replicas
        self.outcome = outcome
        self.ends: list[float] = []
        self.waiting: deque[Arrival] = deque()
        self.finished: Rate | None = None
        self.ttft_s = Lately()

    def pass_to(self, now_s: float) -> None:
        """Everything that ends until then makes room for who waits."""
        while self.ends and self.ends[0] <= now_s:
            ended_s = heapq.heappop(self.ends)
            self.finished = self.finished or Rate(ended_s)
            self.finished.add(ended_s)
            if self.waiting:
                self.begin(self.waiting.popleft(), ended_s)

    def begin(self, request: Arrival, now_s: float) -> None:
        first_s = request.prompt_tokens / self.machine.prompt_tokens_per_s
        self.ttft_s.add(first_s, now_s)
        self.outcome.ttft_s.append(now_s - request.at_s + first_s)
        took_s = first_s + request.output_tokens / self.machine.output_tokens_per_s
        heapq.heappush(self.ends, now_s + took_s)

    def load(self, now_s: float) -> Load:
        rate = 0.0 if self.finished is None else self.finished.get(now_s)
        ttft_s = self.ttft_s.get(now_s)
        return Load(len(self.ends), len(self.waiting), self.places, rate, ttft_s)

    def take(self, request: Arrival) -> None:
        if self.waiting or len(self.ends) >= self.places:
            self.waiting.append(request)
        else:
            self.begin(request, request.at_s)


def simulate_hybrid(
    arrivals: Sequence[Arrival], machine: Machine, replicas: int, ttft_s: float | None
) -> HybridOutcome:
    """Requests in order of time on ``replicas`` of its own (0: tokens only).

    They spill when the first token would take longer than ``ttft_s``; None: they never do.
    """
    outcome = HybridOutcome()
    lease = _Lease(machine, replicas, outcome)
    for request in arrivals:
        lease.pass_to(request.at_s)
        spills = replicas == 0 or (
            ttft_s is not None and routing.spill_reason(lease.load(request.at_s), ttft_s)
        )
        if not spills:
            lease.take(request)
            continue
        outcome.spilled += 1
        outcome.spilled_prompt_tokens += request.prompt_tokens
        outcome.spilled_output_tokens += request.output_tokens
        outcome.ttft_s.append(request.prompt_tokens / machine.prompt_tokens_per_s)
    while lease.ends:
        lease.pass_to(lease.ends[0])
    return outcome
