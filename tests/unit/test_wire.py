import json

import pytest

from market.errors import InvalidRequest
from market.types import FinishReason, Grammar, GrammarKind
from serve_apps.responses import ResponsesBody
from serve_apps.shapes import finish_on_wire
from serve_apps.wire import ChatBody, CompletionBody, EmbeddingBody, parse

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
                "messages.0.tool_calls.0.function",
            ),
            ({"n": 0}, "n"),
            ({"n": 129}, "n"),
            ({"tools": []}, "tools"),
            ({"tools": [{"type": "function"}]}, "tools.0.function"),
            ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
            ({"tool_choice": "required"}, None),
            ({"top_logprobs": 3}, None),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
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
            {"functions": [{"name": "f"}]},
            {"modalities": ["audio"]},
            {"prediction": {"type": "content"}},
            {"echo": True},
            {"use_beam_search": True},
            {"guided_json": {}},
            {"chat_template": "{{ x }}"},
            {"continue_final_message": True},
            {"bad_words": ["no"]},
            {"verbosity": "low"},
        ],
    )
    def test_what_would_change_the_answer_is_refused_not_ignored(self, changes):
        with pytest.raises(InvalidRequest) as caught:
            chat(**changes)
        assert caught.value.code == "unsupported_parameter"

    @pytest.mark.parametrize(
        "changes",
        [
            {"n": 1},
            {"logprobs": False},
            {"functions": []},
            {"response_format": {"type": "text"}},
            {"tool_choice": "none"},
        ],
    )
    def test_their_neutral_values_are_fine(self, changes):
        chat(**changes)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


class TestTools:
    def test_choice_must_be_one_of_them(self):
        named = {"type": "function", "function": {"name": "hear"}}
        with pytest.raises(InvalidRequest, match="'hear', which is not in tools"):
            chat(tools=[TOOL], tool_choice=named)

    def test_parsers_get_tools_and_choice_but_no_text_of_the_conversation(self):
        asked = json.loads(chat(tools=[TOOL], tool_choice="required").parsing(False))
        # vLLM writes every field of a function into the prompt, an absent description too.
        function = TOOL["function"] | {"description": None}
        assert asked["tools"] == [{"type": "function", "function": function}]
        assert asked["tool_choice"] == "required"
        assert asked["messages"] == [{"role": "user", "content": ""}]

    def test_auto_is_the_default(self):
        assert json.loads(chat(tools=[TOOL]).parsing(False))["tool_choice"] == "auto"

    def test_none_is_as_without(self):
        body = chat(tools=[TOOL], tool_choice="none")
        assert body.tools_for_template() is None
        assert body.parsing(False) is None

    def test_models_that_think_are_parsed_always(self):
        assert chat().parsing(True) is not None

    def test_schema_goes_with_the_parsers(self):
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        asked = json.loads(chat(tools=[TOOL], response_format=schema).parsing(False))
        assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}


class TestConstraint:
    @pytest.mark.parametrize(
        ("changes", "constraint"),
        [
            ({}, None),
            ({"response_format": {"type": "text"}}, None),
            ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT)),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "a", "schema": {"type": "array"}},
                    }
                },
                Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array"}'),
            ),
            ({"structured_outputs": {"regex": "a+"}}, Grammar(GrammarKind.REGEX, "a+")),
            ({"structured_outputs": {"choice": ["x"]}}, Grammar(GrammarKind.CHOICE, '["x"]')),
            ({"structured_outputs": {"json": {}}}, Grammar(GrammarKind.JSON_SCHEMA, "{}")),
        ],
    )
    def test_is_what_the_body_says(self, changes, constraint):
        assert chat(**changes).constraint() == constraint

    def test_two_at_once_are_refused(self):
        with pytest.raises(InvalidRequest, match="one kind"):
            chat(structured_outputs={"regex": "a", "choice": ["a"]}).constraint()

    def test_schema_has_a_size(self):
        schema = {"type": "object", "description": "x" * 200_000}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with pytest.raises(InvalidRequest, match="larger"):
            chat(response_format=form).constraint()


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

    def test_tool_calls_have_their_arguments_as_templates_want_them(self):
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ]
        said, answered = chat(messages=messages).messages
        assert said.for_template()["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert answered.for_template() == {"role": "tool", "content": "42", "tool_call_id": "c1"}

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
        [
            ("text", ["text"]),
            ([1, 2], [[1, 2]]),
            (["text", "more"], ["text", "more"]),
            ([[1, 2], [3]], [[1, 2], [3]]),
        ],
    )
    def test_comes_in_four_forms(self, prompt, parsed):
        assert completion(prompt).prompt == parsed

    @pytest.mark.parametrize(
        "prompt", [None, 1, {}, ["a", [1]], [[1], "a"], [1, "a"], [True], ["a"] * 129]
    )
    def test_anything_else_is_refused(self, prompt):
        with pytest.raises(InvalidRequest) as caught:
            completion(prompt)
        assert caught.value.param == "prompt"

    def test_prompts_times_answers_is_bounded(self):
        with pytest.raises(InvalidRequest, match="must not exceed"):
            parse(CompletionBody, json.dumps({"model": "m", "prompt": ["a"] * 65, "n": 2}).encode())

    def test_no_tokens_make_sense_only_with_echo(self):
        asked = {"model": "m", "prompt": "a", "max_tokens": 0}
        with pytest.raises(InvalidRequest):
            parse(CompletionBody, json.dumps(asked).encode())
        assert parse(CompletionBody, json.dumps(asked | {"echo": True}).encode()).limit == 1

    def test_of_embeddings_has_the_same_forms(self):
        body = parse(EmbeddingBody, json.dumps({"model": "m", "input": "a"}).encode())
        assert body.input == ["a"]

    @pytest.mark.parametrize("junk", [{"prompt": [1, "a"] * 300_000}, {"messages": [1] * 300_000}])
    def test_a_body_full_of_mistakes_is_refused_at_the_first(self, junk):
        kind = ChatBody if "messages" in junk else CompletionBody
        with pytest.raises(InvalidRequest):
            parse(kind, json.dumps({"model": "m"} | junk).encode())


def test_budget_is_length_on_the_wire():
    assert finish_on_wire(FinishReason.BUDGET) == "length"
    assert finish_on_wire(FinishReason.STOP) == "stop"
    assert finish_on_wire(None) is None


def responses(**changes):
    asked = {"model": "tiny", "input": "hi"} | changes
    return parse(ResponsesBody, json.dumps(asked).encode())


class TestResponses:
    def test_become_a_chat(self):
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
        body = responses(
            instructions="be brief",
            input=[{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}],
            max_output_tokens=9,
            text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        ).as_chat()
        assert [(m.role, m.content) for m in body.messages] == [
            ("system", "be brief"),
            ("user", "ab"),
            ("assistant", "c"),
        ]
        assert body.limit == 9
        assert body.constraint() == Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')

    @pytest.mark.parametrize(
        "changes",
        [
            {"previous_response_id": "resp-1"},
            {"tools": [{"type": "web_search"}]},
            {"background": True},
            {"input": []},
        ],
    )
    def test_what_is_not_kept_is_refused(self, changes):
        with pytest.raises(InvalidRequest):
            responses(**changes)
