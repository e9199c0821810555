"""Fill the disk under a ledger, several times, and see it refuse and recover. Run by a test."""

import asyncio
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from market.clock import SystemClock
from market.config import Config
from market.errors import Overloaded
from market.ledger import service
from market.ledger.producer import Producer
from market.pricing import charge
from market.types import FinishReason, TokenCounts, UsageRecord
from tests.samples import CARD, deposit, hold_request, token_record

COUNTS = TokenCounts(100, 0, 10)
ROUNDS = 3


def fill(ballast: Path) -> None:
    """Take every block there is."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**16, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)


async def main(home: Path) -> None:
    service.RESERVE_BYTES = 2**20
    service.ROOM_CHECK_S = 0.0
    fatal = []
    config = Config(home / "market", "http://127.0.0.1:1")
    ledger = service.Ledger(config, SystemClock(), on_fatal=lambda: fatal.append(1))
    await ledger.open()
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.transfer(deposit("10"))
    producer = Producer(ledger, "gw0", config.spool_dir)
    await producer.start()
    each = charge(COUNTS, CARD, FinishReason.STOP, hold_request().lane)
    wanted = {"wanted_pico": each, "minimum_pico": each}
    accepted = []

    async def serve() -> UsageRecord:
        epoch = producer.identity()[1]
        request_id = producer.next_request_id()
        request = hold_request(f"slice-{request_id}", epoch=epoch, **wanted)
        result = await ledger.open_hold(request)
        assert result.hold is not None
        return token_record(
            request,
            request_id=request_id,
            counts=COUNTS,
            finished_at=datetime.now(UTC),
            charge_pico=each,
            finish_reason=FinishReason.STOP,
        )

    for _ in range(ROUNDS):
        under_way = [await serve() for _ in range(20)]
        ballast = home / "ballast"
        fill(ballast)
        recording = [asyncio.create_task(producer.record(record)) for record in under_way]
        with pytest.raises(Overloaded) as refused:
            await serve()
        assert refused.value.code == "storage_full"
        with suppress(OSError, Overloaded):
            await ledger.publish()
        await asyncio.sleep(0.3)  # let the loops run into the wall
        ballast.unlink()
        accepted += await asyncio.gather(*recording)
        accepted.append(await producer.record(await serve()))
    await producer.stop()
    await ledger.publish()
    usage = pd.read_parquet(config.ledger_dir / "usage")
    assert sorted(usage["request_id"]) == sorted(r.request_id for r in accepted)
    account = await ledger.balance("acme")
    assert account.balance_pico == 10**13 - each * len(accepted)
    for hold in await ledger.open_holds():
        await ledger.end_hold("gw0", producer.epoch, hold.request.hold_id)
    assert (await ledger.balance("acme")).held_pico == 0
    report = await ledger.verify()
    assert report["finding"] is None, report
    await ledger.close()
    assert not fatal, "the full disk ended the process"
    print("ok", len(accepted))


asyncio.run(main(Path(sys.argv[1])))
