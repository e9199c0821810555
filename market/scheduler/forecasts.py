"""What pools are usually asked at this time of day, out of the ledger's own history."""

import asyncio
import logging
from datetime import timedelta

from market import forecast
from market.autoscaling import Costs, keep_alive_s
from market.errors import MarketError
from market.forecast import BUCKET_S, DAYS, Bucket, Expected, History
from market.scheduler.core import Core
from market.types import Bounds

logger = logging.getLogger(__name__)

REFRESH_S = 300.0
RETRY_S = 10.0


class Forecasts:
    """Histories by model, fetched now and then; without them nothing is forecast."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._histories: dict[str, History] = {}

    async def watch_forever(self) -> None:
        """Fetch again before a bucket is over."""
        while True:
            try:
                await self.refresh()
            except MarketError as error:
                logger.warning("no forecast: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("no forecast")
                await asyncio.sleep(REFRESH_S)
            else:
                await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Ask the ledger what was asked in the last days."""
        since = self._core.clock.now() - timedelta(days=DAYS, seconds=BUCKET_S)
        rows = await self._core.ledger.arrivals(since)
        found: dict[str, dict[int, Bucket]] = {}
        for model, bucket, requests, busy_s in rows:
            found.setdefault(model, {})[bucket] = Bucket(requests, busy_s)
        self._histories = {m: History(min(buckets), buckets) for m, buckets in found.items()}

    def ahead(self, model: str, idle_s: float, costs: Costs, *, is_there: bool) -> int:
        """How many replicas the time of day asks for."""
        history = self._histories.get(model)
        if history is None:
            return 0
        now_s = self._core.clock.now().timestamp()
        places = self._core.config.sequences
        return forecast.replicas_ahead(history, now_s, idle_s, costs, places, is_there=is_there)

    def stretch(self, model: str, bounds: Bounds, costs: Costs) -> float:
        """By how much the time of day makes an idle pool's keep-alive longer or shorter."""
        history = self._histories.get(model)
        if history is None:
            return 1.0
        now_s = self._core.clock.now().timestamp()
        return forecast.stretch(history, now_s, keep_alive_s(bounds, costs))

    def expect(self, model: str, within_s: float) -> Expected:
        """What is usual so soon."""
        history = self._histories.get(model)
        if history is None:
            return forecast.NOTHING
        bucket = int((self._core.clock.now().timestamp() + within_s) // BUCKET_S)
        return history.expect(bucket)
