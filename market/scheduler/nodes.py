"""Supply: nodes join with a one-time token, offer GPUs, are lost and return, drain and leave."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy import Connection, select, update

from market import pricing
from market.errors import Conflict, InvalidKey, InvalidRequest, NotFound
from market.keys import hash_key
from market.scheduler import tables
from market.scheduler.core import Core
from market.storage import upsert
from market.types import Offer, OfferState

TOKEN_LIFE = timedelta(hours=1)
NODE_NAME_MAX = 40


@dataclass(frozen=True, slots=True)
class Proof:
    """How a node shows that it may join: the first time a token, later its own key."""

    join_token: str | None = None
    node_key: str | None = None


class Nodes:
    """Offers and the nodes behind them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def make_token(self, provider_id: str) -> str:
        """A token with which one node of the provider can join within the hour."""
        token = f"join-{secrets.token_urlsafe(24)}"
        row = {
            "token_hash": hash_key(token),
            "provider_id": provider_id,
            "expires_at": self._core.clock.now() + TOKEN_LIFE,
            "node_id": None,
        }
        await self._core.store.run(lambda c: upsert(c, tables.join_tokens, [row]))
        return token

    async def join(self, offer: Offer, proof: Proof) -> str:
        """Take a node's offer; returns its key, made at the first join.

        Raises InvalidKey for a wrong, used or expired token or a wrong key, Conflict if the name is
        taken, InvalidRequest if the offer takes away GPUs that are in use.
        """
        _check(offer)
        async with self._core.lock:
            if proof.node_key is not None:
                await self._core.store.run(lambda c: _require_key(c, offer, proof.node_key or ""))
                await self._take(offer, joining=True)
                return proof.node_key
            known = self._core.state.offers.get(offer.offer_id)
            if known is not None and known.state is not OfferState.LEFT:
                raise Conflict(
                    f"a node {offer.node_id} is here already; choose another name (--node) or join "
                    "with its own MARKET_HOME"
                )
            if known is not None:
                self._require_same_gpus(known, offer)
            await self._core.store.run(lambda c: self._require_token(c, proof.join_token, offer))
            key = f"node-{secrets.token_urlsafe(24)}"
            row = {
                "node_id": offer.node_id,
                "provider_id": offer.provider_id,
                "key_hash": hash_key(key),
            }

            def use(connection: Connection) -> None:
                upsert(connection, tables.node_keys, [row])
                table = tables.join_tokens
                used = table.c.token_hash == hash_key(proof.join_token or "")
                connection.execute(update(table).where(used).values(node_id=offer.node_id))

            # Key before offer: after a crash in between the name is free for another token.
            await self._core.store.run(use)
            await self._take(offer, joining=True)
            return key

    async def offer(self, offer: Offer) -> None:
        """Take an offer of the operator's own, or change it."""
        _check(offer)
        async with self._core.lock:
            await self._take(offer, joining=False)

    async def require_key(self, node_id: str, node_key: str) -> Offer:
        """The offer of the node that has this key. Raises InvalidKey, NotFound."""
        offer = self.find(node_id)
        await self._core.store.run(lambda c: _require_key(c, offer, node_key))
        return offer

    def find(self, node_id: str) -> Offer:
        """The offer of a node. Raises NotFound."""
        for offer in self._core.offers:
            if offer.node_id == node_id:
                return offer
        names = ", ".join(offer.node_id for offer in self._core.offers) or "none"
        raise NotFound(f"node {node_id!r} is unknown; known: {names}", code="node_not_found")

    async def drain(self, node_id: str) -> Offer:
        """Match nothing more with a node; what runs there runs on. Raises NotFound."""
        async with self._core.lock:
            offer = self.find(node_id)
            if offer.state in (OfferState.OPEN, OfferState.LOST):
                drained = replace(offer, state=OfferState.DRAINING, reason="no new orders")
                await self._core.store.save([drained])
            return self.find(node_id)

    async def undrain(self, node_id: str) -> Offer:
        """Match with a drained node again. Raises NotFound."""
        async with self._core.lock:
            offer = self.find(node_id)
            if offer.state is OfferState.DRAINING:
                await self._core.store.save([replace(offer, state=OfferState.OPEN, reason="")])
            return self.find(node_id)

    async def leave(self, node_id: str) -> Offer:
        """The node is gone for good; its leases must be closed before. Raises NotFound."""
        async with self._core.lock:
            offer = replace(self.find(node_id), state=OfferState.LEFT, reason="left")
            await self._core.store.save([offer])
            return offer

    async def see(self, alive: frozenset[str]) -> None:
        """Note which nodes are lost and which are back. Under the lock."""
        changed = []
        for offer in self._core.offers:
            lives = offer.node_id in alive
            if not lives and offer.state in (OfferState.OPEN, OfferState.DRAINING):
                reason = f"it does not answer; it was {offer.state}"
                changed.append(replace(offer, state=OfferState.LOST, reason=reason))
            elif lives and offer.state is OfferState.LOST:
                drained = offer.reason.endswith(OfferState.DRAINING)
                state = OfferState.DRAINING if drained else OfferState.OPEN
                changed.append(replace(offer, state=state, reason=""))
        if changed:
            await self._core.store.save(changed)

    async def _take(self, offer: Offer, joining: bool) -> None:
        """Store an offer; one that joins is open only once its node is seen."""
        core = self._core
        known = core.state.offers.get(offer.offer_id)
        drained = False
        if known is not None:
            self._require_same_gpus(known, offer)
            drained = known.state is OfferState.DRAINING or known.reason.endswith("draining")
            if known.ask_pico == offer.ask_pico:
                offer = replace(offer, priced_at=known.priced_at)
        state = OfferState.DRAINING if drained else OfferState.OPEN
        if joining:
            offer = replace(offer, state=OfferState.LOST, reason=f"it is joining; to be {state}")
        else:
            offer = replace(offer, state=state)
        card = pricing.gpu_rate_card(offer.offer_id, offer.ask_pico, offer.priced_at)
        await core.ledger.add_rate_cards([card], only_new_models=False)
        await core.store.save([offer])
        if known is None or len(known.gpus) != len(offer.gpus):
            core.rebuild_calendar()

    def _require_same_gpus(self, known: Offer, offer: Offer) -> None:
        """Raises InvalidRequest if GPUs would go on which something is placed."""
        used: Mapping[int, str] = {
            index: owner
            for owner, place in [
                *((lease.lease_id, lease.place) for lease in self._core.open_leases()),
                *((r.replica_id, r.place) for r in self._core.state.replicas.values()),
            ]
            if place.offer_id == offer.offer_id
            for index in place.gpu_indices
        }
        here = {gpu.index for gpu in offer.gpus}
        for index, owner in sorted(used.items()):
            if index not in here:
                raise InvalidRequest(
                    f"node {offer.node_id} came without GPU {index}, on which {owner} is placed"
                )
        if known.provider_id != offer.provider_id:
            raise Conflict(f"node {offer.node_id} is of provider {known.provider_id}")

    def _require_token(self, connection: Connection, token: str | None, offer: Offer) -> None:
        table = tables.join_tokens
        query = select(table).where(table.c.token_hash == hash_key(token or ""))
        row = connection.execute(query).one_or_none()
        now = self._core.clock.now()
        if row is None or row.provider_id != offer.provider_id:
            raise InvalidKey(
                f"the join token is not one of provider {offer.provider_id} "
                f"(market providers token {offer.provider_id})"
            )
        if row.expires_at <= now or row.node_id is not None:
            why = "has expired" if row.node_id is None else f"was used by node {row.node_id}"
            raise InvalidKey(
                f"the join token {why}; ask for another (market providers token "
                f"{offer.provider_id})"
            )


