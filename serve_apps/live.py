"""The gateway's view of the market: routes, prices, tokenizers and replicas, kept fresh."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Protocol

from market import catalog
from market.accounts import Account
from market.catalog import Model
from market.config import Config
from market.errors import (
    EngineFailed,
    InsufficientBalance,
    MarketError,
    NoCapacity,
    NotFound,
    PermissionDenied,
)
from market.ports import Engine
from market.types import (
    Lane,
    NotReady,
    PackLeft,
    Principal,
    RateCard,
    Role,
    Route,
    RouteTable,
    Rule,
)
from serve_apps.auth import may_use
from serve_apps.link import REPLICA_TIMEOUT_S, Address, Link
from serve_apps.tokenization import Prompter, Prompters

logger = logging.getLogger(__name__)

REFRESH_S = 0.5
# A request that could be served by what is known waits so long for news.
LOOK_S = 0.5
# Threads that may wait to be told where replicas listen: tokenizers need some, too.
ASKING_MAX = 2
ANOTHER_POLL_S = 0.1
# Whoever waits for a model to start is bounded in number, by tenant too, and in time.
COLD_MAX = 256
COLD_MAX_PER_TENANT = 64
COLD_WAIT_S = 600.0
COLD_REFRESH_S = 0.05
COLD_HURRY_S = 30.0  # from the last who came; then tables are as old as ever
COLD_RETRY_S = 10.0
# A lease whose holder has just used it is not borrowed again for so long.
WANTED_BACK_S = 3.0


class Prices(Protocol):
    """The part of the ledger that says what a model costs, and who can pay."""

    async def rate_card(self, model: str) -> RateCard | None:
        """The price in force, None if there is none."""
        ...

    async def balance(self, tenant_id: str) -> Account:
        """A tenant's account."""
        ...

    async def packs(self, tenant_id: str) -> list[PackLeft]:
        """Its token packs that can still be drawn on."""
        ...


