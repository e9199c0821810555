"""Any mix of requests, engines and hang-ups: one record per admitted request, no hold stays."""

import asyncio
from contextlib import aclosing

from hypothesis import given, settings
from hypothesis import strategies as st

from market.errors import MarketError
from market.fakes import FakeEngine
from tests.gateways import Gateway, prepared

requests = st.fixed_dictionaries(
    {
        "max_tokens": st.one_of(st.none(), st.integers(1, 600)),
        "prompt": st.integers(1, 700),
        "answers": st.integers(1, 3),
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
    ledger = await prepared(f"{balance_pico / 10**12:.12f}" if balance_pico else "0")
    here = await Gateway(FakeEngine(), ledger).start()
    admitted = []

    async def one(request):
        engine = FakeEngine(
            stop_after=request["stop_after"],
            cached_input_tokens=request["cached"],
            fail_at=request["fail_at"],
            failures=request["failures"],
        )
        try:
            admission = await here.ask(
                request["max_tokens"],
                prompt=tuple(range(request["prompt"])),
                answers=request["answers"],
            )
            engines[admission.request_id] = engine
            admitted.append(admission.request_id)
            async with aclosing(here.inference.stream(admission)) as events:
                seen = 0
                async for _ in events:
                    seen += 1
                    if seen == request["hang_up_after"]:
                        break
        except MarketError:
            pass

    engines = {}
    here.routes._engine = Switch(engines)
    await asyncio.gather(*map(one, asked))
    await here.rest()
    account = await ledger.balance("acme")
    assert account.held_pico == 0
    assert account.balance_pico >= 0
    assert sorted(record.request_id for record in ledger.records) == sorted(admitted)
    charged = sum(record.charge_pico for record in ledger.records)
    assert account.balance_pico == balance_pico - charged


class Switch:
    """Each request's own engine behind one route."""

    def __init__(self, engines):
        self._engines = engines

    def generate(self, request, credit):
        name = request.request_id.rsplit("-", 2)[0]
        return self._engines[name].generate(request, credit)
