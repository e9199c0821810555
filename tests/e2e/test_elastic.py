"""Models that sleep, wake, share GPUs and spill: all are answered, and billed right."""

import asyncio
import functools
import http.server
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import httpx
import psutil
import pytest

from tests import sleepy
from tests.e2e.conftest import running_market, wait_until
from tests.hub import hub

pytestmark = pytest.mark.timeout(400)

MODEL = "tiny-qwen"
HUBS, HUBS_NAME = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
REPLICA = "ServeReplica:model-tiny-qwen"
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is a list?"}],
    "max_tokens": 5,
}


@pytest.fixture(scope="module")
def market(tmp_path_factory, tiny_model):
    with (
        hub(HUBS_NAME, tiny_model) as source,
        running_market(
            tmp_path_factory.mktemp("elastic"),
            tiny_model,
            HF_ENDPOINT=source.address,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path_factory.mktemp("hf")),
        ) as market,
    ):
        yield market


@pytest.fixture
def cold(market):
    """The model deployed, and nothing of it running."""
    market.cli("deploy", MODEL, "--replicas", "0:2", "--keep-alive", "4s")
    wait_until(lambda: is_cold(market), "the model's sleep", 120)
    return market


def is_cold(market):
    (deployment,) = market.cli("deployments")
    return (deployment["state"] == "cold" and not deployment["places"]) or None


def test_burst_on_a_cold_model_is_served_whole_and_billed_right(cold):
    """Twenty at once, half of them streamed; then it sleeps again, and its processes are gone."""
    assert cold.processes(REPLICA) == []
    tenant = cold.tenant()
    client = tenant.client()
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "market"
    assert cold.processes(REPLICA) == []  # looking does not wake it

    async def burst():
        headers = {"authorization": f"Bearer {tenant.key}"}
        async with httpx.AsyncClient(base_url=cold.url, headers=headers, timeout=300) as http:
            bodies = [ASKED | {"stream": number % 2 == 0} for number in range(20)]
            return await asyncio.gather(
                *(http.post("/v1/chat/completions", json=body) for body in bodies)
            )

    answers = asyncio.run(burst())
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert "error" not in answer.text
    rows = tenant.rows(20)
    assert set(rows["finish_reason"]) <= {"length", "stop"}
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    assert rows["queue_ms"].max() < 60_000
    metrics = httpx.get(
        f"{cold.url}/metrics", headers={"authorization": f"Bearer {operator_key(cold)}"}
    ).text
    assert 'market_cold_start_seconds_count{model="tiny-qwen"} 20' in metrics
    wait_until(lambda: is_cold(cold), "the model's sleep", 120)
    wait_until(lambda: not cold.processes(REPLICA) or None, "the end of its processes")


def test_stream_is_kept_alive_with_comments_while_the_model_starts(cold):
    """Clients and proxies see that somebody is there."""
    tenant = cold.tenant()
    headers = {"authorization": f"Bearer {tenant.key}"}
    url = f"{cold.url}/v1/chat/completions"
    with httpx.stream(
        "POST", url, json=ASKED | {"stream": True}, headers=headers, timeout=300
    ) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    waited = [line for line in lines if line.startswith(":")]
    assert lines[len(waited)].startswith("data: {")
    assert lines[-1] == "data: [DONE]"
    row = tenant.rows(1).iloc[0]
    assert row["charge"] > 0
    assert waited or row["ttft_ms"] < 10_000


