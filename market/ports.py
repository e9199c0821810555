"""What the stories need from outside, each as small as can be; fakes.py has a fake for each."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Protocol

from market.accounts import HoldResult
from market.credit import Credit
from market.types import (
    EngineChunk,
    EngineRequest,
    HoldChange,
    Principal,
    RateCard,
    Route,
    SliceAsk,
    UsageRecord,
)


class Clock(Protocol):
    """Wall time for the record, monotonic time for durations."""

    def now(self) -> datetime:
        """Current time, timezone UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never steps."""
        ...


class Engine(Protocol):
    """Something that generates tokens: vLLM, transformers, or a replica far away."""

    def generate(self, request: EngineRequest, credit: Credit) -> AsyncGenerator[EngineChunk, None]:
        """Stream chunks; the last one has a finish reason. Closing the iterator aborts.

        No more tokens come than ``credit`` covers; where it ends for good, the answer does.

        Raises EngineFailed when the engine or its replica dies, InvalidRequest when it refuses.
        """
        ...


class Grants(Protocol):
    """Where a gateway asks for slices: the scheduler."""

    async def grant(self, ask: SliceAsk) -> HoldResult:
        """Open a slice or let it grow, as far as money and fair shares go.

        Doing it again returns the first result.
        """
        ...


class Returns(Protocol):
    """Where a gateway gives slices back: the ledger."""

    async def resize_hold(self, producer: str, epoch: int, change: HoldChange) -> HoldResult:
        """Let a slice shrink."""
        ...

    async def end_hold(self, producer: str, epoch: int, hold_id: str) -> None:
        """Give back what is left of a slice."""
        ...


class UsageSink(Protocol):
    """Where finished requests are recorded. The sink numbers them."""

    def identity(self) -> tuple[str, int]:
        """(producer, epoch) under which records are written.

        Raises Overloaded while too many records wait for the ledger.
        """
        ...

    def next_request_id(self) -> str:
        """A fresh id, counted at admission."""
        ...

    @property
    def booked(self) -> int:
        """Records with a smaller number are in the ledger."""
        ...

    @property
    def next_seq(self) -> int:
        """Number of the next record."""
        ...

    def begin(self, record: UsageRecord) -> None:
        """A request is under way; this is its record if its process dies. Raises Overloaded."""
        ...

    async def record(self, record: UsageRecord) -> UsageRecord:
        """Record durably; returns the record once it cannot be lost any more."""
        ...


class Routes(Protocol):
    """Which deployment serves a model, at what price."""

    async def route(self, model: str, principal: Principal) -> Route:
        """Raises NotFound for an unknown model, NoCapacity if it is not ready."""
        ...

    def least_busy(self, route: Route, borrower: str | None) -> Route:
        """The replica of the same deployment that has the least to do now.

        If all are busy, an idle lease's that is lent to the tenant ``borrower``.
        """
        ...

    async def another(self, route: Route) -> Route:
        """A replica of the same deployment for a second try, as soon as one can be asked.

        Raises EngineFailed if none can.
        """
        ...

    async def elsewhere(self, route: Route, principal: Principal, *, borrows: bool) -> Route:
        """Where a request goes on that cannot stay on a lease that was lent to it.

        Raises EngineFailed if nowhere, NoCapacity if it takes too long.
        """
        ...

    async def rate_card(self, model: str) -> RateCard:
        """The price in force. Raises NotFound if there is none."""
        ...

    def engine(self, route: Route) -> Engine:
        """The engine behind a route."""
        ...
