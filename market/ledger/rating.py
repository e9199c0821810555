"""Usage batches against their prices, a batch at a time: the ledger's and the auditor's check.

The rules are those of market.pricing, here over numpy columns; a property test holds the two to
each other. Integers of 64 bits where they suffice, Python's own where they do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from market.errors import InvalidRequest
from market.pricing import NO_PRICE, format_money, is_billed
from market.types import FinishReason, Lane, RateCard, RecordKind

Ints = npt.NDArray[Any]
_SAFE = 2**62


@dataclass(frozen=True, slots=True)
class BadRow:
    """The first row that breaks a rule: its place in the batch and why."""

    index: int
    reason: str


def check_tokens(batch: pa.RecordBatch, cards: Mapping[str, RateCard]) -> BadRow | None:
    """Re-rate every row of kind ``tokens``; None if all charges follow from their price."""
    token_rows = pc.equal(batch["kind"], RecordKind.TOKENS)
    if not pc.all(token_rows, min_count=0).as_py():
        places = np.flatnonzero(token_rows.to_numpy(zero_copy_only=False))
        found = _check(batch.take(pa.array(places)), cards)
        return found and BadRow(int(places[found.index]), found.reason)
    return _check(batch, cards)


def require_tokens(batch: pa.RecordBatch, cards: Mapping[str, RateCard]) -> None:
    """Raises InvalidRequest for an unknown price or a charge that does not follow from it."""
    bad = check_tokens(batch, cards)
    if bad is not None:
        raise InvalidRequest(f"{batch['request_id'][bad.index].as_py()}: {bad.reason}")


def _check(batch: pa.RecordBatch, cards: Mapping[str, RateCard]) -> BadRow | None:
    if batch.num_rows == 0:
        return None
    prices = batch["price_id"].dictionary_encode()
    used = [cards.get(price_id) for price_id in prices.dictionary.to_pylist()]
    codes = prices.indices.to_numpy()
    currencies = batch["currency"].dictionary_encode()
    known = np.array([card is not None for card in used])
    if not known.all() or len(currencies.dictionary) != 1:
        return _unknown_price(batch, cards, known[codes])
    currency = currencies.dictionary[0].as_py()
    foreign = np.array([card.currency != currency for card in used if card])[codes]
    if foreign.any():
        index = int(np.argmax(foreign))
        return BadRow(index, f"price and charge are in different currencies ({currency})")
    fresh, cached, output = token_columns(batch)
    if min(int(fresh.min()), int(cached.min()), int(output.min())) < 0:
        index = int(np.flatnonzero((fresh < 0) | (cached < 0) | (output < 0))[0])
        return BadRow(index, "impossible token counts")
    if NO_PRICE in used:
        unpriced = np.array([card == NO_PRICE for card in used])[codes]
        index = int(np.argmax(unpriced & (fresh + cached + output > 0)))
        if unpriced[index] and int(fresh[index] + cached[index] + output[index]) > 0:
            return BadRow(index, "tokens without a price")
    rates = [(c.input_pico, c.cached_input_pico, c.output_pico) for c in used if c]
    dearest = max(max(rate) for rate in rates)
    most = int(fresh.max()) + int(cached.max()) + int(output.max())
    whole = max(most, 1) * dearest >= _SAFE
    charges = money_column(batch["charge"], whole)
    table = np.array(rates, dtype=object if charges.dtype == object else np.int64)
    if charges.dtype == object:
        fresh, cached, output = (column.astype(object) for column in (fresh, cached, output))
    row_rates = table[codes]
    expected = fresh * row_rates[:, 0] + cached * row_rates[:, 1] + output * row_rates[:, 2]
    expected = np.where(_billed(batch, output), expected, 0)
    wrong = np.flatnonzero(charges != expected)
    if len(wrong) == 0:
        return None
    index = int(wrong[0])
    return BadRow(
        index,
        f"charge {format_money(int(charges[index]))} does not follow from "
        f"{batch['price_id'][index].as_py()}: {format_money(int(expected[index]))}",
    )


def _unknown_price(
    batch: pa.RecordBatch, cards: Mapping[str, RateCard], known: npt.NDArray[np.bool_]
) -> BadRow | None:
    """Name an unknown price; several currencies in one batch are checked one by one."""
    if not known.all():
        index = int(np.flatnonzero(~known)[0])
        return BadRow(index, f"unknown price {batch['price_id'][index].as_py()}")
    for currency in batch["currency"].unique():
        places = np.flatnonzero(pc.equal(batch["currency"], currency).to_numpy(False))
        found = _check(batch.take(pa.array(places)), cards)
        if found:
            return BadRow(int(places[found.index]), found.reason)
    return None


def token_columns(batch: pa.RecordBatch) -> tuple[Ints, Ints, Ints]:
    """(uncached input, cached input, output) tokens as int64 arrays."""
    cached = batch["cached_input_tokens"].to_numpy()
    return batch["input_tokens"].to_numpy() - cached, cached, batch["output_tokens"].to_numpy()


def money_column(column: pa.Array, whole: bool = False) -> Ints:
    """A decimal128 column as pico units: int64 if all fit and ``whole`` is false, else objects."""
    words = np.frombuffer(column.buffers()[1], dtype="<i8").reshape(-1, 2)
    words = words[column.offset : column.offset + len(column)]
    low, high = words[:, 0], words[:, 1]
    if not whole and bool((high == low >> 63).all()):
        return low
    unsigned = low.astype(object) % 2**64
    whole_numbers: Ints = high.astype(object) * 2**64 + unsigned
    return whole_numbers


def money_sum(column: pa.Array) -> int:
    """Sum of a decimal128 column in pico units, exact: words are added by halves."""
    words = np.frombuffer(column.buffers()[1], dtype="<u8").reshape(-1, 2)
    words = words[column.offset : column.offset + len(column)]
    low, high = words[:, 0], words[:, 1].view("<i8")
    lower, upper = int((low & np.uint64(0xFFFFFFFF)).sum()), int((low >> np.uint64(32)).sum())
    return lower + (upper << 32) + (int(high.sum()) << 64)


def _billed(batch: pa.RecordBatch, output: Ints) -> npt.NDArray[np.bool_]:
    """Row by row what ``pricing.charge`` decides before it multiplies."""
    reasons = batch["finish_reason"].dictionary_encode(null_encoding="encode")
    names = [
        None if name is None else FinishReason(name) for name in reasons.dictionary.to_pylist()
    ]
    codes = reasons.indices.to_numpy()
    with_output = np.array([is_billed(name, 1) for name in names])[codes]
    without = np.array([is_billed(name, 0) for name in names])[codes]
    lanes = batch["lane"].dictionary_encode()
    paid_lane = np.array([name != Lane.LEASE for name in lanes.dictionary.to_pylist()])
    billed: npt.NDArray[np.bool_] = np.where(output > 0, with_output, without)
    paid: npt.NDArray[np.bool_] = paid_lane[lanes.indices.to_numpy()]
    return billed & paid