def test_who_cannot_pay_wakes_nothing(cold):
    poor = cold.tenant(deposit="0")
    answer = httpx.post(
        f"{cold.url}/v1/chat/completions",
        json=ASKED,
        headers={"authorization": f"Bearer {poor.key}"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (402, "insufficient_balance")
    (deployment,) = cold.cli("deployments")
    assert deployment["places"] == []


def test_bounds_are_shown_and_changed_by_deploying_again(cold):
    assert " of 0:2" in cold.cli_plain("deployments")
    again = cold.cli("deploy", MODEL, "--replicas", "1")
    assert again["state"] == "ready"
    assert "1/1" in cold.cli_plain("deployments")


def test_replica_that_is_too_many_leaves_under_load_and_loses_nothing(cold):
    cold.cli("deploy", MODEL, "--replicas", "2")
    wait_until(lambda: "2/2" in cold.cli_plain("deployments") or None, "the second replica", 120)
    tenant, over = cold.tenant(), threading.Event()

    def ask():
        client, costs = tenant.client(), []
        while not over.is_set():
            raw = client.chat.completions.with_raw_response.create(
                **ASKED | {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
            )
            assert raw.parse().usage.completion_tokens == 100
            costs.append(Decimal(raw.headers["x-market-cost"]))
        return costs

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask) for _ in range(6)]
        try:
            cold.cli("deploy", MODEL, "--replicas", "1")
            wait_until(lambda: len(cold.cli("deployments")[0]["places"]) == 1 or None, "its end")
        finally:
            over.set()
        costs = [cost for each in asking for cost in each.result()]
    rows = tenant.rows(len(costs))
    assert set(rows["finish_reason"]) == {"length"}
    assert rows["charge"].sum() == sum(costs) == 10 - tenant.settled()


def test_model_of_the_hub_is_pulled_served_and_removed(market):
    """The hub's own client, over a hub of ours; the files are the tiny model's."""
    (row,) = market.cli("models", "pull", HUBS)
    assert (row["node_id"], row["state"], row["message"]) == ("local", "ready", "")
    market.cli("deploy", HUBS, "--engine", "transformers")
    asked = ASKED | {"model": HUBS, "extra_body": {"ignore_eos": True}}
    answer = market.tenant().client().chat.completions.create(**asked)
    assert answer.usage.completion_tokens == 5
    refused = market.run("models", "rm", HUBS)
    assert (refused.returncode, "in use" in refused.stderr) == (1, True)
    market.cli("undeploy", HUBS)
    wait_until(lambda: not in_use(market, HUBS), "the end of its use")
    assert market.cli("models", "rm", HUBS)["freed_bytes"] == {"local": row["bytes"]}
    assert not (market.home / "models" / HUBS).exists()


def test_model_that_is_added_is_pulled_served_and_billed_at_its_price(market, tiny_model):
    """From a web server, under a name of our own; a scheduler that was killed still knows it."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tiny_model.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = f"http://127.0.0.1:{server.server_address[1]}/{tiny_model.name}"
    prices = ("--input-price", "1", "--cached-input-price", "0.5", "--output-price", "3")
    try:
        added = market.cli("models", "add", "ours", "--source", source, *prices)
        assert (added["created"], added["parameters"]) == (True, 1_050_752)
        (row,) = market.cli("models", "pull", "ours")
        assert (row["state"], row["message"]) == ("ready", "")
        market.cli("deploy", "ours", "--engine", "transformers")
        tenant = market.tenant()
        answer = tenant.client().chat.completions.create(**ASKED | {"model": "ours"})
        before = market.status()["scheduler"]["pid"]
        psutil.Process(before).kill()
        wait_until(lambda: market.status()["scheduler"]["pid"] != before, "another scheduler")
        tenant.client().chat.completions.create(**ASKED | {"model": "ours"})
    finally:
        server.shutdown()
        server.server_close()
    rows = tenant.rows(2)
    assert set(rows["model"]) == {"ours"}
    fresh = rows["input_tokens"] - rows["cached_input_tokens"]
    pico = (
        fresh * 1_000_000
        + rows["cached_input_tokens"] * 500_000
        + rows["output_tokens"] * 3_000_000
    )
    assert [Decimal(int(cost)).scaleb(-12) for cost in pico] == list(rows["charge"])
    assert answer.usage.completion_tokens in list(rows["output_tokens"])
    refused = market.run("models", "forget", "ours")
    assert (refused.returncode, "in use" in refused.stderr) == (1, True)
    market.cli("undeploy", "ours")
    wait_until(lambda: not any(d["model"] == "ours" for d in market.get("/deployments")), "its end")
    market.cli("models", "forget", "ours")
    assert "ours" not in [model["model"] for model in market.get("/models")]


def in_use(market, model):
    return any(row["in_use"] for row in market.get("/stored-models") if row["model"] == model)


def operator_key(market):
    return (market.home / "operator.key").read_text().strip()


FOUR = ("tiny-qwen", "smollm2-135m", "smollm2-360m", "qwen-0.5b")
CHEAP = FOUR[1]
BUDGET = Decimal("0.0003")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_model):
    """Three nodes: the operator's takes no models, two have one logical GPU of 3 GiB each.

    Four models of the catalog, all with the tiny one's files, of which two GPUs hold not all; and a
    hybrid's lease. A replica serves two requests at once.
    """
    home = tmp_path_factory.mktemp("shared-market") / "operator"
    plugins = tmp_path_factory.mktemp("plugins")
    sleepy.installed(plugins)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugins), *on_path()]))
    gpu = ("--gpus", "1", "--gpu-memory-gib", "3", "--ask", "2")
    with running_market(home, tiny_model, MARKET_SEQUENCES="2") as market:
        nodes = [market.join(name, f"provider-{name}", *gpu) for name in ("one", "two")]
        for folder in (home, *(node.home for node in nodes)):
            for model in FOUR[1:]:
                (folder / "models" / model).symlink_to(tiny_model)
        market.cli("drain", "local")
        for model in FOUR:
            options = ("--engine", "transformers", "--replicas", "0:1", "--keep-alive", "1h")
            market.cli("deploy", model, *options)
        market.acme = market.tenant()
        lease = ("--mode", "hybrid", "--gpus", "0.36", "--term", "1h", "--tenant", market.acme.name)
        limits = ("--spill-budget", f"{BUDGET}", "--ttft", "0.2")
        market.hybrid = market.cli("deploy", MODEL, *lease, *limits)
        market.lease_id = market.hybrid["lease"]["lease_id"]
        try:
            yield market
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda node: node.run("leave", "--force"), nodes))
            monkeypatch.undo()


def on_path():
    return filter(None, [os.environ.get("PYTHONPATH")])


def test_four_models_share_two_gpus_and_leave_the_lease_alone(shared):
    """Asked in turn, twice, then all at once: who is idle makes room, and the lease serves on."""
    tenant, seen, before = shared.tenant(), [], lease_places(shared)
    over = threading.Event()

    def watch():
        while not over.wait(0.1):
            seen.append(shares(shared))

    async def ask(http, model, key=tenant.key):
        headers = {"authorization": f"Bearer {key}"}
        body = ASKED | {"model": model}
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-market-lane"]

    async def ask_all():
        async with httpx.AsyncClient(base_url=shared.url, timeout=300) as http:
            for model in FOUR * 2:
                lanes = await asyncio.gather(ask(http, model), ask(http, MODEL, shared.acme.key))
                assert lanes[0] == "tokens"
                assert lanes[1] in ("lease", "spill")  # starts are loud: it may have been slow
            await asyncio.gather(*(ask(http, model) for model in FOUR))

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(watch)
        try:
            asyncio.run(ask_all())
        finally:
            over.set()
        watching.result()
    assert max(milli for used in seen for milli in used.values()) <= 1000
    rows = tenant.rows(12)
    assert dict.fromkeys(FOUR, 3) == rows["model"].value_counts().to_dict()
    assert set(rows["node_id"]) == {"one", "two"}
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    lease = shared.lease(shared.lease_id)
    assert (lease["state"], lease_places(shared)) == ("active", before)


def lease_places(market):
    """The lease's replicas: another one would have another id."""
    (own,) = (d for d in market.get("/deployments") if d["lease_id"] is not None)
    return [place["replica_id"] for place in own["places"]]


def shares(market):
    """Milli in use of each GPU."""
    return {
        (offer["offer_id"], gpu["index"]): sum(used["milli"] for used in gpu["used"])
        for offer in market.get("/offers")
        for gpu in offer["gpus"]
    }


async def ask(client, model=MODEL, text="What is a list?", **more):
    """(headers, body) of an answer."""
    messages = [{"role": "user", "content": text}]
    answer = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        **({"max_tokens": 50, "extra_body": {"ignore_eos": True}} | more),
    )
    return answer.headers, answer.parse()


