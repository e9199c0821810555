import json

import pytest

from market.errors import InvalidRequest
from market.types import FinishReason
from serve_apps.wire import ChatBody, CompletionBody, finish_on_wire, parse

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def chat(**changes):
    return parse(ChatBody, json.dumps(HELLO | changes).encode())


class TestParse:
    def test_unknown_fields_are_tolerated(self):
        assert chat(user="me", metadata={"a": "b"}, something_new=1).model == "tiny"

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"min_tokens": 3, "max_tokens": 2}, None),
            (
                {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
                "messages.0.tool_calls",
            ),
            ({"temperature": 2.5}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
            ({"stop": ["a"] * 17}, "stop"),
            ({"model": None}, "model"),
            ({"logit_bias": {"a": 1}}, "logit_bias.a.[key]"),
        ],
    )
    def test_wrong_fields_are_named(self, changes, param):
        with pytest.raises(InvalidRequest) as caught:
            chat(**changes)
        assert caught.value.param == param
        assert caught.value.body()["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
    def test_what_is_no_json_object_is_refused(self, raw):
        with pytest.raises(InvalidRequest):
            parse(ChatBody, raw)

    @pytest.mark.parametrize(
        "changes",
        [
            {"n": 2},
            {"logprobs": True},
            {"tools": [{"type": "function"}]},
            {"response_format": {"type": "json_object"}},
            {"tool_choice": "required"},
            {"stop_token_ids": [1]},
        ],
    )
    def test_what_would_change_the_answer_is_refused_not_ignored(self, changes):
        with pytest.raises(InvalidRequest) as caught:
            chat(**changes)
        assert caught.value.code == "unsupported_parameter"

    @pytest.mark.parametrize(
        "changes",
        [{"n": 1}, {"logprobs": False}, {"tools": []}, {"response_format": {"type": "text"}}],
    )
    def test_their_neutral_values_are_fine(self, changes):
        chat(**changes)


class TestSampling:
    def test_defaults_are_those_of_openai(self):
        sampling = chat().sampling(None, 100)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        assert (sampling.stop, sampling.seed, sampling.max_tokens) == ((), None, None)

    def test_zero_is_not_missing(self):
        assert chat(temperature=0).sampling(None, 100).temperature == 0

    def test_stop_may_be_one_string(self):
        assert chat(stop="end").sampling(None, 100).stop == ("end",)

    def test_everything_arrives(self):
        given = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.2,
            "seed": 3,
            "min_tokens": 2,
            "ignore_eos": True,
        }
        sampling = chat(**given, logit_bias={"5": -100}).sampling(9, 100)
        assert {name: getattr(sampling, name) for name in given} == given
        assert sampling.logit_bias == ((5, -100.0),)
        assert sampling.max_tokens == 9

    def test_bias_on_a_token_that_does_not_exist_is_refused(self):
        with pytest.raises(InvalidRequest):
            chat(logit_bias={"100": 1}).sampling(None, 100)


class TestMessages:
    def test_content_parts_are_joined(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        (message,) = chat(messages=[{"role": "developer", "content": parts}]).messages
        assert message.for_template() == {"role": "system", "content": "ab"}

    def test_pictures_are_refused(self):
        part = {"type": "image_url", "image_url": {"url": "x"}}
        with pytest.raises(InvalidRequest):
            chat(messages=[{"role": "user", "content": [part]}])


def test_null_is_the_default_of_stream():
    assert not chat(stream=None).stream


def test_half_a_character_is_no_text():
    with pytest.raises(InvalidRequest):
        parse(ChatBody, json.dumps(HELLO).replace("hi", "\\ud800").encode())
    assert parse(ChatBody, json.dumps(HELLO).replace("hi", "\\ud83d\\ude00").encode())


def completion(prompt):
    return parse(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode())


class TestPrompt:
    @pytest.mark.parametrize(
        ("prompt", "parsed"),
        [("text", "text"), ([1, 2], [1, 2]), (["text"], "text"), ([[1, 2]], [1, 2])],
    )
    def test_comes_in_four_forms(self, prompt, parsed):
        assert completion(prompt).prompt == parsed

    @pytest.mark.parametrize("prompt", [None, 1, {}, ["a", "b"], [[1], [2]], [1, "a"], [True]])
    def test_anything_else_is_refused(self, prompt):
        with pytest.raises(InvalidRequest) as caught:
            completion(prompt)
        assert caught.value.param == "prompt"

    @pytest.mark.parametrize("junk", [{"prompt": [1, "a"] * 300_000}, {"messages": [1] * 300_000}])
    def test_a_body_full_of_mistakes_is_refused_at_the_first(self, junk):
        kind = ChatBody if "messages" in junk else CompletionBody
        with pytest.raises(InvalidRequest):
            parse(kind, json.dumps({"model": "m"} | junk).encode())


def test_budget_is_length_on_the_wire():
    assert finish_on_wire(FinishReason.BUDGET) == "length"
    assert finish_on_wire(FinishReason.STOP) == "stop"
    assert finish_on_wire(None) is None
