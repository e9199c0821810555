"""Values that many tests need."""

from datetime import UTC, datetime, timedelta

from market import pricing
from market.accounts import CASH, Transfer, TransferKind, tenant_account
from market.types import (
    FinishReason,
    Gpu,
    HoldRequest,
    Lane,
    Lease,
    Offer,
    Order,
    Place,
    Principal,
    RateCard,
    RecordKind,
    Replica,
    ReplicaState,
    Role,
    Route,
    TokenCounts,
    UsageRecord,
)

NOON = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)

CARD: RateCard = pricing.make_rate_card(
    "tiny", (100_000, 50_000, 400_000), datetime(2026, 1, 1, tzinfo=UTC), "USD"
)
ROUTE = Route(
    model="tiny",
    lane=Lane.TOKENS,
    deployment_id="tiny-1",
    app_name="model-tiny-1",
    max_context_tokens=1000,
    provider_id="local",
    node_id="local",
    gpu_type="cpu",
    gpu_milli=0,
)
ACME = Principal("key-acme", Role.TENANT, "acme")


def deposit(amount: str, transfer_id: str = "deposit-1", tenant: str = "acme") -> Transfer:
    return Transfer(
        transfer_id=transfer_id,
        kind=TransferKind.DEPOSIT,
        debit_account=CASH,
        credit_account=tenant_account(tenant),
        amount_pico=pricing.parse_money(amount),
        currency="USD",
        reason="test",
        made_by="key-op",
    )


def hold_request(hold_id: str = "slice-1", **changes: object) -> HoldRequest:
    values: dict[str, object] = {
        "hold_id": hold_id,
        "producer": "gw0",
        "epoch": 1,
        "tenant_id": "acme",
        "wanted_pico": 100,
        "minimum_pico": 50,
        "model": "tiny",
        "lane": Lane.TOKENS,
        "currency": "USD",
        "started_at": NOON,
    }
    return HoldRequest(**(values | changes))  # type: ignore[arg-type]


def token_record(hold: HoldRequest, **changes: object) -> UsageRecord:
    """A record that draws on ``hold``; its request has the hold's name unless it gets its own."""
    counts = changes.pop("counts", TokenCounts(0, 0, 0))
    assert isinstance(counts, TokenCounts)
    values: dict[str, object] = {
        "kind": RecordKind.TOKENS,
        "request_id": hold.hold_id,
        "tenant_id": hold.tenant_id,
        "api_key_id": "key-acme",
        "model": hold.model,
        "lane": hold.lane,
        "deployment_id": "tiny-1",
        "provider_id": "local",
        "node_id": "local",
        "gpu_type": "cpu",
        "gpu_milli": 0,
        "started_at": hold.started_at,
        "finished_at": NOON,
        "input_tokens": counts.input_tokens,
        "cached_input_tokens": counts.cached_input_tokens,
        "output_tokens": counts.output_tokens,
        "price_id": CARD.price_id,
        "charge_pico": 0,
        "currency": hold.currency,
        "finish_reason": FinishReason.STOP,
        "slice_id": hold.hold_id,
    }
    return UsageRecord(**(values | changes))  # type: ignore[arg-type]


# 10^9 pico units per GPU-second: sums can be done in the head.
GPU_HOUR_PICO = 3_600_000_000_000
OFFER = Offer(
    offer_id="server",
    provider_id="local",
    node_id="server",
    gpu_type="a10",
    gpus=(Gpu(0, "a10", 24_564), Gpu(1, "a10", 24_564)),
    cpu_count=16,
    memory_mib=64_000,
    ask_pico=GPU_HOUR_PICO,
    currency="USD",
    priced_at=datetime(2026, 1, 1, tzinfo=UTC),
)
ORDER = Order(
    order_id="order-1",
    tenant_id="acme",
    api_key_id="key-acme",
    model="qwen-7b",
    engine="vllm",
    gpu_count=1,
    gpu_milli=1000,
    start=None,
    term_s=86_400,
    created_at=NOON,
)
REPLICA = Replica(
    replica_id="lease-1-0",
    deployment_id="lease-1",
    place=Place("server", "server", (0,), 1000),
    state=ReplicaState.WAITING,
    reason="ordered",
    created_at=NOON,
)


def lease(start: datetime = NOON, term_s: float = 86_400, **changes: object) -> Lease:
    """A lease as the match makes it: nothing held, nothing metered."""
    values: dict[str, object] = {
        "lease_id": "lease-1",
        "order_id": "order-1",
        "tenant_id": "acme",
        "api_key_id": "key-acme",
        "model": "qwen-7b",
        "engine": "vllm",
        "offer_id": "server",
        "provider_id": "local",
        "node_id": "server",
        "gpu_type": "a10",
        "gpu_indices": (0,),
        "gpu_count": 1,
        "gpu_milli": 1000,
        "price_id": pricing.gpu_rate_card("server", GPU_HOUR_PICO, OFFER.priced_at).price_id,
        "gpu_hour_pico": GPU_HOUR_PICO,
        "currency": "USD",
        "start": start,
        "end": start + timedelta(seconds=term_s),
        "created_at": NOON,
        "metered_until": start,
        "hold_from": start,
        "covered_until": start,
        "reason": "booked",
    }
    return Lease(**(values | changes))  # type: ignore[arg-type]