def asked(tenant, count, **more):
    async def all_of_them():
        async with tenant.async_client() as client:
            return await asyncio.gather(*(ask(client, **more) for _ in range(count)))

    return asyncio.run(all_of_them())


def test_gateway_killed_while_a_hybrid_spills_costs_nobody_anything(shared):
    """kill -9: what was cut off is not charged, what was held returns, the rule is there again."""
    acme, long = shared.acme, ASKED | {"max_tokens": 300, "ignore_eos": True, "stream": True}
    spilled = threading.Event()
    asked(shared.tenant(), 1)  # the pool is awake
    wait_until(lambda: open_holds(shared) == 1, "an end of all holds but the lease's")
    headers = {"authorization": f"Bearer {acme.key}"}

    def ask(_):
        url = f"{shared.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=long, headers=headers, timeout=200) as answer:
                lane = answer.headers.get("x-market-lane")
                if lane == "spill":  # its first token is there, most of them are not
                    spilled.set()
                lines = list(answer.iter_lines())
        except httpx.TransportError:
            return None
        return lane if "data: [DONE]" in lines else None

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, number) for number in range(6)]
        assert spilled.wait(60)
        shared.processes("ServeReplica:gateway")[0].kill()
        lanes = [answer.result() for answer in answers]
    assert None in lanes
    wait_until(lambda: open_holds(shared) == 1, "the return of what was held", 120)
    again = asked(acme, 1)
    assert again[0][0]["x-market-lane"] in ("lease", "spill")

    def cut_off():
        """Once the ledger says what the balance says, and has them."""
        rows = shared.ledger()
        rows = rows[rows["tenant_id"] == acme.name]
        agrees = Decimal(acme.balance()["balance"]) == 10 - rows["charge"].sum()
        found = rows[rows["finish_reason"] == "market_fault"]
        return found if agrees and len(found) else None

    cut = wait_until(cut_off, "rows of those that were cut off")
    # One that still waited for its money was not admitted: it has no row.
    assert 1 <= len(cut) <= lanes.count(None)
    assert set(cut["charge"]) == {0}


