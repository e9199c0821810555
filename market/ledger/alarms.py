"""What may be losing money: checks of the last day's rows, the books and the sealing."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from market.ledger.snapshot import Snapshot

WINDOW = timedelta(days=1)
SETTLE_DOWN = timedelta(minutes=1)
CAPTURE_MIN = 0.999
PUBLISH_LAG_MAX_S = 120.0

# A replica says now and then how many tokens it has delivered in all; the rows that were finished
# a while ago must hold as many.
_CAPTURE = """
WITH rows AS (
    SELECT attrs['replica'] AS replica, output_tokens, finished_at,
        TRY_CAST(attrs['served_tokens'] AS BIGINT) AS served
    FROM usage WHERE kind = 'tokens' AND attrs IS NOT NULL AND booked_at >= $since
)
SELECT replica, max(served) FILTER (finished_at < $settled) AS served,
    CAST(sum(output_tokens) AS BIGINT) AS recorded
FROM rows WHERE replica IS NOT NULL GROUP BY replica HAVING served > 0 ORDER BY replica
"""
_CLAIMS = """
SELECT provider_id, count(*) FROM usage
WHERE kind = 'tokens' AND claimed_output_tokens IS NOT NULL AND booked_at >= $since
    AND claimed_output_tokens <> output_tokens AND finish_reason <> 'client_disconnect'
GROUP BY provider_id ORDER BY provider_id
"""
_FREE = """
SELECT count(*) FROM usage JOIN rate_cards USING (price_id)
WHERE kind = 'tokens' AND charge = 0 AND lane <> 'lease' AND booked_at >= $since
    AND finish_reason IN ('stop', 'length', 'tool_calls', 'budget')
    AND input_tokens * input_pico + output_tokens * output_pico > 0
"""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something an operator should look into; ``about`` is what it concerns."""

    name: str
    about: str
    detail: str


@dataclass(frozen=True, slots=True)
class Watch:
    """What the last look found. ``capture`` is recorded / delivered tokens per replica."""

    alarms: tuple[Alarm, ...] = ()
    capture: tuple[tuple[str, float], ...] = ()


def look(snapshot: Snapshot, now: datetime, numbers: dict[str, Any]) -> Watch:
    """Check the last day; ``numbers`` are those of the ledger's status."""
    parameters = {"since": now - WINDOW}
    alarms = []
    with snapshot.connect() as connection:
        captured = connection.execute(
            _CAPTURE, parameters | {"settled": now - SETTLE_DOWN}
        ).fetchall()
        claims = connection.execute(_CLAIMS, parameters).fetchall()
        free = connection.execute(_FREE, parameters).fetchone()
    capture = tuple((replica, recorded / served) for replica, served, recorded in captured)
    for replica, served, recorded in captured:
        if recorded < served * CAPTURE_MIN:
            alarms.append(
                Alarm(
                    "tokens_without_record",
                    replica,
                    f"delivered {served} tokens, of which {recorded} are on record",
                )
            )
    for provider_id, count in claims:
        detail = f"{count} requests where the replica claims another count than the gateway's"
        alarms.append(Alarm("claim_differs", provider_id, detail))
    if free is not None and free[0]:
        alarms.append(Alarm("tokens_for_free", "usage", f"{free[0]} finished requests, charge 0"))
    alarms += _of_numbers(numbers)
    return Watch(tuple(alarms), capture)


def _of_numbers(numbers: dict[str, Any]) -> list[Alarm]:
    alarms = []
    if numbers["stale_holds"]:
        detail = f"{numbers['stale_holds']} slices hold money for hours, though gateways renew them"
        alarms.append(Alarm("stale_holds", "holds", detail))
    if numbers["publish_lag_s"] > PUBLISH_LAG_MAX_S:
        detail = f"rows wait for {numbers['publish_lag_s']:.0f} s to be published"
        alarms.append(Alarm("publish_lag", "ledger", detail))
    return alarms
