"""Any mix of requests, engines and hang-ups: one record per admitted request, no hold stays."""

import asyncio
from contextlib import aclosing

from hypothesis import given, settings
from hypothesis import strategies as st

from market.errors import MarketError
from market.fakes import DirectSink, FakeClock, FakeEngine, FakeRoutes, MemoryLedger
from market.inference import Inference
from market.types import Sampling
from tests.samples import ACME, CARD, ROUTE, deposit

requests = st.fixed_dictionaries(
    {
        "max_tokens": st.one_of(st.none(), st.integers(1, 600)),
        "prompt": st.integers(1, 700),
        "stop_after": st.one_of(st.none(), st.integers(1, 40)),
        "fail_at": st.one_of(st.none(), st.integers(0, 20)),
        "failures": st.integers(0, 3),
        "cached": st.integers(0, 800),
        "hang_up_after": st.one_of(st.none(), st.integers(0, 10)),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, max_size=8), st.integers(0, 3 * 10**8))
def test_books_are_right_afterwards(asked, balance):
    asyncio.run(serve(asked, balance))


async def serve(asked, balance_pico):
    ledger = MemoryLedger(FakeClock())
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    if balance_pico:
        await ledger.transfer(deposit(f"{balance_pico / 10**12:.12f}"))
    sink = DirectSink(ledger)
    await sink.start()
    admitted = []

    async def one(request):
        engine = FakeEngine(
            stop_after=request["stop_after"],
            cached_input_tokens=request["cached"],
            fail_at=request["fail_at"],
            failures=request["failures"],
        )
        routes = FakeRoutes(ROUTE, CARD, engine)
        inference = Inference(FakeClock(), ledger, sink, routes)
        try:
            admission = await inference.admit(
                ACME, ROUTE, tuple(range(request["prompt"])), Sampling(request["max_tokens"])
            )
            admitted.append(admission.request_id)
            async with aclosing(inference.stream(admission)) as events:
                seen = 0
                async for _ in events:
                    seen += 1
                    if seen == request["hang_up_after"]:
                        break
        except MarketError:
            pass
        await inference.drain()

    await asyncio.gather(*map(one, asked))
    account = await ledger.balance("acme")
    assert account.held_pico == 0
    assert account.balance_pico >= 0
    assert sorted(record.request_id for record in ledger.records) == sorted(admitted)
    charged = sum(record.charge_pico for record in ledger.records)
    assert account.balance_pico == balance_pico - charged