def _require_key(connection: Connection, offer: Offer, node_key: str) -> None:
    table = tables.node_keys
    query = select(table).where(table.c.node_id == offer.node_id)
    row = connection.execute(query).one_or_none()
    known = row is not None and row.provider_id == offer.provider_id
    if not known or not secrets.compare_digest(row.key_hash, hash_key(node_key)):  # type: ignore[union-attr]
        raise InvalidKey(f"this is not the key of node {offer.node_id}")


def _check(offer: Offer) -> None:
    """Raises InvalidRequest for an offer that makes no sense."""
    name = offer.node_id
    if not 0 < len(name) <= NODE_NAME_MAX or not name.replace("-", "").isalnum():
        raise InvalidRequest(
            f"node {name!r}: letters, digits and dashes, at most {NODE_NAME_MAX}", param="node"
        )
    if offer.ask_pico < 0:
        raise InvalidRequest("ask: a price per GPU-hour cannot be negative", param="ask")
    if len({gpu.index for gpu in offer.gpus}) != len(offer.gpus):
        raise InvalidRequest(f"node {name}: two GPUs have the same index", param="gpus")
    if any(gpu.memory_mib <= 0 for gpu in offer.gpus):
        raise InvalidRequest(f"node {name}: a GPU without memory", param="gpus")
    if not 0 <= offer.term_min_s <= offer.term_max_s:
        raise InvalidRequest("terms: the shortest must not be longer than the longest")
    since, until = offer.available_from, offer.available_until
    if since is not None and until is not None and since >= until:
        raise InvalidRequest("availability must begin before it ends")