def open_holds(market):
    return market.status()["ledger"]["open_holds"]


def test_hybrid_spills_while_its_lease_is_full_within_the_days_budget(shared):
    acme = shared.acme
    asked(shared.tenant(), 1)  # the pool is awake
    assert shared.hybrid["policy"]["spill_budget"] == "0.0003"

    def on_lease():
        """Slow first tokens of what was before may yet send one to the pool."""
        found = asked(acme, 1)
        return found if found[0][0]["x-market-lane"] == "lease" else None

    alone = wait_until(on_lease, "an answer of the lease")
    burst = asked(acme, 20)
    again = asked(acme, 1)
    lanes = [headers["x-market-lane"] for headers, _ in burst]
    assert {headers["x-market-lane"] for headers, _ in alone + again} == {"lease"}
    assert set(lanes) == {"lease", "spill"}
    spilled = [headers for headers, _ in burst if headers["x-market-lane"] == "spill"]
    assert {headers["x-market-lane-reason"] for headers in spilled} <= {"ttft", "queue"}
    assert all("x-market-lease-id" not in headers for headers in spilled)
    assert {body.usage.completion_tokens for _, body in burst} == {50}
    ids = {headers["x-request-id"] for headers, _ in alone + burst + again}

    def sealed():
        rows = shared.ledger()
        rows = rows[rows["request_id"].isin(ids)]
        return rows if len(rows) == len(ids) else None

    rows = wait_until(sealed, "their rows")
    by_lane = rows.groupby("lane")["charge"].sum()
    assert by_lane["lease"] == 0
    # One answer costs less than a tenth of the budget: it was used up, and not overdrawn.
    ledger = shared.ledger()
    mine = ledger[(ledger["tenant_id"] == acme.name) & (ledger["lane"] == "spill")]
    assert BUDGET * Decimal("0.8") < mine["charge"].sum() <= BUDGET
    spills = rows[rows["lane"] == "spill"]
    lease_id = shared.hybrid["lease"]["lease_id"]
    assert {dict(attrs)["spilled_from"] for attrs in spills["attrs"]} == {lease_id}
    assert len(spills) == len(spilled)


