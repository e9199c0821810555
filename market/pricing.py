"""Usage x rate card -> charge; request -> the most it can cost. Exact integers, no rounding.

Prices are quoted per million tokens with at most six decimals, so a price per token is a whole
number of pico units and every token charge is exact.
"""

import hashlib
from datetime import UTC, datetime
from decimal import Context, Decimal, InvalidOperation

from market.errors import InvalidRequest
from market.types import CURRENCY, FinishReason, Lane, RateCard, TokenCounts

PICO = 10**12
TOKENS_PER_PRICE = 10**6
MAX_DECIMALS = 6
MONEY_TEXT_MAX = 60
# Decimal's default context would round amounts of more than 28 digits.
_WIDE = Context(prec=80)
GPU_US_PER_HOUR = 3_600 * 10**6
FIRST_BLOCK_TOKENS = 256

# The price of records that sell nothing: corrections, and what stands for a refused record.
NO_PRICE = RateCard("none", "", 0, 0, 0, CURRENCY, datetime(1970, 1, 1, tzinfo=UTC))

_BILLED = frozenset(
    {FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS, FinishReason.BUDGET}
)


def parse_money(text: str | int | Decimal, what: str = "amount") -> int:
    """An amount of the currency as pico units.

    Raises InvalidRequest if it is no number, has more than 12 decimals or is out of range.
    """
    if isinstance(text, str) and len(text) > MONEY_TEXT_MAX:
        raise InvalidRequest(f"{what}: {text[:MONEY_TEXT_MAX]!r}... is too long for an amount")
    try:
        amount = Decimal(text)
    except (InvalidOperation, TypeError, ValueError):
        raise InvalidRequest(f"{what}: {text!r} is not a number, e.g. 10 or 2.50") from None
    if not amount:
        return 0
    # The exponent is looked at first: to compute with a large one overflows.
    if not amount.is_finite() or amount.adjusted() > 15 or abs(amount) > 10**15:
        raise InvalidRequest(f"{what}: {text} is out of range (at most 10^15)")
    scaled = _WIDE.scaleb(amount, 12)
    if not scaled or scaled != scaled.to_integral_value():
        raise InvalidRequest(f"{what}: {text} has more than 12 decimals")
    return int(scaled)


def format_money(pico: int) -> str:
    """Pico units as an exact decimal without trailing zeros: 1500000000000 -> '1.5'."""
    sign = "-" if pico < 0 else ""
    whole, fraction = divmod(abs(pico), PICO)
    digits = f"{fraction:012d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def to_decimal(pico: int) -> Decimal:
    """Pico units as a Decimal with 12 places, the form of the Parquet columns."""
    return _WIDE.scaleb(Decimal(pico), -12)


def to_pico(amount: Decimal) -> int:
    """The reverse of ``to_decimal``."""
    return int(_WIDE.scaleb(amount, 12))


def parse_price(text: str | int | Decimal, what: str) -> int:
    """A price per million tokens as pico units per token.

    Raises InvalidRequest for negative prices and for more than six decimals.
    """
    pico = parse_money(text, what)
    if pico < 0:
        raise InvalidRequest(f"{what}: a price cannot be negative, got {text}")
    per_token, rest = divmod(pico, TOKENS_PER_PRICE)
    if rest:
        raise InvalidRequest(f"{what}: {text} has more than {MAX_DECIMALS} decimals per million")
    return per_token


def format_price(pico_per_token: int) -> str:
    """Pico units per token as a price per million tokens: 150000 -> '0.15'."""
    return format_money(pico_per_token * TOKENS_PER_PRICE)


def make_rate_card(
    model: str,
    prices: tuple[int, int, int],
    valid_from: datetime,
    currency: str,
    gpu_hour_pico: int = 0,
) -> RateCard:
    """A rate card whose id is a hash of its content; ``prices`` = (input, cached, output)."""
    when = valid_from.astimezone(UTC).isoformat()
    content = "\n".join((model, *map(str, prices), currency, when, str(gpu_hour_pico)))
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return RateCard(f"price-{digest}", model, *prices, currency, valid_from, gpu_hour_pico)


