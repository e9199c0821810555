"""Who may do what: every address of our own API, asked by everybody whom it is none of."""

import pytest
from fastapi.routing import APIRoute

from market.keys import hash_key
from market.ledger.schema import encode_batch
from market.metering import LENT_BY
from market.types import KeyPolicy, Lane, Principal, Role, TokenCounts
from tests.samples import CARD, deposit, hold_request, token_record
from tests.unit.test_cli_fleet import URL, Market

# Roles that an address refuses. "other" and "rival" are a tenant and a provider whose things the
# asked ones are not; "acme" is their tenant and "farm" the provider on whose node they are.
OPEN: tuple[str, ...] = ()
OPERATOR = ("acme", "other", "farm", "rival")
TENANT = ("other", "farm", "rival")
PROVIDER = ("acme", "other", "rival")
PARTIES = ("other", "rival")
NO_PROVIDER = ("farm", "rival")

NODE = {"node_id": "n1", "provider_id": "gpu-farm", "gpu_type": "a10", "gpus": [], "cpu_count": 1,
        "memory_mib": 1, "ask": "1"}  # fmt: skip
LEASING = {"model": "tiny-qwen", "mode": "lease", "tenant_id": "acme"}
REFUND = {"reason": "sorry", "amount": "1"}
PRICE = {"model": "tiny-qwen", "input_price": "1", "output_price": "1"}
PACK = {"model": "tiny-qwen", "tokens": 10}
MODEL = {"name": "mine", "source": "nobody/mine", "input_price": "1", "output_price": "1"}

ROUTES = {
    ("GET", "/market/v1/models"): (OPEN, None),
    ("POST", "/market/v1/models"): (OPERATOR, MODEL),
    ("DELETE", "/market/v1/models/{model}"): (OPERATOR, None),
    ("GET", "/market/v1/prices"): (OPEN, None),
    ("POST", "/market/v1/prices"): (OPERATOR, PRICE),
    ("GET", "/market/v1/providers"): (OPERATOR, None),
    ("POST", "/market/v1/providers"): (OPERATOR, {"provider_id": "mine"}),
    ("GET", "/market/v1/tenants"): (OPERATOR, None),
    ("POST", "/market/v1/tenants"): (OPERATOR, {"tenant_id": "mine"}),
    ("GET", "/market/v1/tenants/{tenant_id}"): (TENANT, None),
    ("PATCH", "/market/v1/tenants/{tenant_id}"): (OPERATOR, {"weight": 9}),
    ("POST", "/market/v1/tenants/{tenant_id}/packs"): (TENANT, PACK),
    ("POST", "/market/v1/tenants/{tenant_id}/deposits"): (
        OPERATOR,
        {"amount": "1", "deposit_id": "d"},
    ),
    ("POST", "/market/v1/tenants/{tenant_id}/refunds"): (OPERATOR, REFUND),
    ("GET", "/market/v1/keys"): (OPEN, None),  # one's own
    ("POST", "/market/v1/keys"): (OPERATOR, {"tenant_id": "acme"}),
    ("PATCH", "/market/v1/keys/{api_key_id}"): (OPERATOR, {"models": None}),
    ("POST", "/market/v1/keys/{api_key_id}/rotate"): (TENANT, {}),
    ("DELETE", "/market/v1/keys/{api_key_id}"): (OPERATOR, None),
    ("GET", "/market/v1/offers"): (OPEN, None),
    ("POST", "/market/v1/providers/{provider_id}/join-tokens"): (PROVIDER, None),
    ("POST", "/market/v1/nodes"): (OPERATOR, {"node": NODE}),  # a join token is asked for
    ("POST", "/market/v1/nodes/{node_id}/drain"): (PROVIDER, None),
    ("POST", "/market/v1/nodes/{node_id}/leave"): (PROVIDER, {"force": True}),
    ("POST", "/market/v1/deployments"): (TENANT, LEASING),
    ("POST", "/market/v1/quotes"): (TENANT, {"model": "tiny-qwen", "tenant_id": "acme"}),
    ("GET", "/market/v1/deployments"): (NO_PROVIDER, None),  # pools and one's own
    ("DELETE", "/market/v1/deployments/{name}"): (TENANT, None),
    ("GET", "/market/v1/orders"): (NO_PROVIDER, None),  # one's own
    ("DELETE", "/market/v1/orders/{order_id}"): (TENANT, None),
    ("GET", "/market/v1/leases"): (OPEN, None),  # one's own
    ("GET", "/market/v1/leases/{lease_id}"): (PARTIES, None),
    ("POST", "/market/v1/leases/{lease_id}/renew"): (TENANT, {"term": "1h"}),
    ("PATCH", "/market/v1/leases/{lease_id}"): (TENANT, {"resale": True}),
    ("POST", "/market/v1/leases/{lease_id}/release"): (TENANT, None),
    ("GET", "/market/v1/status"): (OPERATOR, None),
    ("GET", "/market/v1/usage"): (NO_PROVIDER, None),  # one's own
    ("GET", "/v1/usage"): (NO_PROVIDER, None),  # one's own
    ("GET", "/market/v1/requests/{request_id}"): (TENANT, None),
    ("POST", "/market/v1/settlements"): (OPERATOR, {"period": "2026-01"}),
    ("GET", "/market/v1/statements/{party}/{name}"): (TENANT, None),
    ("GET", "/market/v1/ledger/live"): (OPERATOR, None),
    ("GET", "/market/v1/ledger/focus"): (NO_PROVIDER, None),  # one's own
    ("POST", "/market/v1/ledger/verify"): (OPERATOR, None),
    ("POST", "/market/v1/ledger/compact"): (OPERATOR, None),
    ("GET", "/market/v1/ledger/checkpoint"): (OPEN, None),
    ("GET", "/market/v1/ledger/proofs/{request_id}"): (TENANT, None),
    ("GET", "/metrics"): (OPERATOR, None),
    ("GET", "/market/v1/stored-models"): (OPERATOR, None),
    ("POST", "/market/v1/stored-models"): (OPERATOR, {"model": "tiny-qwen"}),
    ("DELETE", "/market/v1/stored-models/{model}"): (OPERATOR, None),
}
QUERY = {"period": "2026-01", "start_time": "0", "end_time": "60", "bucket_width": "1m"}
PEOPLE = {
    "other": Principal("key-other", Role.TENANT, "other"),
    "farm": Principal("key-farm", Role.PROVIDER, "gpu-farm"),
    "rival": Principal("key-rival", Role.PROVIDER, "rival"),
    "app": Principal("key-app", Role.TENANT, "acme", KeyPolicy(models=("smollm2-135m",))),
    "tokens": Principal("key-tokens", Role.TENANT, "acme", KeyPolicy(lanes=(Lane.TOKENS,))),
    "lessee": Principal("key-lessee", Role.TENANT, "acme", KeyPolicy(lanes=(Lane.LEASE,))),
}