def test_auto_deals_easy_and_hard_requests_and_says_what_it_saved(shared):
    tenant = shared.tenant()
    auto = ("--mode", "auto", "--cheap", CHEAP, "--strong", MODEL, "--cost-target", "0.3")
    made = shared.cli("deploy", "smart", *auto, "--tenant", tenant.name)
    assert made["state"] == "ready"
    assert asked(tenant, 1, model="smart:cheap")[0][1].model == CHEAP  # known at once
    names = [model.id for model in tenant.client().models.list().data]
    assert "smart" in names
    hard = (
        "John has 3 apples, gives 2 to Mary and buys 5 more for $4 each. Tom had 40 dollars and "
        "paid 15% tax on 7 items. How many dollars does he have left after 3 weeks if he earns $12 "
        "per day?"
    )
    easy = asked(tenant, 1, model="smart", text="Which of these is a fruit?")[0]
    forced = asked(tenant, 1, model="smart:strong")[0]
    proof = asked(tenant, 1, model="smart", text=hard)[0]
    assert (easy[0]["x-market-lane-reason"], easy[1].model) == ("simple", CHEAP)
    assert (forced[0]["x-market-lane-reason"], forced[1].model) == ("pinned", MODEL)
    assert (proof[0]["x-market-lane-reason"], proof[1].model) == ("complex", MODEL)
    rows = tenant.rows(4).sort_values("lsn")
    first = rows[rows["model"] == CHEAP].iloc[1]
    attrs = dict(first["attrs"])
    assert (attrs["auto"], attrs["not_taken"]) == ("smart", MODEL)
    counts = first["input_tokens"], first["cached_input_tokens"], first["output_tokens"]
    fresh, cached, output = counts[0] - counts[1], counts[1], counts[2]
    dear = (fresh * Decimal("0.1") + cached * Decimal("0.05") + output * Decimal("0.4")) / 10**6
    assert Decimal(attrs["not_taken_charge"]) == dear
    (lane,) = shared.cli("usage", "--by", "lane", "--tenant", tenant.name)
    cheap = rows[rows["model"] == CHEAP]
    saved = (
        sum(Decimal(dict(a)["not_taken_charge"]) for a in cheap["attrs"]) - cheap["charge"].sum()
    )
    assert Decimal(str(lane["saved"])) == saved > 0
    assert Decimal(tenant.balance()["balance"]) == 10 - rows["charge"].sum()
    assert shared.cli("undeploy", "smart", "--yes")["state"] == "removed"


def test_wrong_options_say_what_to_do_and_change_nothing(shared):
    before = shared.cli("deployments")
    tenant = shared.tenant()
    auto = ("deploy", CHEAP, "--mode", "auto", "--cheap", CHEAP, "--strong", MODEL)
    refused = shared.run(*auto, "--tenant", tenant.name)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "name of your own" in refused.stderr
    wrong = shared.run("deploy", MODEL, "--mode", "lease", "--cheap", CHEAP)
    assert wrong.returncode == 2
    assert [d["deployment_id"] for d in shared.cli("deployments")] == [
        d["deployment_id"] for d in before
    ]


