"""The scorer that is shipped, and others in its place."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import scorer
from market.errors import InvalidRequest
from market.scorer import LinearScorer, load_scorer


class Half:
    usual = (0.5,)

    def score(self, text):
        return 0.5


HALF, WRONG = Half(), object()


@given(st.text(max_size=300))
def test_scores_are_probabilities_and_always_the_same(text):
    shipped = load_scorer()
    assert 0 <= shipped.score(text) <= 1
    assert shipped.score(text) == shipped.score(text)


def test_usual_scores_are_in_order_and_tell_requests_apart():
    usual = load_scorer().usual
    assert all(one <= two for one, two in itertools.pairwise(usual))
    assert usual[-1] > 2 * usual[0]


def test_arithmetic_in_words_is_harder_than_a_greeting():
    shipped = load_scorer()
    hard = "Tom has 40 dollars, pays 15% tax on 7 items and earns $12 a day. How much in 3 weeks?"
    assert shipped.score(hard) > shipped.score("Hello, how are you?") + 0.05


def test_what_is_saved_decides_alike(tmp_path):
    shipped = load_scorer()
    shipped.save(tmp_path / "again.json")
    again = LinearScorer.load(tmp_path / "again.json")
    assert again.score("How many primes are below 100?") == pytest.approx(
        shipped.score("How many primes are below 100?"), abs=1e-6
    )


def test_only_the_beginning_of_a_long_text_is_read():
    assert scorer.counted("a " * scorer.TEXT_MAX) == scorer.counted("a " * (scorer.TEXT_MAX // 2))


def test_another_one_is_taken_by_name():
    assert load_scorer(f"{__name__}:HALF").score("x") == 0.5


@pytest.mark.parametrize("name", ["nowhere:x", f"{__name__}:WRONG", f"{__name__}:missing", "json"])
def test_no_scorer_is_a_clear_error(name):
    with pytest.raises(InvalidRequest, match="MARKET_SCORER"):
        load_scorer(name)