class World:
    """A market in which the tenant acme has one of everything."""

    def __init__(self, home):
        self.market = Market(home)
        self.do = self.market.do
        self.do(self.market.open())
        self.do(self.fill())

    async def fill(self):
        ledger = self.market.ledger
        await ledger.create_tenant("other")
        await ledger.create_provider("rival")
        await ledger.create_provider("local")
        await ledger.transfer(deposit("100", "deposit-other", "other"))
        for name, principal in PEOPLE.items():
            await ledger.add_key(principal, hash_key(name))
        await ledger.add_rate_cards([CARD], only_new_models=False)
        epoch = await ledger.register_producer("gw0")
        cost = {"wanted_pico": CARD.input_pico, "minimum_pico": CARD.input_pico}
        hold = hold_request(epoch=epoch, **cost)
        await ledger.open_hold(hold)
        lent = token_record(
            hold,
            request_id="req-1",
            counts=TokenCounts(1, 0, 0),
            charge_pico=CARD.input_pico,
            lease_id="lease-of-other",
            attrs=((LENT_BY, "other"),),
        )
        await ledger.append("gw0", epoch, 0, encode_batch([lent]))

    def ask(self, who, method, path, **options):
        headers = {"authorization": f"Bearer {who}"} if who else {}
        client = self.market.client
        return self.do(client.request(method, f"{URL}{path}", headers=headers, **options))

    def order(self, who, **body):
        return self.ask(who, "POST", "/market/v1/deployments", json=LEASING | body)

    def ids(self):
        return {
            "tenant_id": "acme",
            "provider_id": "gpu-farm",
            "node_id": "farm",
            "api_key_id": "key-acme",
            "lease_id": self.lease_id,
            "name": self.lease_id,
            "order_id": "waiting",
            "request_id": "req-1",
            "model": "tiny-qwen",
            "party": "tenant",
        }

    def close(self):
        self.do(self.market.close())
        self.market.loop.call_soon_threadsafe(self.market.loop.stop)
        self.market.thread.join()
        self.market.loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("roles"))
    made.order("operator", mode="tokens", tenant_id=None)
    made.do(made.market.round())
    lease = made.order("acme", mode="hybrid", order_id="granted", gpus="0.5").json()["lease"]
    made.lease_id = lease["lease_id"]
    assert made.order("acme", order_id="waiting", gpus="9", queue=True).status_code == 200
    made.do(made.market.round())
    yield made
    made.close()