def test_idle_replica_sleeps_and_wakes_in_the_same_process(shared):
    """An engine of another package that says it can: its GPU is free meanwhile."""
    shared.cli("undeploy", CHEAP, "--yes")
    wait_until(lambda: CHEAP not in deployed(shared), "the end of the other engine", 120)
    shared.cli("deploy", CHEAP, "--engine", "sleepy", "--replicas", "0:1", "--keep-alive", "2s")
    tenant = shared.tenant()
    ((_, first),) = asked(tenant, 1, model=CHEAP, max_tokens=3)
    (awake,) = deployed(shared)[CHEAP]["places"]
    wait_until(lambda: deployed(shared)[CHEAP]["state"] == "asleep" or None, "its sleep", 60)
    (asleep,) = deployed(shared)[CHEAP]["places"]
    assert asleep["replica_id"] == awake["replica_id"]
    used = [entry["model"] for o in shared.get("/offers") for g in o["gpus"] for entry in g["used"]]
    assert CHEAP not in used
    assert CHEAP in [model.id for model in tenant.client().models.list().data]
    ((_, second),) = asked(tenant, 1, model=CHEAP, max_tokens=3)
    texts = [body.choices[0].message.content for body in (first, second)]
    assert texts == ["0 0 0 ", "1 1 1 "]  # it counts its sleeps: it is the same engine
    woken = f"{CHEAP}/sleepy/logical/asleep"
    wait_until(lambda: woken in shared.status()["scheduler"]["start_s"], "its measured start")
    shared.cli("undeploy", CHEAP, "--yes")


def deployed(market):
    """Deployments by model."""
    return {deployment["model"]: deployment for deployment in market.get("/deployments")}


def test_idle_time_of_a_lease_is_sold_and_taken_back_in_the_middle_of_an_answer(shared):
    """The buyer's text is the one it would have been; the holder is served at once, and earns."""
    for model in FOUR[2:]:
        shared.cli("undeploy", model, "--yes")
    shared.cli("deploy", MODEL, "--replicas", "0:1", "--keep-alive", "2s")
    wait_until(lambda: pool_of(shared)["state"] == "cold" or None, "the pool's sleep", 120)
    lender, buyer = shared.tenant(), shared.tenant()
    lease = ("--mode", "lease", "--gpus", "0.36", "--term", "1h", "--resale")
    deployed = shared.cli("deploy", MODEL, *lease, "--tenant", lender.name)
    lease_id = deployed["lease"]["lease_id"]
    wait_until(lambda: shared.lease(lease_id)["state"] == "active" or None, "the lease", 120)
    asked(lender, 1)  # so the gateway knows of the lease: else the pool may be sooner
    long = {"max_tokens": 1800, "temperature": 0}
    ((first, whole),) = asked(buyer, 1, **long)
    assert first["x-market-lane"] == "tokens"
    # A report may have caught the request before its replica had it.
    wait_until(lambda: pool_of(shared)["state"] == "cold" or None, "the pool's sleep")

    client = buyer.client()
    messages = [{"role": "user", "content": "What is a list?"}]
    for tries in range(2, 7):
        text, own = "", None
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, extra_body={"ignore_eos": True}, **long
        )
        with ThreadPoolExecutor(1) as thread:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if own is None and text:  # long answers, so that the lease is not idle again soon
                    own = thread.submit(asked, lender, 3, max_tokens=1800)
            for headers, _ in own.result():
                shown = headers["x-market-lane"], headers["x-market-lease-id"]
                assert shown == ("lease", lease_id)
        assert text == whole.choices[0].message.content
        rows = buyer.rows(tries).sort_values("lsn")
        lent_by = [dict(row).get("lent_by") for row in rows["attrs"]]
        if lent_by[-1] is None:  # else it was over, on a busy machine, before the holder asked
            break
    assert lent_by == [lender.name] * (tries - 1) + [None]
    assert set(rows["output_tokens"]) == {1800}
    assert rows["charge"].nunique() == 1
    assert Decimal(buyer.balance()["balance"]) == 10 - rows["charge"].sum()
    month = rows["booked_at"].iloc[0].strftime("%Y-%m")
    settled = shared.cli("settle", "--period", month, "--dry-run")
    assert Decimal(settled["share"]) == rows["charge"].iloc[:-1].sum() * Decimal("0.45")


def pool_of(market):
    (found,) = (
        d for d in market.get("/deployments") if d["model"] == MODEL and d["mode"] == "tokens"
    )
    return found