class LiveRoutes:
    """The Routes port: a table refreshed twice a second; ``cards`` are prices kept at hand.

    ``find_entry`` says where an application's process listens (link.Address, packed), if it does.
    """

    def __init__(
        self,
        config: Config,
        exchange: Callable[[], Awaitable[RouteTable]],
        prices: Prices,
        cards: Callable[[], Mapping[str, RateCard]],
        find_entry: Callable[[str], bytes | None],
        on_unpriced: Callable[[str], None] = lambda _model: None,
        on_cold: Callable[[str, float], None] = lambda _model, _seconds: None,
    ) -> None:
        self._exchange = exchange
        self._prices = prices
        self._find_entry = find_entry
        self._on_unpriced = on_unpriced
        self._on_cold = on_cold
        self._table = RouteTable((), ())
        self._rules: dict[str, list[Rule]] = {}
        self._cards = cards
        self._engines: dict[str, Link] = {}
        self._serving: set[str] = set()
        self._asking = asyncio.Semaphore(ASKING_MAX)
        self._leaving: list[tuple[str, Link]] = []
        self._added: tuple[Model, ...] = ()
        self._prompters = Prompters(config.models_dir, self.model)
        self._background: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._cold: Counter[tuple[str, str]] = Counter()
        self._cold_now = asyncio.Event()
        self._hurries_until_s = 0.0
        self._wanted_back: dict[str, float] = {}

    def know(self, added: tuple[Model, ...]) -> None:
        """Take over what an operator added to the catalog."""
        self._added = added

    def model(self, name: str) -> Model:
        """An entry of the catalog, as the scheduler said it last. Raises NotFound."""
        return catalog.find(name, self._added)

    def cold(self) -> dict[str, int]:
        """Requests that wait for a model to start, by model."""
        found: Counter[str] = Counter()
        for (model, _), count in self._cold.items():
            found[model] += count
        return dict(found)

    def streams(self) -> dict[str, int]:
        """Answers under way by replica, those on draining ones too."""
        found: Counter[str] = Counter()
        for app, link in [*self._engines.items(), *self._leaving]:
            found[app] += link.streams
        return dict(found)

    def borrowed(self) -> dict[str, int]:
        """Those of them on leases' replicas that are lent, none of whose holder's."""
        return {app: link.borrowed for app, link in self._engines.items() if link.borrowed}

    def kv_used(self) -> dict[str, float]:
        """The part of each replica's KV cache that answers through this gateway have."""
        return {app: link.kv_used for app, link in self._engines.items() if link.streams}

    async def refresh(self) -> None:
        """Fetch the table now, once for all who want it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def look(self) -> None:
        """See whether there is news, but not for long: the scheduler may be away."""
        with contextlib.suppress(MarketError, TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self.refresh()

    async def _refresh(self) -> None:
        table = await self._exchange()
        serving = {route.app_name for route in table.ready}
        ahead = {*(route.app_name for route in table.early), *table.standby} - serving
        known = self._engines
        engines = {app: known.get(app) or self._link_to(app) for app in serving | ahead}
        for app in ahead & self._serving:  # it was withdrawn: what it said before counts no more
            engines[app].doubt()
        self._serving = serving
        for app, link in known.items():
            if app not in engines:
                self._spawn(self._leave(app, link))
        waking = [entry.model for entry in table.starting if entry.wakes]
        for model in (*(route.model for route in table.ready), *waking):
            self._prompters.load_ahead(model)
        self._engines = engines
        for link in engines.values():
            link.connect()  # whoever could not be reached is tried again, though others serve
        self._table = table
        self._awoken()
        self._rules = {}
        for rule in table.rules:
            self._rules.setdefault(rule.tenant_id, []).append(rule)
        self._tell_waiters()

    def _link_to(self, app: str) -> Link:
        async def address() -> Address | None:
            async with self._asking:
                entry = await asyncio.to_thread(self._find_entry, app)
            return None if entry is None else Address.unpack(entry)

        return Link(address, self._awoken)

    def _awoken(self) -> None:
        """A replica may have said that it is awake: it need not wait for the next table."""
        table = self._table
        links = [(route, self._engines.get(route.app_name)) for route in table.early]
        awake = [route for route, link in links if link is not None and link.awake]
        if awake:
            early = tuple(route for route in table.early if route not in awake)
            self._table = replace(table, ready=(*table.ready, *awake), early=early)
            self._tell_waiters()

    def _tell_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def refresh_forever(self) -> None:
        """Keep the table fresh; the last known one serves on while the scheduler is away.

        The exchange also tells the scheduler of us, and us of our shares.
        """
        while True:
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001  # a stale table is better than none
                logger.warning("route table not refreshed: %s", error)
            if self._cold and time.monotonic() < self._hurries_until_s:
                await asyncio.sleep(COLD_REFRESH_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await self._cold_now.wait()
            self._cold_now.clear()

    def ready(self, principal: Principal) -> list[Route]:
        """One route for each model that this key can ask right now."""
        allowed = principal.policy.models
        models = sorted({route.model for route in self._table.ready})
        found = [
            self._find(model, principal) for model in models if allowed is None or model in allowed
        ]
        return [route for route in found if isinstance(route, Route)]

    def waking(self, principal: Principal) -> list[str]:
        """Models scaled to zero that a request by this key would start."""
        allowed = principal.policy.models
        models = sorted({entry.model for entry in self._table.starting if entry.wakes})
        found = [
            (model, self._find(model, principal))
            for model in models
            if allowed is None or model in allowed
        ]
        return [model for model, entry in found if isinstance(entry, NotReady) and entry.wakes]

    def rule(self, model: str, principal: Principal) -> Rule | None:
        """What this key's requests for a model, or a name of its tenant's own, are routed by."""
        if principal.role is not Role.TENANT:
            return None
        own = (r for r in self.rules(principal.subject_id) if r.model == model)
        return next(own, None)

    def rules(self, tenant_id: str) -> list[Rule]:
        """All rules of a tenant."""
        return self._rules.get(tenant_id, [])

    def own(self, model: str, principal: Principal) -> Route | None:
        """The least busy replica of the tenant's own leases, if one serves."""
        found = self._at(model, principal.subject_id, principal, Lane.LEASE)
        return found if isinstance(found, Route) else None

    def pool(self, model: str, principal: Principal, lane: Lane) -> Route | NotReady | None:
        """The pool's least busy replica as one of ``lane``; why there is none; None if no pool."""
        found = self._at(model, None, principal, lane)
        return replace(found, lane=lane) if isinstance(found, Route) else found

    async def route(self, model: str, principal: Principal) -> Route:
        """The replica that gets the next request for ``model`` by this key.

        A tenant's own lease comes before the pool, also while it cannot serve: what is paid for by
        the hour must not be charged by the token. A model that was scaled to zero is started and
        waited for. Raises NotFound if the model is not deployed for this key, NoCapacity while it
        starts or drains.
        """
        found = self._find(model, principal)
        if found is None or (isinstance(found, NotReady) and not found.wakes):
            # It may have been deployed, or got ready, a moment ago.
            await (self.refresh() if found is None else self.look())
            found = self._find(model, principal)
        if isinstance(found, NotReady) and found.wakes:
            found = await self.awake(model, principal)
        if isinstance(found, Route):
            return found
        if found is not None:
            raise NoCapacity(
                f"model {model} is not ready: {found.reason}",
                code="model_loading",
                retry_after_s=5,
            )
        served = ", ".join(route.model for route in self.ready(principal)) or "none"
        raise NotFound(
            f"model {model!r} is not served here; served: {served}",
            code="model_not_found",
            param="model",
        )

    async def awake(
        self,
        model: str,
        principal: Principal,
        lane: Lane = Lane.TOKENS,
        enough: Callable[[], bool] = lambda: False,
    ) -> Route | NotReady | None:
        """Wait for a model's pool to start (or for what is ``enough``).

        The next report tells the scheduler that somebody does.

        Raises NoCapacity if too many wait already, or for too long; PermissionDenied, NotFound or
        InsufficientBalance for who could not buy its answers.
        """
        await self._require_means(model, principal, lane)
        who = model, principal.subject_id
        waiting = self.cold().get(model, 0)
        if waiting >= COLD_MAX or self._cold[who] >= COLD_MAX_PER_TENANT:
            raise NoCapacity(
                f"{model} is starting, and {waiting} request(s) wait for it already",
                code="model_loading",
                retry_after_s=COLD_RETRY_S,
            )
        return await self._awake(model, principal, lane, enough, borrows=True)

    async def _awake(
        self,
        model: str,
        principal: Principal,
        lane: Lane,
        enough: Callable[[], bool],
        *,
        borrows: bool,
    ) -> Route | NotReady | None:
        who = model, principal.subject_id
        began_s = time.monotonic()
        self._cold[who] += 1
        self._hurries_until_s = began_s + COLD_HURRY_S
        self._cold_now.set()
        self._prompters.load_ahead(model)
        try:
            async with asyncio.timeout(COLD_WAIT_S):
                while True:
                    found = self._at(model, None, principal, lane, borrows=borrows)
                    if not isinstance(found, NotReady) or not found.wakes or enough():
                        return found
                    await self._changed.wait()
        except TimeoutError:
            raise NoCapacity(
                f"{model} did not start within {COLD_WAIT_S:.0f} s",
                code="model_loading",
                retry_after_s=COLD_RETRY_S,
            ) from None
        finally:
            self._cold[who] -= 1
            if not self._cold[who]:
                del self._cold[who]
            self._on_cold(model, time.monotonic() - began_s)

    async def _require_means(self, model: str, principal: Principal, lane: Lane) -> None:
        """Who could not buy an answer must not start a GPU for it.

        Raises PermissionDenied, NotFound (no price) or InsufficientBalance.
        """
        tenant = principal.subject_id
        if principal.role is not Role.TENANT or not may_use(principal, lane):
            raise PermissionDenied(f"{model} is scaled to zero, and this key cannot buy its tokens")
        await self.rate_card(model)
        if (await self._prices.balance(tenant)).balance_pico > 0:
            return
        if not any(left.pack.model == model for left in await self._prices.packs(tenant)):
            raise InsufficientBalance(
                f"the balance is 0; deposit more (market tenants deposit {tenant} AMOUNT)"
            )

    def least_busy(self, route: Route, borrower: str | None) -> Route:
        """The replica of the same deployment that has the least to do now, after the queue.

        If all are busy, an idle lease's that is lent to the tenant ``borrower``.
        """
        ready = [r for r in self._table.ready if r.deployment_id == route.deployment_id]
        best = min(ready, key=self._busy, default=route)
        if borrower is not None and route.lease_id is None and not self._has_room(best):
            best = next(iter(self._lent(route.model, borrower)), best)
        return replace(best, lane=route.lane)

    async def elsewhere(self, route: Route, principal: Principal, *, borrows: bool) -> Route:
        """Where a request goes on that cannot stay on a lease that was lent to it.

        A pool at zero is started and waited for. Raises EngineFailed if nowhere, NoCapacity if it
        takes too long.
        """
        now_s = time.monotonic()
        self._wanted_back = {app: s for app, s in self._wanted_back.items() if s > now_s}
        if borrows and route.loan is not None:
            self._wanted_back[route.app_name] = now_s + WANTED_BACK_S
        until_s = now_s + COLD_WAIT_S
        while time.monotonic() < until_s:
            found = self._at(route.model, None, principal, route.lane, borrows=borrows)
            if isinstance(found, NotReady) and found.wakes:
                found = await self._awake(
                    route.model, principal, route.lane, lambda: False, borrows=borrows
                )
            if isinstance(found, Route):
                if found.app_name == route.app_name:  # it has just refused
                    await asyncio.sleep(ANOTHER_POLL_S)
                return replace(found, lane=route.lane)
            if found is None:
                break
            await asyncio.sleep(ANOTHER_POLL_S)
        raise EngineFailed(f"no replica of {route.model} is left")

    async def another(self, route: Route) -> Route:
        """A replica of the same deployment for a second try, as soon as one can be asked.

        The one that failed serves again if it was not the replica that failed; a replica that is
        started anew is waited for. Raises EngineFailed if none comes.
        """
        until_s = asyncio.get_running_loop().time() + REPLICA_TIMEOUT_S
        while asyncio.get_running_loop().time() < until_s:
            ready = [r for r in self._table.ready if r.deployment_id == route.deployment_id]
            there = [r for r in ready if self._engines[r.app_name].connected]
            if there:
                best = min(there, key=lambda r: (r.app_name == route.app_name, self._busy(r)))
                return replace(best, lane=route.lane)
            starting = (entry.deployment_id for entry in self._table.starting)
            if not ready and route.deployment_id not in starting:
                break
            await asyncio.sleep(ANOTHER_POLL_S)
        raise EngineFailed(f"no replica of {route.model} is left")

    async def rate_card(self, model: str) -> RateCard:
        """The price in force. Raises NotFound if there is none: nothing is served for free."""
        card = self._cards().get(model) or await self._prices.rate_card(model)
        if card is None:
            logger.error("ALARM unpriced model: %s is deployed and has no price", model)
            self._on_unpriced(model)
            raise NotFound(f"model {model} has no price", code="model_not_found", param="model")
        return card

    def engine(self, route: Route) -> Engine:
        """The replicas behind a route. Raises EngineFailed if its application is gone."""
        engine = self._engines.get(route.app_name)
        if engine is None:
            raise EngineFailed(f"model {route.model} is no longer served")
        return engine

    async def prompter(self, route: Route) -> Prompter:
        """The model's tokenizer, loaded once per gateway."""
        return await self._prompters.get(route.model)

    async def _leave(self, app: str, link: Link) -> None:
        """A replica that drains: its streams go on, and are counted until they end."""
        self._leaving.append((app, link))
        try:
            await link.close()
        finally:
            self._leaving.remove((app, link))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _find(self, model: str, principal: Principal) -> Route | NotReady | None:
        """The least busy replica that this key may use; why there is none; None if unknown.

        A tenant's own lease comes before the pool.
        """
        if principal.role is Role.TENANT:
            own = self._at(model, principal.subject_id, principal, Lane.LEASE)
            if own is not None:
                return own
        return self._at(model, None, principal, Lane.TOKENS)

    def _at(
        self,
        model: str,
        tenant_id: str | None,
        principal: Principal,
        lane: Lane,
        *,
        borrows: bool = True,
    ) -> Route | NotReady | None:
        """The same among the replicas of one tenant, or of the pool.

        A pool that has none may borrow an idle lease's.
        """
        if may_use(principal, lane):
            ready = [r for r in self._table.ready if r.model == model and r.tenant_id == tenant_id]
            if not ready and tenant_id is None and borrows:
                ready = self._lent(model, principal.subject_id)
            if ready:
                return min(ready, key=self._busy)
        for entry in self._table.starting:
            if entry.model == model and entry.tenant_id == tenant_id:
                return entry
        return None

    def _lent(self, model: str, borrower: str) -> list[Route]:
        """Leases' replicas that a tenant may borrow a place on now, the least busy first.

        Whether their holders are idle is known where they run: who is sent away there does not
        come back for a while.
        """
        now_s = time.monotonic()
        found = [
            route
            for route in self._table.lent
            if route.model == model
            and route.loan is not None
            and route.loan.tenant_id != borrower
            and self._wanted_back.get(route.app_name, 0.0) < now_s
            and self._has_room(route)
        ]
        return sorted(found, key=self._busy)

    def _has_room(self, route: Route) -> bool:
        link = self._engines.get(route.app_name)
        part = -(-route.places // max(1, self._table.gateways))  # others send there, too
        return link is not None and link.connected and link.streams < part

    def _busy(self, route: Route) -> tuple[bool, int, str]:
        """A replica that was lost comes last; else the answers under way through this gateway."""
        link = self._engines.get(route.app_name)
        if link is None:
            return True, 0, route.app_name
        return not link.connected, link.streams, route.app_name
