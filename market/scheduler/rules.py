"""Rules: how requests of a hybrid or auto deployment find their lane. Gateways apply them."""

import re
from dataclasses import replace

from market.catalog import Model
from market.errors import Conflict, InvalidRequest
from market.scheduler.core import Core
from market.types import Bounds, Deployment, LanePolicy, Mode, OrderState, Rule

RULES_MAX = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Rules:
    """Auto deployments, and what gateways must know of them and of hybrids."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def open(
        self, name: str, tenant_id: str, policy: LanePolicy, dry_run: bool
    ) -> Deployment:
        """Deal a tenant's requests for ``name``; again only changes the policy.

        ``name`` is a model, or with two models a name of the tenant's own. Raises InvalidRequest,
        NotFound, Conflict if a hybrid of the tenant has the name.
        """
        await self._check(name, policy)
        async with self._core.lock:
            self._models(name, policy)  # others may have been added or forgotten meanwhile
            for known in self._core.state.deployments.values():
                if (known.model, known.tenant_id) != (name, tenant_id) or known.policy is None:
                    continue
                if known.mode is not Mode.AUTO or known.stopping:
                    raise Conflict(
                        f"{name} is deployed as {known.mode} by {known.deployment_id}; "
                        "undeploy that first"
                    )
                changed = replace(known, policy=policy)
                if not dry_run:
                    await self._core.store.save([changed])
                return changed
            self._check_others(name, tenant_id)
            now = self._core.clock.now()
            deployment = Deployment(
                deployment_id=f"auto-{tenant_id}-{name.replace('.', '-')}-{now:%Y%m%d%H%M%S%f}",
                model=name,
                mode=Mode.AUTO,
                engine="",
                bounds=Bounds(0, 0),
                created_at=now,
                tenant_id=tenant_id,
                policy=policy,
            )
            if not dry_run:
                await self._core.store.save([deployment])
            return deployment

    async def close(self, deployment: Deployment) -> Deployment:
        """Deal its requests no more."""
        async with self._core.lock:
            await self._core.store.save(gone=[deployment])
            return replace(deployment, stopping=True)

    def all(self) -> tuple[Rule, ...]:
        """Those in force."""
        return tuple(
            Rule(d.model, d.tenant_id, d.deployment_id, d.policy, d.lease_id)
            for d in self._core.state.deployments.values()
            if d.policy is not None and d.tenant_id is not None and not d.stopping
        )

    def _check_others(self, name: str, tenant_id: str) -> None:
        """Raises Conflict if a hybrid is ordered, or the tenant has too many rules."""
        for order in self._core.state.orders.values():
            ordered = order.policy is not None and order.state is OrderState.WAITING
            if ordered and (order.model, order.tenant_id) == (name, tenant_id):
                raise Conflict(
                    f"order {order.order_id} for a hybrid of {name} waits; cancel it first"
                )
        if sum(rule.tenant_id == tenant_id for rule in self.all()) >= RULES_MAX:
            raise Conflict(f"{tenant_id} has {RULES_MAX} hybrid and auto deployments already")

    def _models(self, name: str, policy: LanePolicy) -> list[Model]:
        """Those that answer. Raises InvalidRequest, NotFound."""
        if bool(policy.cheap) != bool(policy.strong):
            raise InvalidRequest("name both models, the cheap and the strong one", param="strong")
        if not policy.cheap:
            return [self._core.find(name)]
        if policy.cheap == policy.strong:
            raise InvalidRequest("cheap and strong must be two models", param="strong")
        if not NAME.fullmatch(name) or any(name == m.name for m in self._core.models()):
            raise InvalidRequest(
                f"{name!r}: with two models choose a name of your own that is no model's, of "
                "letters, digits, dots, dashes and underscores",
                param="model",
            )
        return [self._core.find(policy.cheap), self._core.find(policy.strong)]

    async def _check(self, name: str, policy: LanePolicy) -> None:
        models = self._models(name, policy)
        cards = [await self._core.ledger.rate_card(model.name) for model in models]
        if None in cards:
            model = models[cards.index(None)].name
            raise InvalidRequest(f"model {model} has no price, so it cannot be served")
        if any(model.embeds for model in models):
            raise InvalidRequest("models that make embeddings cannot be dealt", param="model")
        if policy.cheap:
            cheap, strong = (card.input_pico + card.output_pico for card in cards if card)
            if cheap > strong:
                raise InvalidRequest(
                    f"{policy.cheap} is dearer than {policy.strong}; exchange them", param="cheap"
                )