def routes(app):
    """(method, path) of our own API; OpenAI's is of whoever pays for it."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path.startswith(("/market", "/metrics")):
            yield from ((method, route.path) for method in route.methods)


def test_every_address_is_in_the_table(world):
    unknown = set(routes(world.market.app)) - set(ROUTES)
    assert not unknown, "say in ROUTES whom they refuse"


@pytest.mark.parametrize(
    ("who", "route"), [(who, route) for route, (refused, _) in ROUTES.items() for who in refused]
)
def test_strangers_are_refused_and_change_nothing(world, who, route):
    (method, path), (_, body) = route, ROUTES[route]
    path = path.format(**world.ids() | ({"name": "acme"} if "{party}" in path else {}))
    answer = world.ask(who, method, path, json=body, params=QUERY if method == "GET" else None)
    expected = (401,) if path.endswith("/nodes") else (403, 404)
    assert answer.status_code in expected, answer.text
    lease = world.ask("operator", "GET", f"/market/v1/leases/{world.lease_id}").json()
    assert (lease["state"] != "closed", lease["resale"]) == (True, False)
    waiting = world.ask("operator", "GET", "/market/v1/orders").json()
    assert [order["state"] for order in waiting] == ["waiting"]


@pytest.mark.parametrize("route", [route for route in ROUTES if route[1] != "/market/v1/nodes"])
def test_no_key_is_refused(world, route):
    method, path = route[0], route[1].format(**world.ids())
    answer = world.ask("", method, path, json=ROUTES[route][1], params=QUERY)
    assert answer.status_code == 401, answer.text


@pytest.mark.parametrize("who", ["other", "rival"])
def test_lists_of_strangers_have_nothing_of_others(world, who):
    paths = ["/market/v1/leases", "/market/v1/keys"]
    if who == "other":
        paths += ["/market/v1/orders", "/market/v1/usage", "/market/v1/deployments"]
    for path in paths:
        answer = world.ask(who, "GET", path)
        assert answer.status_code == 200
        assert "acme" not in answer.text


def test_parties_see_their_lease(world):
    for who in ("acme", "farm"):
        listed = world.ask(who, "GET", "/market/v1/leases").json()
        shown = world.ask(who, "GET", f"/market/v1/leases/{world.lease_id}").json()
        assert [lease["lease_id"] for lease in listed] == [shown["lease_id"]] == [world.lease_id]


class TestKeys:
    """What limits a key's requests limits what it may order and end, too."""

    @pytest.mark.parametrize(
        ("who", "code"), [("app", "model_not_allowed"), ("tokens", "lane_not_allowed")]
    )
    def test_have_nothing_to_do_with_leases_of_other_models_or_lanes(self, world, who, code):
        lease = f"/market/v1/leases/{world.lease_id}"
        for method, path, body in (
            ("POST", "/market/v1/deployments", LEASING),
            ("POST", "/market/v1/quotes", {"model": "tiny-qwen"}),
            ("POST", f"{lease}/renew", {"term": "1h"}),
            ("PATCH", lease, {"resale": True}),
            ("POST", f"{lease}/release", None),
            ("DELETE", f"/market/v1/deployments/{world.lease_id}", None),
            ("DELETE", "/market/v1/deployments/tiny-qwen", None),
            ("DELETE", "/market/v1/orders/waiting", None),
        ):
            answer = world.ask(who, method, path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, code), path

    def test_without_spills_change_no_spill(self, world):
        path = f"/market/v1/leases/{world.lease_id}"
        for body in ({"spill_budget": None}, {"ttft_s": 1}):
            answer = world.ask("lessee", "PATCH", path, json=body)
            assert answer.json()["error"]["code"] == "lane_not_allowed"
        assert world.ask("lessee", "PATCH", path, json={"resale": False}).status_code == 200
        hybrid = world.order("lessee", mode="hybrid")
        assert hybrid.json()["error"]["code"] == "lane_not_allowed"

    def test_of_other_models_deal_no_requests_to_them(self, world):
        body = {"model": "smollm2-135m", "mode": "auto", "strong": "tiny-qwen", "cheap": "x"}
        answer = world.ask("app", "POST", "/market/v1/deployments", json=body)
        assert answer.json()["error"]["code"] == "model_not_allowed"

    def test_buy_only_packs_that_they_can_use(self, world):
        for who, code in (("app", "model_not_allowed"), ("lessee", "lane_not_allowed")):
            answer = world.ask(who, "POST", "/market/v1/tenants/acme/packs", json=PACK)
            assert answer.json()["error"]["code"] == code


