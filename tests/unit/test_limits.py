"""A key's limits, alone and over several gateways."""

import contextlib

import pytest

from market.errors import RateLimited, TokensLimited
from market.limits import IDLE_S, Limits, duration
from market.types import UNLIMITED, KeyPolicy


def refused(limits, policy, tokens=0, now_s=0.0):
    with pytest.raises((RateLimited, TokensLimited)) as caught:
        limits.enter("key", policy, tokens, now_s)
    return caught.value


class TestRequests:
    def test_are_let_through_up_to_the_limit_then_at_its_rate(self):
        limits, policy = Limits(), KeyPolicy(requests_per_min=3)
        for _ in range(3):
            limits.enter("key", policy, 0, 0.0)
        error = refused(limits, policy)
        assert (error.http_status, error.code) == (429, "rate_limit_exceeded")
        assert error.retry_after_s == pytest.approx(20)
        limits.enter("key", policy, 0, 20.0)
        assert refused(limits, policy, now_s=20.0).retry_after_s == pytest.approx(20)

    def test_a_refused_request_costs_nothing(self):
        limits, policy = Limits(), KeyPolicy(requests_per_min=1)
        limits.enter("key", policy, 0, 0.0)
        for _ in range(10):
            refused(limits, policy)
        limits.enter("key", policy, 0, 60.0)

    def test_keys_do_not_share(self):
        limits, policy = Limits(), KeyPolicy(requests_per_min=1)
        limits.enter("key", policy, 0, 0.0)
        limits.enter("other", policy, 0, 0.0)


class TestTokens:
    def test_are_taken_as_expected_and_corrected_at_the_end(self):
        limits, policy = Limits(), KeyPolicy(tokens_per_min=100)
        let = limits.enter("key", policy, 90, 0.0)
        error = refused(limits, policy, 20)
        assert (error.http_status, error.retry_after_s) == (429, pytest.approx(6))
        limits.leave(let, 30, 0.0)
        limits.enter("key", policy, 70, 0.0)

    def test_an_answer_longer_than_expected_is_made_up_for(self):
        limits, policy = Limits(), KeyPolicy(tokens_per_min=60)
        limits.leave(limits.enter("key", policy, 10, 0.0), 90, 0.0)
        assert refused(limits, policy, 1).retry_after_s == pytest.approx(31)

    def test_a_request_larger_than_the_limit_waits_for_a_full_bucket(self):
        limits, policy = Limits(), KeyPolicy(tokens_per_min=60)
        limits.enter("key", policy, 500, 0.0)
        assert refused(limits, policy, 500, 60.0).retry_after_s == 60.0


class TestConcurrency:
    def test_is_bounded(self):
        limits, policy = Limits(), KeyPolicy(concurrent=2)
        lets = [limits.enter("key", policy, 0, 0.0) for _ in range(2)]
        assert refused(limits, policy).http_status == 429
        limits.leave(lets[0], 0, 0.0)
        limits.enter("key", policy, 0, 0.0)


class TestSeveralGateways:
    @pytest.mark.parametrize("limit", [1, 5, 90])
    def test_together_keep_to_the_rate(self, limit):
        policy = KeyPolicy(requests_per_min=limit)
        gateways = [Limits() for _ in range(3)]
        let = 0
        for gateway in gateways:
            gateway.share({"key": 3})
        for second in range(1200):
            for gateway in gateways:
                with contextlib.suppress(RateLimited):
                    gateway.enter("key", policy, 0, float(second))
                    let += 1
        assert limit * 20 - 3 <= let <= limit * 21 + 3

    def test_each_lets_one_through_at_a_time_at_least(self):
        limits, policy = Limits(), KeyPolicy(concurrent=2)
        limits.share({"key": 3})
        limits.enter("key", policy, 0, 0.0)
        refused(limits, policy)

    def test_what_was_used_stays_used_when_the_part_changes(self):
        limits, policy = Limits(), KeyPolicy(requests_per_min=4)
        for _ in range(3):
            limits.enter("key", policy, 0, 0.0)
        limits.share({"key": 2})
        refused(limits, policy)

    def test_idle_keys_are_forgotten_running_ones_are_not(self):
        limits, policy = Limits(), KeyPolicy(concurrent=2)
        limits.enter("busy", policy, 0, 0.0)
        limits.leave(limits.enter("idle", policy, 0, 0.0), 0, 0.0)
        assert limits.in_use(0.0) == {"busy", "idle"}
        assert limits.in_use(IDLE_S + 1) == {"busy"}


class TestHeaders:
    def test_say_what_is_left_and_when_it_is_whole_again(self):
        limits = Limits()
        policy = KeyPolicy(requests_per_min=60, tokens_per_min=6000)
        limits.enter("key", policy, 1500, 0.0)
        assert limits.headers("key", policy, 0.0) == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "4500",
            "x-ratelimit-reset-tokens": "15s",
        }

    def test_a_key_without_limits_has_none(self):
        limits = Limits()
        assert limits.enter("key", UNLIMITED, 10**9, 0.0) is None
        limits.leave(None, 5, 0.0)
        assert limits.headers("key", UNLIMITED, 0.0) == {}

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0ms"), (0.35, "350ms"), (1, "1s"), (7.66, "7.66s"), (360, "6m0s"), (61.4, "1m1s")],
    )
    def test_durations_are_written_as_openai_does(self, seconds, text):
        assert duration(seconds) == text