def token_cost(counts: TokenCounts, card: RateCard) -> int:
    """What these tokens cost, in pico units. Raises ValueError on impossible counts."""
    fresh = counts.input_tokens - counts.cached_input_tokens
    if fresh < 0 or counts.cached_input_tokens < 0 or counts.output_tokens < 0:
        raise ValueError(f"impossible token counts: {counts}")
    return (
        fresh * card.input_pico
        + counts.cached_input_tokens * card.cached_input_pico
        + counts.output_tokens * card.output_pico
    )


def is_billed(finish_reason: FinishReason | None, output_tokens: int) -> bool:
    """The billing rules of the README's table.

    An answer cut off by the client is billed once the prompt was prefilled; the evidence of that
    is the first output token.
    """
    if finish_reason is FinishReason.CLIENT_DISCONNECT:
        return output_tokens > 0
    return finish_reason in _BILLED


def charge(
    counts: TokenCounts, card: RateCard, finish_reason: FinishReason | None, lane: Lane
) -> int:
    """The tenant's charge for one response, in pico units."""
    if lane is Lane.LEASE or not is_billed(finish_reason, counts.output_tokens):
        return 0
    return token_cost(counts, card)


def gpu_charge(before_us: int, segment_us: int, gpu_hour_pico: int) -> int:
    """Charge of a lease's next segment after ``before_us`` micro-GPU-seconds of it, in pico units.

    The floor of the cumulative price less the floor before: the segments' sum is exact to the
    last digit however the time is cut. Raises ValueError on negative times.
    """
    if before_us < 0 or segment_us < 0:
        raise ValueError(f"impossible GPU time: {before_us} + {segment_us}")
    until = (before_us + segment_us) * gpu_hour_pico // GPU_US_PER_HOUR
    return until - before_us * gpu_hour_pico // GPU_US_PER_HOUR


def gpu_ceiling(gpu_us: int, gpu_hour_pico: int) -> int:
    """The most that segments of so many micro-GPU-seconds in all can cost, in pico units."""
    return -(-gpu_us * gpu_hour_pico // GPU_US_PER_HOUR)


def gpu_affordable(amount_pico: int, gpu_hour_pico: int) -> int:
    """Micro-GPU-seconds whose ceiling is at most ``amount_pico``; the price must not be 0."""
    return amount_pico * GPU_US_PER_HOUR // gpu_hour_pico


def gpu_rate_card(
    offer_id: str, ask_pico: int, valid_from: datetime, currency: str = CURRENCY
) -> RateCard:
    """The price of an offer's GPU time."""
    return make_rate_card(f"offer:{offer_id}", (0, 0, 0), valid_from, currency, ask_pico)


def fee(charge_pico: int, fee_bps: int) -> int:
    """The market's share of a settlement line, rounded half-even to a pico unit."""
    whole, rest = divmod(charge_pico * fee_bps, 10_000)
    return whole + (rest > 5_000 or (rest == 5_000 and whole % 2 == 1))


def ceiling(input_tokens: int, output_tokens: int, card: RateCard) -> int:
    """The most such a request can cost: nothing of it cached, every output token used.

    A cached price above the plain one would break the bound, so the dearer of both counts.
    """
    dearest = max(card.input_pico, card.cached_input_pico)
    return input_tokens * dearest + output_tokens * card.output_pico


def affordable_output(held_pico: int, input_tokens: int, card: RateCard) -> int | None:
    """Output tokens that ``held_pico`` still covers after the input; None means any number."""
    rest = held_pico - ceiling(input_tokens, 0, card)
    if card.output_pico == 0:
        return None
    return max(0, rest // card.output_pico)
