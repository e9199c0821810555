"""Which lane serves each request: a tenant's rules applied to what this gateway sees of the market.

market/routing.py decides; here its inputs are gathered and a cold pool is woken.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace

from market import routing
from market.errors import InvalidRequest, MarketError, NotFound
from market.inference import pool_of
from market.routing import Choice, Difficulties, Load, Option, Query, Reason
from market.scorer import Scorer
from market.types import Budget, Lane, NotReady, Principal, RateCard, Route, Rule
from serve_apps.auth import may_use
from serve_apps.live import LiveRoutes

logger = logging.getLogger(__name__)

PINS = ("cheap", "strong")
# A cold pool that a rule would have used is asked for at most so often.
WAKES_MAX = 16
# For so long after a spill was refused for its budget no pool is started for others.
SPENT_S = 60.0
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
        self._spent: dict[Budget, float] = {}

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

    def spent(self, cap: Budget) -> None:
        """A spill was refused for its budget."""
        now_s = time.monotonic()
        known = {budget: s for budget, s in self._spent.items() if s > now_s}
        self._spent = known | {cap: now_s + SPENT_S}

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
        model = rule.model
        if self._routes.own(model, principal) is None:
            await self._routes.look()  # what is paid by the hour must not be charged by the token
        own, pool, reason = self._seen(rule, principal)
        if reason is not None and own is not None:
            self._wake_if_cold(model, principal)
        elif isinstance(pool, NotReady) and pool.wakes and own is None:
            await self._routes.awake(
                model,
                principal,
                Lane.SPILL,
                lambda: self._routes.own(model, principal) is not None,
            )
            own, pool, reason = self._seen(rule, principal)
        ready = pool if isinstance(pool, Route) else None
        choice = routing.with_spill(rule, own, ready, reason)
        return choice or Choice(await self._routes.route(model, principal))

    def _seen(
        self, rule: Rule, principal: Principal
    ) -> tuple[Route | None, Route | NotReady | None, Reason | None]:
        """The lease's replica, the pool that it may spill to, and why it should, if so."""
        own = self._routes.own(rule.model, principal)
        load = None if own is None else self._load_of(own)
        reason = routing.spill_reason(load, rule.policy.ttft_s)
        return own, self._pool(rule.model, principal), reason

    # -- auto ----------------------------------------------------------------------------------

    async def _auto(
        self, rule: Rule, principal: Principal, query: Callable[[], Query], pin: str
    ) -> Choice:
        """What costs least of what is fast enough, among the models that are good enough."""
        policy = rule.policy
        models: tuple[str, ...] = (rule.model,)
        why: Reason | None = None
        if policy.cheap:
            models, why = await self._models(rule, query, pin)
        options = [o for model in models for o in await self._options(model, principal)]
        if not options:
            found = await self._only(models[0], principal)
            return await self._noted(rule, replace(found, reason=why or found.reason))
        best, how = routing.cheapest(options, policy.ttft_s)
        if how is Reason.FASTEST or best.route.model != models[0]:
            self._wake_if_cold(models[0], principal)
        others = [option for option in options if option is not best]
        second = None
        if why is Reason.COMPLEX and not others:
            others = await self._options(policy.cheap, principal)
        if others:
            other, _ = routing.cheapest(others, policy.ttft_s)
            second = Choice(other.route, Reason.FALLBACK, None, other.cap, None, other.attrs)
        choice = Choice(best.route, why or how, second, best.cap, None, best.attrs)
        return await self._noted(rule, choice)

    async def _noted(self, rule: Rule, choice: Choice) -> Choice:
        """The same with what its record says, also if it is served elsewhere."""
        second = choice.otherwise
        return replace(
            choice,
            otherwise=None if second is None else await self._noted(rule, second),
            not_taken=await self._not_taken(rule, choice.route),
            attrs=(("auto", rule.model), *choice.attrs),
        )

    async def _only(self, model: str, principal: Principal) -> Choice:
        """The way to a model that does not serve yet, by the rules of a hybrid if it is one."""
        hybrid = self._hybrid_rule(model, principal)
        if hybrid is not None:
            return await self._hybrid(hybrid, principal)
        return Choice(await self._routes.route(model, principal))

    async def _models(
        self, rule: Rule, ask: Callable[[], Query], pin: str
    ) -> tuple[tuple[str, ...], Reason]:
        """The models that may answer, the one preferred first."""
        policy = rule.policy
        if pin:
            return (policy.cheap if pin == "cheap" else policy.strong,), Reason.PINNED
        query = ask()
        forced = routing.needs_strong(query, self._routes.model(policy.cheap).served_context_tokens)
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
        pool, hybrid = self._pool(model, principal), self._hybrid_rule(model, principal)
        if isinstance(pool, Route):
            option = Option(pool, card, self._load_of(pool))
            if hybrid is not None:
                cap, attrs = routing.spill_cap(hybrid), routing.spill_attrs(hybrid)
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

    def _hybrid_rule(self, model: str, principal: Principal) -> Rule | None:
        rule = self._routes.rule(model, principal)
        return rule if rule is not None and rule.lease_id is not None else None

    def _pool(self, model: str, principal: Principal) -> Route | NotReady | None:
        """The pool, as far as this key may use it, beside a hybrid's lease for its spills.

        A cold one is not there for who could buy nothing of it.
        """
        hybrid = self._hybrid_rule(model, principal)
        lane = Lane.TOKENS if hybrid is None else Lane.SPILL
        if not may_use(principal, lane):
            return None
        found = self._routes.pool(model, principal, lane)
        if hybrid is not None:
            cap = routing.spill_cap(hybrid)
            is_spent = self._spent.get(cap, 0.0) > time.monotonic()
            if cap.limit_pico == 0 or (is_spent and isinstance(found, NotReady)):
                return None
        return found

    def _wake_if_cold(self, model: str, principal: Principal) -> None:
        """Start a pool though nobody waits for it: those that come next can be served there."""
        pool = self._pool(model, principal)
        if not (isinstance(pool, NotReady) and pool.wakes):
            return
        if model in self._waking or len(self._waking) >= WAKES_MAX:
            return
        lane = Lane.TOKENS if self._hybrid_rule(model, principal) is None else Lane.SPILL

        async def wake() -> None:
            try:
                await self._routes.awake(model, principal, lane)
            except MarketError as error:
                logger.info("%s was not woken: %s", model, error)

        task = asyncio.get_running_loop().create_task(wake())
        self._waking[model] = task
        task.add_done_callback(lambda _: self._waking.pop(model, None))