class TestLenders:
    """On whose lease a pool's request was served is the operator's to know."""

    def test_are_not_in_the_rows_of_requests(self, world):
        path = "/market/v1/requests/req-1"
        row = world.ask("acme", "GET", path).json()
        assert (row["lease_id"], row["attrs"]) == (None, {})
        row = world.ask("operator", "GET", path).json()
        assert (row["lease_id"], row["attrs"]) == ("lease-of-other", {LENT_BY: "other"})

    def test_are_not_told_apart_in_sums(self, world):
        query = {"by": "lease", "tenant": "acme", "model": "tiny"}
        for who, lease in (("acme", None), ("operator", "lease-of-other")):
            (row,) = world.ask(who, "GET", "/market/v1/usage", params=query).json()
            assert row["lease"] == lease

    def test_are_not_proven_to_borrowers(self, world):
        path = "/market/v1/ledger/proofs/req-1"
        answer = world.ask("acme", "GET", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "row_names_lender")
        assert world.ask("operator", "GET", path).status_code == 200

    def test_are_not_in_exports(self, world):
        now = world.market.clock.now()
        query = {"period": f"{now:%Y-%m}", "format": "csv"}
        exported = world.ask("acme", "GET", "/market/v1/ledger/focus", params=query)
        assert exported.status_code == 200
        assert "tiny" in exported.text
        assert "other" not in exported.text


class TestInput:
    """What cannot be is refused in words, at once, and ends nobody."""

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"gpus": "1e999990"}, "gpus"),
            ({"gpus": "1e999999"}, "gpus"),
            ({"term": "9" * 40_000}, "term"),
            ({"term": "999999999999d"}, "term"),
            ({"start": "99999999d"}, "start"),
            ({"start": "0001-01-01T00:00+23:59"}, "start"),
            ({"max_price": "9" * 2_000_000}, "max_price"),
            ({"max_price": "1e999999999"}, None),
            ({"gpu_memory_gib": 2**31}, "gpu_memory_gib"),
            ({"gpu_memory_gib": 2**70}, "gpu_memory_gib"),
            ({"order_id": "a\0b"}, "order_id"),
            ({"region": "a\nb"}, "region"),
            ({"gpu_type": "x" * 101}, "gpu_type"),
            ({"mode": "rent"}, "mode"),
        ],
    )
    def test_of_orders(self, world, body, param):
        answer = world.order("acme", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert len(answer.text) < 1000

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "/market/v1/leases/x/renew", {"term": "999999999999d"}),
            ("POST", "/market/v1/tenants/acme/packs", PACK | {"valid_for": "999999999999d"}),
            ("GET", "/market/v1/usage?since=999999d", None),
            ("GET", "/market/v1/ledger/focus?period=9999-12", None),
            ("GET", "/market/v1/requests/a%00b", None),
            ("GET", "/market/v1/tenants/a%00b", None),
            ("GET", f"/market/v1/ledger/proofs/req-1?size={2**70}", None),
            ("GET", f"/v1/usage?start_time={10**18}&end_time={10**18 + 1}", None),
        ],
    )
    def test_of_everything_else(self, world, method, path, body):
        answer = world.ask("acme", method, path, json=body)
        assert answer.status_code == 400, answer.text

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (
                {"term": "30d"},
                "term is for mode lease and hybrid only; the mode is tokens, as none",
            ),
            ({"tenant_id": "acme"}, "tenant_id is for mode lease and hybrid and auto only"),
            (
                {"mode": "lease", "replicas": 2},
                "replicas is for mode tokens only; the mode is lease",
            ),
            ({"mode": "auto", "gpus": "1"}, "gpus is for mode lease and hybrid only"),
        ],
    )
    def test_that_the_mode_has_no_use_for(self, world, body, words):
        answer = world.ask(
            "operator", "POST", "/market/v1/deployments", json={"model": "tiny-qwen"} | body
        )
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
