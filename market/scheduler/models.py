"""Models that an operator adds to the shipped catalog."""

from dataclasses import replace

from market import catalog
from market.catalog import Model
from market.errors import Conflict
from market.scheduler.core import Core
from market.types import OrderState


class Models:
    """Entries of the catalog that are the market's own."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def add(self, model: Model) -> Model:
        """Sell a model from now on, at its prices; the same again changes nothing.

        Raises Conflict if its name means something else.
        """
        core = self._core
        async with core.lock:
            if core.state.models.get(model.name) != model:
                self._require_free(model)
                # The price first: nobody may see it without one.
                card = model.rate_card(core.clock.now())
                await core.ledger.add_rate_cards([card], only_new_models=False)
                await core.store.save([model])
            return model

    async def forget(self, name: str) -> Model:
        """Sell a model no more. Raises NotFound, Conflict if it is shipped or in use."""
        core = self._core
        async with core.lock:
            model = core.state.models.get(name)
            if model is None or model.forgotten:
                core.find(name)
                raise Conflict(f"{name} is shipped with the market; it cannot be forgotten")
            user = self._user(name)
            if user is not None:
                raise Conflict(f"{name} is in use by {user}")
            forgotten = replace(model, forgotten=True)
            await core.store.save([forgotten])
            return forgotten

    def _require_free(self, model: Model) -> None:
        """Raises Conflict."""
        name, known = model.name, self._core.state.models.get(model.name)
        if known is None and any(name == shipped.name for shipped in catalog.models()):
            raise Conflict(f"{name} is shipped with the market; choose another name")
        if known is not None and not known.forgotten:
            raise Conflict(
                f"{name} was added already, from {known.source}, with other facts or prices; "
                f"choose another name, or change its price (market prices set {name})"
            )
        if known is not None and known.source != model.source:
            raise Conflict(
                f"{name} was the name of {known.source}, whose files may still be on nodes' disks; "
                "choose another name"
            )
        user = self._user(name)
        if user is not None:
            raise Conflict(f"{name} is a name that {user} uses; choose another")

    def _user(self, name: str) -> str | None:
        """What runs, or waits to run, under a model's name."""
        state = self._core.state
        for deployment in state.deployments.values():
            policy = deployment.policy
            dealt = () if policy is None else (policy.cheap, policy.strong)
            if name in (deployment.model, *dealt):
                return f"deployment {deployment.deployment_id}"
        for lease in self._core.open_leases():
            if lease.model == name:
                return f"lease {lease.lease_id}"
        for order in state.orders.values():
            if order.model == name and order.state is OrderState.WAITING:
                return f"order {order.order_id}"
        return None
