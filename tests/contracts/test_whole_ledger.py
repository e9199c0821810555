"""The ledger's whole life on both databases: book, seal, compact, refund, settle, verify."""

import contextlib

import pytest

from market.config import Config
from market.fakes import FakeClock
from market.ledger.refunds import Refund
from market.ledger.schema import encode_batch
from market.ledger.service import Ledger
from market.ledger.statement import Party
from market.pricing import to_decimal
from tests.contracts.test_ledger import CHARGE, record
from tests.samples import CARD, deposit, hold_request

DAY = 86_400


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request, tmp_path):
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    return Config(tmp_path, "http://127.0.0.1:1", url)


@contextlib.asynccontextmanager
async def opened(config, clock):
    fatal = []
    ledger = Ledger(config, clock, on_fatal=lambda: fatal.append(1))
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()
        assert not fatal


async def serve(ledger, epoch, first_seq, count):
    amount = count * CHARGE
    hold = hold_request(
        f"slice-{epoch}-{first_seq}", epoch=epoch, wanted_pico=amount, minimum_pico=amount
    )
    await ledger.open_hold(hold)
    names = [f"req-{epoch}-{first_seq + n}" for n in range(count)]
    payload = encode_batch([record(hold, request_id=name) for name in names])
    seq = await ledger.append("gw0", epoch, first_seq, payload)
    await ledger.end_hold("gw0", epoch, hold.hold_id)
    return seq


async def test_books_files_log_and_settlement_agree_to_the_end(config):
    clock = FakeClock()
    async with opened(config, clock) as ledger:
        await ledger.create_tenant("acme")
        await ledger.create_provider("local")
        await ledger.add_rate_cards([CARD], only_new_models=False)
        await ledger.transfer(deposit("10"))
        epoch = await ledger.register_producer("gw0")
        seq = 0
        for _ in range(3):
            seq = await serve(ledger, epoch, seq, 4)
            await ledger.publish()
        clock.advance(DAY)
        assert len(await ledger.compact()) == 2  # usage and transfers of the first day
        await serve(ledger, epoch, seq, 2)
        await ledger.refund(Refund("r1", "acme", "bad", "key-op", f"req-{epoch}-0"))
        assert (await ledger.verify())["finding"] is None
    clock.advance(40 * DAY)
    async with opened(config, clock) as ledger:
        await ledger.register_producer("gw0")
        await ledger.keep_house()
        first = await ledger.settle("2026-11", "key-op")
        assert first["charge"] == str(to_decimal(13 * CHARGE).normalize())
        assert await ledger.settle("2026-11", "key-op") == first | {"created": False}
        assert (await ledger.verify())["finding"] is None
        statement = await ledger.statement(Party.TENANT, "acme", "2026-11")
        assert statement.closing == to_decimal((await ledger.balance("acme")).balance_pico)
        proof = await ledger.prove(f"req-{epoch}-5")
        assert proof["part"]["rows"] == 4
    async with opened(config, clock) as ledger:
        assert (await ledger.verify())["finding"] is None
