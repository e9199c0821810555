"""The market's answers beside those of ``vllm serve`` with the same model, chunk by chunk."""

import json
import os
import subprocess
import sys

import httpx
import pytest

from tests.e2e.conftest import free_port, wait_until

pytestmark = pytest.mark.timeout(600)

HI = [{"role": "user", "content": "What is a list?"}]
CHAT = {"messages": HI, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
TEXT = {"prompt": "A list is", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "schema": {
            "type": "object",
            "properties": {"sure": {"type": "boolean"}},
            "required": ["sure"],
            "additionalProperties": False,
        },
    },
}
# What cannot be the same, or is said by one of the two only; everything else has to be equal.
DIFFERENT = {"id", "created", "cost", "system_fingerprint", "request_id"}
VLLM_ONLY = {
    *("prompt_logprobs", "prompt_token_ids", "token_ids", "kv_transfer_params", "stop_reason"),
    *("prompt_text", "routed_experts", "metrics", "prompt_routed_experts", "ec_transfer_params"),
    *("service_tier", "refusal", "annotations", "audio", "function_call", "reasoning"),
    *("prompt_tokens_details", "completion_tokens_details"),
}
CASES = {
    "chat": ("chat/completions", CHAT),
    "chat, several": ("chat/completions", CHAT | {"n": 2, "temperature": 1.0, "seed": 5}),
    "chat, logprobs": ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    "chat, stop string": ("chat/completions", CHAT | {"stop": [" a"], "max_tokens": 60}),
    "chat, penalties": (
        "chat/completions",
        CHAT | {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"300": 5}},
    ),
    "chat, seed": ("chat/completions", CHAT | {"seed": 5, "temperature": 1.0}),
    "chat, named tool": (
        "chat/completions",
        {"messages": HI, "max_tokens": 60, "temperature": 0, "tools": [TOOL], "tool_choice": NAMED},
    ),
    "chat, required tool": (
        "chat/completions",
        {
            "messages": HI,
            "max_tokens": 60,
            "temperature": 0,
            "tools": [TOOL],
            "tool_choice": "required",
        },
    ),
    "chat, tools not used": (
        "chat/completions",
        CHAT | {"tools": [TOOL], "tool_choice": "auto"},
    ),
    "chat, schema": (
        "chat/completions",
        {"messages": HI, "max_tokens": 40, "temperature": 0, "response_format": SCHEMA},
    ),
    "text": ("completions", TEXT),
    "text, tokens": ("completions", TEXT | {"prompt": [40, 41, 42]}),
    "text, several": ("completions", TEXT | {"prompt": ["A", "B"]}),
    "text, logprobs": ("completions", TEXT | {"logprobs": 2}),
    "text, echo": ("completions", TEXT | {"echo": True}),
    "text, echo with logprobs": ("completions", TEXT | {"echo": True, "logprobs": 1}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model):
    """``vllm serve`` with the settings that the market gives the engine."""
    port = free_port()
    log = tmp_path_factory.mktemp("vllm-serve") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)),
        *("--served-model-name", "tiny-qwen", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "2048", "--max-num-seqs", "128", "--enforce-eager"),
        *("--dtype", "bfloat16", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"

    def answers():
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            wait_until(answers, "vllm serve", 240)
            yield url
        finally:
            server.terminate()
            server.wait(60)


OF_TOKENS = ("text", "logprobs", "finish_reason", "stop_reason")


def normal(value):
    """Without what may differ; null, empty and absent are the same to every client."""
    if isinstance(value, dict):
        kept = {
            name: normal(item) for name, item in value.items() if name not in DIFFERENT | VLLM_ONLY
        }
        return {name: item for name, item in kept.items() if item not in (None, [], {})}
    if isinstance(value, list):
        return [normal(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def without_call_ids(value):
    """Ids of tool calls are drawn at random."""
    if isinstance(value, dict):
        is_call = "function" in value and "id" in value
        return {
            name: without_call_ids(item)
            for name, item in value.items()
            if not (is_call and name == "id")
        }
    return [without_call_ids(item) for item in value] if isinstance(value, list) else value


def ask(url, path, body, key="none"):
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "tiny-qwen"} | body
    answer = httpx.post(f"{url}/v1/{path}", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def chunks(answer):
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def gathered(events):
    """Streams as what they amount to, per choice: chunks may be cut at other places."""
    found = {}
    for event in events:
        for choice in event.get("choices", []):
            begun = {"text": "", "calls": "", "reason": None, "logprobs": []}
            mine = found.setdefault(choice["index"], begun)
            delta = choice.get("delta", choice)
            mine["text"] += delta.get("content") or delta.get("text") or ""
            for call in delta.get("tool_calls") or []:
                function = call["function"]
                mine["calls"] += (function.get("name") or "") + (function.get("arguments") or "")
            logprobs = choice.get("logprobs") or {}
            mine["logprobs"] += normal(logprobs.get("content") or logprobs.get("tokens") or [])
            mine["reason"] = choice.get("finish_reason") or mine["reason"]
    return found


def beginnings(events):
    """The first chunk of each choice, less what depends on how many tokens it has.

    Several choices come in any order.
    """
    found = {}
    for event in without_call_ids(normal(events)):
        for choice in event.get("choices", []):
            shown = {name: item for name, item in choice.items() if name not in OF_TOKENS}
            found.setdefault(choice["index"], event | {"choices": [shown]})
    return found


def fields(events):
    """Which fields the chunks have, at every level, however many tokens each has."""
    return {path for event in events for path in paths(normal(event))}


def paths(value, at=""):
    if isinstance(value, dict):
        if at.endswith(".top_logprobs[]") and "logprob" not in value:
            return  # its names are tokens
        for name, item in value.items():
            yield f"{at}.{name}"
            yield from paths(item, f"{at}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, f"{at}[]")


@pytest.mark.parametrize("name", CASES)
def test_whole_answers_are_equal(reference, tenant, name):
    path, body = CASES[name]
    theirs = without_call_ids(normal(ask(reference, path, body).json()))
    ours = without_call_ids(normal(ask(tenant.market.url, path, body, tenant.key).json()))
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_streams_are_equal(reference, tenant, name):
    path, body = CASES[name]
    theirs = chunks(ask(reference, path, body | USAGE))
    ours = chunks(ask(tenant.market.url, path, body | USAGE, tenant.key))
    assert gathered(ours) == gathered(theirs)
    assert beginnings(ours) == beginnings(theirs)
    assert normal(ours[-1]) == normal(theirs[-1])
    assert fields(ours) <= fields(theirs)
