"""What people write is read at once, or refused in words: whatever it is."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from market import pricing, when
from market.errors import InvalidRequest
from serve_apps.fleet_bodies import parse_gpus
from tests.samples import NOON

READERS = [
    lambda text: when.duration(text, "term"),
    lambda text: when.moment(text, NOON, "start"),
    lambda text: when.moment(text, NOON, "since", past=True),
    when.month,
    pricing.parse_money,
    lambda text: pricing.parse_price(text, "input_price"),
    parse_gpus,
]
likely = st.text("0123456789smhdw.:+-_eETZWNaIn/ ", max_size=200)


@pytest.mark.parametrize("read", READERS)
@given(st.text(max_size=200) | likely)
@example("1e999990")
@example("1e999999")
@example("0e-999999999")
@example("9" * 200)
@example("9" * 199 + "d")
@example("999999999999d")
@example("1d" * 100)
@example("0001-01-01T00:00+23:59")
@example("9999-12-31T23:59-23:59")
@example("9999-12")
@example("0000-01")
@example("\ud800")
def test_any_text_is_read_or_refused(read, text):
    with contextlib.suppress(InvalidRequest):
        read(text)


@given(st.integers(1, 64), st.integers(1, 1000))
def test_gpus_are_read_exactly(count, milli):
    assert parse_gpus(str(count)) == (count, 1000)
    assert parse_gpus(f"{milli / 1000:.3f}") == (1, milli)


@given(st.integers(0, when.DURATION_MAX_S // 86_400), st.integers(0, 23))
def test_durations_are_read_exactly(days, hours):
    assert when.duration(f"{days}d", "term") == days * 86_400
    if days:
        assert when.duration(f"{days - 1}d{hours}h", "term") == (days - 1) * 86_400 + hours * 3_600
