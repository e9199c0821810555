"""Values that many tests need."""

from datetime import UTC, datetime

from market import pricing
from market.accounts import CASH, Transfer, TransferKind, tenant_account
from market.types import HoldRequest, Lane, Principal, RateCard, Role, Route

NOON = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)

CARD: RateCard = pricing.make_rate_card(
    "tiny", (100_000, 50_000, 400_000), datetime(2026, 1, 1, tzinfo=UTC), "USD"
)
ROUTE = Route(
    model="tiny",
    lane=Lane.TOKENS,
    deployment_id="tiny-1",
    app_name="model-tiny-1",
    model_path="/nowhere",
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


def hold_request(hold_id: str = "req-gw0-1", **changes: object) -> HoldRequest:
    values: dict[str, object] = {
        "hold_id": hold_id,
        "producer": "gw0",
        "epoch": 1,
        "tenant_id": "acme",
        "api_key_id": "key-acme",
        "wanted_pico": 100,
        "minimum_pico": 50,
        "model": "tiny",
        "lane": Lane.TOKENS,
        "deployment_id": "tiny-1",
        "provider_id": "local",
        "node_id": "local",
        "gpu_type": "cpu",
        "gpu_milli": 0,
        "price_id": CARD.price_id,
        "currency": "USD",
        "started_at": NOON,
    }
    return HoldRequest(**(values | changes))  # type: ignore[arg-type]
