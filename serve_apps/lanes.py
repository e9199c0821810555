"""Which lane serves each request: a tenant's rules applied to what this gateway sees of the market.

market/routing.py decides; here its inputs are gathered and a cold pool is woken.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace

from market import catalog, routing
from market.errors import InvalidRequest, MarketError, NotFound
from market.inference import pool_of
from market.routing import Choice, Difficulties, Load, Option, Query, Reason
from market.scorer import Scorer
from market.types import Lane, NotReady, Principal, RateCard, Route, Rule
from serve_apps.auth import may_use
from serve_apps.live import LiveRoutes

logger = logging.getLogger(__name__)

PINS = ("cheap", "strong")
# A cold pool that a rule would have used is asked for at most so often.
WAKES_MAX = 16
# Deployments whose requests' difficulties are remembered, those asked last.
REMEMBERED_MAX = 1000


class Lanes:
    """Chooses; remembers how hard each tenant's requests were."""

    def __init__(
        self, routes: LiveRoutes, load: Callable[[str, int], Load], scorer: Scorer
    ) -> None:
        self._routes = routes
        self._load = load
        self._scorer = scorer
        self._difficulties: OrderedDict[str, Difficulties] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        self._waking: dict[str, asyncio.Task[None]] = {}

    def names(self, principal: Principal) -> list[str]:
        """Names of the tenant's own that can be asked."""
        rules = self._routes.rules(principal.subject_id)
        return sorted(rule.model for rule in rules if rule.policy.cheap)

    def models(self, name: str, principal: Principal) -> tuple[str, ...]:
        """Whose models may answer what is asked under a name: both of an auto deployment's."""
        rule, _ = self._rule(name, principal)
        if rule is None or not rule.policy.cheap:
            return (name,)
        return rule.policy.cheap, rule.policy.strong

    def is_starting(self, model: str) -> bool:
        """Whether somebody waits for what is asked under this name to start."""
        return model in self._waiting or model in self._routes.cold()

    async def choose(self, model: str, principal: Principal, query: Callable[[], Query]) -> Choice:
        """Where a request for ``model`` goes: a model, or a tenant's own name with ``:cheap`` or
        ``:strong`` behind it if it is pinned.

        Raises NotFound, NoCapacity, InvalidRequest for an unknown pin.
        """
        rule, pin = self._rule(model, principal)
        if rule is None:
            try:
                return Choice(await self._routes.route(model, principal))
            except NotFound:
                rule, pin = self._rule(model, principal)  # it was deployed a moment ago
                if rule is None:
                    raise
        if pin and (pin not in PINS or not rule.policy.cheap):
            raise InvalidRequest(
                f"{rule.model} can be pinned with :cheap or :strong if it has two models, "
                f"got {model!r}",
                param="model",
            )
        self._waiting[model] += 1
        try:
            if rule.lease_id is not None:
                return await self._hybrid(rule, principal)
            return await self._auto(rule, principal, query, pin)
        finally:
            self._waiting[model] -= 1
            if not self._waiting[model]:
                del self._waiting[model]

    def _rule(self, model: str, principal: Principal) -> tuple[Rule | None, str]:
        """The rule for what is asked, and the pin behind its name."""
        rule = self._routes.rule(model, principal)
        if rule is not None:
            return rule, ""
        name, _, pin = model.rpartition(":")
        return self._routes.rule(name, principal), pin

    # -- hybrid --------------------------------------------------------------------------------

    async def _hybrid(self, rule: Rule, principal: Principal) -> Choice:
        """The lease, unless it is too slow or not there; then the pool, within the spill budget."""
        own = self._routes.own(rule.model, principal)
        if own is None:  # what is paid for by the hour must not be charged by the token
            await self._routes.refresh()
            own = self._routes.own(rule.model, principal)
        load = None if own is None else self._load_of(own)
        reason = routing.spill_reason(load, rule.policy.ttft_s)
        pool = self._routes.pool(rule.model, principal, Lane.SPILL)
        spills = may_use(principal, Lane.SPILL)
        if isinstance(pool, NotReady) and pool.wakes and reason is not None and spills:
            if own is None:
                await self._routes.awake(
                    rule.model,
                    principal,
                    Lane.SPILL,
                    lambda: self._routes.own(rule.model, principal) is not None,
                )
                own = self._routes.own(rule.model, principal)
                reason = reason if own is None else None
                pool = self._routes.pool(rule.model, principal, Lane.SPILL)
            else:  # those that come next can spill
                self._wake(rule.model, principal, Lane.SPILL)
        ready = pool if isinstance(pool, Route) and spills else None
        choice = routing.with_spill(rule, own, ready, reason)
        return choice or Choice(await self._routes.route(rule.model, principal))

    # -- auto ----------------------------------------------------------------------------------

    async def _auto(
        self, rule: Rule, principal: Principal, query: Callable[[], Query], pin: str
    ) -> Choice:
        """What costs least of what is fast enough, among the models that are good enough."""
        policy = rule.policy
        attrs: tuple[tuple[str, str], ...] = (("auto", rule.model),)
        models: tuple[str, ...] = (rule.model,)
        why: Reason | None = None
        if policy.cheap:
            models, why = await self._models(rule, query, pin)
        options = [o for model in models for o in await self._options(model, principal)]
        if not options:
            found = await self._only(models[0], principal)
            not_taken = await self._not_taken(rule, found.route)
            attrs = (*attrs, *found.attrs)
            return replace(found, reason=why or found.reason, not_taken=not_taken, attrs=attrs)
        best, how = routing.cheapest(options, policy.ttft_s)
        if how is Reason.FASTEST or best.route.model != models[0]:
            self._wake_if_cold(models[0], principal)
        others = [option for option in options if option is not best]
        second = None
        if why is Reason.COMPLEX and not others:
            others = await self._options(policy.cheap, principal)
        if others:
            other, _ = routing.cheapest(others, policy.ttft_s)
            second = Choice(
                other.route, Reason.FALLBACK, cap=other.cap, attrs=(*attrs, *other.attrs)
            )
        not_taken = await self._not_taken(rule, best.route)
        attrs = (*attrs, *best.attrs)
        return Choice(best.route, why or how, second, best.cap, not_taken, attrs)

    async def _only(self, model: str, principal: Principal) -> Choice:
        """The way to a model that does not serve yet, by the rules of a hybrid if it is one."""
        rule = self._routes.rule(model, principal)
        if rule is not None and rule.lease_id is not None:
            return await self._hybrid(rule, principal)
        return Choice(await self._routes.route(model, principal))

    async def _models(
        self, rule: Rule, ask: Callable[[], Query], pin: str
    ) -> tuple[tuple[str, ...], Reason]:
        """The models that may answer, the one preferred first."""
        policy = rule.policy
        if pin:
            return (policy.cheap if pin == "cheap" else policy.strong,), Reason.PINNED
        query = ask()
        forced = routing.needs_strong(query, catalog.find(policy.cheap).served_context_tokens)
        if forced is not None:
            return (policy.strong,), forced
        score = self._scorer.score(query.text)
        known = self._difficulties.setdefault(rule.deployment_id, Difficulties())
        self._difficulties.move_to_end(rule.deployment_id)
        while len(self._difficulties) > REMEMBERED_MAX:
            self._difficulties.popitem(last=False)
        cards = [await self._routes.rate_card(model) for model in (policy.cheap, policy.strong)]
        share = routing.strong_share(cards[0], cards[1], policy.cost_target)
        threshold = known.threshold(share, self._scorer.usual)
        known.add(score)
        return routing.deal(policy, score, threshold)

    async def _options(self, model: str, principal: Principal) -> list[Option]:
        """The tenant's own lease and the pool; beside a hybrid's lease the pool is a spill."""
        card, found = await self._routes.rate_card(model), []
        own = self._routes.own(model, principal)
        if own is not None:
            found.append(Option(own, card, self._load_of(own)))
        rule = self._routes.rule(model, principal)
        hybrid = rule is not None and rule.lease_id is not None
        lane = Lane.SPILL if hybrid else Lane.TOKENS
        pool = self._routes.pool(model, principal, lane)
        if isinstance(pool, Route) and may_use(principal, lane):
            option = Option(pool, card, self._load_of(pool))
            if rule is not None and hybrid:
                cap, attrs = routing.spill_cap(rule), routing.spill_attrs(rule)
                option = replace(option, cap=cap, attrs=attrs)
            found.append(option)
        return found

    async def _not_taken(self, rule: Rule, route: Route) -> RateCard | None:
        """The price of the other model, or of the pool where one's own lease serves."""
        policy = rule.policy
        if policy.cheap:
            other = policy.strong if route.model == policy.cheap else policy.cheap
            return await self._routes.rate_card(other)
        is_lease = route.lane is Lane.LEASE
        return await self._routes.rate_card(route.model) if is_lease else None

    # -- what is seen --------------------------------------------------------------------------

    def _load_of(self, route: Route) -> Load:
        return self._load(pool_of(route), route.places)

    def _wake_if_cold(self, model: str, principal: Principal) -> None:
        pool = self._routes.pool(model, principal, Lane.TOKENS)
        if isinstance(pool, NotReady) and pool.wakes:
            self._wake(model, principal, Lane.TOKENS)

    def _wake(self, model: str, principal: Principal, lane: Lane) -> None:
        """Start a cold pool though nobody waits for it."""
        if model in self._waking or len(self._waking) >= WAKES_MAX:
            return

        async def wake() -> None:
            try:
                await self._routes.awake(model, principal, lane)
            except MarketError as error:
                logger.info("%s was not woken: %s", model, error)

        task = asyncio.get_running_loop().create_task(wake())
        self._waking[model] = task
        task.add_done_callback(lambda _: self._waking.pop(model, None))
