"""``/metrics`` counts what is recorded and shows how the ledger is."""

import pytest

from market.config import Config
from market.errors import NotFound
from market.fakes import DirectSink, FakeClock, MemoryLedger
from market.ledger.sealing import CHECKPOINT_EVERY
from market.types import FinishReason, Lane
from serve_apps.live import LiveRoutes
from serve_apps.metrics import CountingSink, Metrics
from tests.contracts.test_ledger import CHARGE, record
from tests.samples import CARD, NOON, deposit, hold_request
from tests.unit.test_ledger_files import Box

STATUS = {
    "publish_lag_s": 1.5,
    "next_lsn": 8,
    "has_room": True,
    "open_holds": 2,
    "stale_holds": 1,
    "held_pico": 5 * 10**11,
    "alarms": [{"name": "stale_holds", "about": "holds", "detail": ""}],
    "capture_ratio": {"a": 0.5},
}


async def test_recorded_tokens_and_charges_are_counted_once_they_are_safe():
    ledger, metrics = MemoryLedger(FakeClock()), Metrics()
    await ledger.create_tenant("acme")
    await ledger.create_provider("local")
    await ledger.add_rate_cards([CARD], only_new_models=False)
    await ledger.transfer(deposit("10"))
    inside = DirectSink(ledger)
    await inside.start()
    sink = CountingSink(inside, metrics)
    hold = hold_request("r", wanted_pico=CHARGE, minimum_pico=CHARGE)
    await ledger.open_hold(hold)
    await sink.record(record(hold))
    with pytest.raises(Exception, match="has only 0 left"):
        await sink.record(record(hold))
    page = metrics.page(STATUS, [], NOON).decode()
    labels = 'lane="tokens",model="tiny",provider="local"'
    assert f'market_tokens_total{{kind="output",{labels}}} 10.0' in page
    assert f'market_tokens_total{{kind="cached_input",{labels}}} 40.0' in page
    assert f'market_requests_total{{model="tiny",reason="{FinishReason.STOP}"}} 1.0' in page


def test_spills_are_counted_by_reason():
    metrics, hold = Metrics(), hold_request("r", lane=Lane.SPILL)
    for reason in ("ttft", "queue", "ttft"):
        metrics.observe(record(hold, attrs=(("lane_reason", reason),)))
    metrics.observe(record(hold_request("r")))
    page = metrics.page(STATUS, [], NOON).decode()
    assert 'market_spills_total{reason="ttft"} 2.0' in page
    assert 'market_spills_total{reason="queue"} 1.0' in page


def test_state_of_the_ledger_is_shown():
    page = Metrics().page(STATUS, [], NOON).decode()
    for line in (
        "market_ledger_lag_seconds 1.5",
        "market_ledger_rows 7.0",
        "market_holds_stale 1.0",
        'market_hold{currency="USD",state="pending"} 0.5',
        'market_alarm{about="holds",name="stale_holds"} 1.0',
        'market_capture_ratio{replica="a"} 0.5',
    ):
        assert line in page


async def test_model_without_a_price_is_an_alarm(tmp_path, caplog):
    class NoPrices:
        async def rate_card(self, _model):
            return None

    metrics = Metrics()
    config = Config(tmp_path, "http://127.0.0.1:1")
    routes = LiveRoutes(config, None, NoPrices(), dict, None, metrics.unpriced)
    with pytest.raises(NotFound, match="no price"):
        await routes.rate_card("tiny")
    page = metrics.page(STATUS, [], NOON).decode()
    assert 'market_unpriced_requests_total{model="tiny"} 1.0' in page
    assert any("ALARM unpriced model: tiny" in message for message in caplog.messages)


async def test_checkpoint_is_signed_once_an_hour(tmp_path):
    box = Box(tmp_path)

    def notes():
        return sorted(path.name for path in (box.config.proof_dir / "checkpoints").iterdir())

    async with box.open() as ledger:
        await box.prepare(ledger)
        for minutes, signed in ((0, 1), (59, 1), (1, 2)):
            box.clock.advance(60 * minutes)
            await box.serve(ledger)
            await ledger.publish()
            await ledger.keep_house()
            assert len(notes()) == signed
        assert CHECKPOINT_EVERY.total_seconds() == 3600
