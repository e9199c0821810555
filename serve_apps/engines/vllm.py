"""vLLM's AsyncLLM as an engine: its CPU build here, CUDA where there is a GPU.

Where a chat request needs its answer parsed (tools, reasoning), vLLM's own parsers do that, here
where vLLM is imported; gateways run without it.
"""

import contextlib
import importlib
import json
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from market.credit import WHOLE_BLOCK_TOKENS
from market.errors import EngineFailed, InvalidRequest
from market.types import (
    EngineChunk,
    EngineRequest,
    FinishReason,
    Grammar,
    GrammarKind,
    Position,
    Sampling,
    TokenCounts,
    TokenLogprob,
)
from serve_apps.engines.base import EngineSettings

MIB_PER_GIB = 1024
LOGPROB_MIN = -9999.0
# How vLLM starts its processes, and what it sets to do so inside of a Ray actor.
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
IMPORTED = ["vllm.parser", "vllm.v1.engine.async_llm"]
PRELOADED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
    "vllm.model_executor.models.qwen2",  # what most models of its kind share
]


class _Forked(ForkServerProcess):
    """A child of the process that has the imports behind it, in our environment as it is now."""

    def start(self) -> None:
        self._environment = {k: v for k, v in os.environ.items() if k != START_METHOD}
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Forking(ForkServerContext):
    Process = _Forked


def warm() -> None:
    """Import what vLLM imports, here and in a process of which its own will be forked.

    In a Ray actor it would spawn them, and each would import everything again, five seconds on a
    fast CPU.
    """
    forking = _Forking()
    forking.set_forkserver_preload(PRELOADED)
    child = forking.Process(target=int)  # ends as soon as all of it is imported
    child.start()

    for module in IMPORTED:
        importlib.import_module(module)
    importlib.import_module("vllm.v1.engine.utils").get_mp_context = lambda: forking  # type: ignore[attr-defined]
    child.join()


async def start(settings: EngineSettings) -> "VllmEngine":
    """Load the model; takes 15 to 60 s. Raises EngineFailed if vLLM cannot start."""
    on_gpu = settings.gpu_fraction > 0
    if not on_gpu:
        cache_gib = max(1, settings.kv_cache_mib // MIB_PER_GIB)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
        if settings.tensor_parallel > 1:
            # vLLM wants a NUMA node per worker to bind threads; logical GPUs share one machine.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    elif settings.compiled is not None:
        os.environ.setdefault("VLLM_CACHE_ROOT", str(settings.compiled))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    placed = {"gpu_memory_utilization": settings.gpu_fraction} if on_gpu else {"dtype": "bfloat16"}
    arguments = AsyncEngineArgs(
        model=str(settings.folder),
        max_model_len=settings.max_context_tokens,
        max_num_seqs=settings.sequences_max,
        tensor_parallel_size=settings.tensor_parallel,
        enforce_eager=not on_gpu,
        enable_sleep_mode=on_gpu,
        enable_prefix_caching=True,
        trust_remote_code=False,
        disable_log_stats=True,
        reasoning_parser=settings.reasoning_parser,
        **placed,
    )
    try:
        return VllmEngine(AsyncLLM.from_engine_args(arguments), settings)
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineFailed(f"vLLM did not start: {error}") from error


class VllmEngine:
    """Thin: parameters in, chunks out. vLLM coalesces chunks while the reader is slow."""

    def __init__(self, engine: Any, settings: EngineSettings) -> None:
        from vllm.parser import ParserManager

        cache = engine.vllm_config.cache_config
        self.kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        self._engine = engine
        self._parsers = ParserManager.get_parser(
            tool_parser_name=settings.tool_parser or None,
            reasoning_parser_name=settings.reasoning_parser or None,
            enable_auto_tools=bool(settings.tool_parser),
            model_name=str(settings.folder),
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer; closing the iterator aborts it in vLLM."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(
            prompt_token_ids=list(request.prompt_token_ids), cache_salt=request.cache_salt
        )
        produced, input_tokens = 0, len(request.prompt_token_ids)
        sampling = request.sampling
        try:
            chat = None if request.chat is None else self._chat(request)
            parameters = to_vllm(sampling, request.grammar, chat)
            if not request.stream:
                parameters.stream_interval = WHOLE_BLOCK_TOKENS
            more = {} if chat is None else chat.engine_arguments()
            outputs = self._engine.generate(
                prompt, parameters, request_id=request.request_id, **more
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    answer = output.outputs[0]
                    produced += len(answer.token_ids)
                    reason = answer.finish_reason
                    if reason not in (None, "stop", "length"):
                        raise EngineFailed(f"vLLM gave the request up: {reason}")
                    finish = None if reason is None else FinishReason(reason)
                    deltas = None
                    if chat is not None:
                        deltas, finish = chat.parse(answer, finish)
                    yield EngineChunk(
                        text=answer.text,
                        token_ids=tuple(answer.token_ids),
                        counts=TokenCounts(input_tokens, output.num_cached_tokens or 0, produced),
                        finish_reason=finish,
                        logprobs=_positions(answer.token_ids, answer.logprobs, sampling.logprobs),
                        deltas=deltas,
                        prompt_logprobs=_prompt_positions(request, output),
                        stop_reason=answer.stop_reason,
                    )
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"vLLM failed: {error}") from error
        except (ValueError, VLLMClientError) as error:
            raise InvalidRequest(f"vLLM refused the request: {error}") from error

    def _chat(self, request: EngineRequest) -> "ParsedChat":
        if self._parsers is None:
            raise InvalidRequest("this model has no parser for tools or reasoning", param="tools")
        return ParsedChat(self._parsers, self._engine, request)

    async def check_health(self) -> None:
        """Raises EngineFailed if vLLM's engine process is gone."""
        if self._engine.errored:
            raise EngineFailed("vLLM's engine process died")

    async def sleep(self) -> None:
        """Level 1: the weights go to the host's memory, the KV cache is dropped."""
        await self._engine.sleep(level=1)

    async def wake(self) -> None:
        """Weights and an empty KV cache back on the GPU."""
        await self._engine.wake_up()

    async def close(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()


class ParsedChat:
    """One answer on its way through vLLM's parsers for tool calls and reasoning."""

    def __init__(self, parsers: Any, engine: Any, request: EngineRequest) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        asked = ChatCompletionRequest.model_validate_json(request.chat or b"{}")
        self._template = asked.chat_template_kwargs or {}
        self._prompt = list(request.prompt_token_ids)
        self._parser = parsers(
            engine.tokenizer,
            asked.tools,
            chat_template_kwargs=self._template,
            model_config=engine.model_config,
        )
        self.request = self._parser.adjust_request(asked)
        self._is_named = not isinstance(self.request.tool_choice, str | None)
        self._called = False
        self._text = ""
        self._token_ids: list[int] = []

    def engine_arguments(self) -> dict[str, Any]:
        """What the engine must know of reasoning, so that it constrains only what follows it."""
        if self._parser.reasoning_parser is None:
            return {}
        return {
            "reasoning_ended": self.request.resolve_reasoning_ended(self._parser, self._prompt),
            "reasoning_parser_kwargs": {"chat_template_kwargs": self._template},
        }

    def parse(
        self, answer: Any, finish: FinishReason | None
    ) -> tuple[tuple[bytes, ...] | None, FinishReason | None]:
        """Pieces of the message that this output adds, and how the answer ends, if it does.

        An answer that is not streamed is parsed at its end; None until then: it is text.
        """
        if not self.request.stream:
            return self._parse_whole(answer, finish)
        delta = self._parser.parse_delta(
            delta_text=answer.text,
            delta_token_ids=list(answer.token_ids),
            request=self.request,
            prompt_token_ids=self._prompt,
            finished=finish is not None,
        )
        if delta is not None and delta.tool_calls:
            self._called = True
        # OpenAI says "stop" where the request named the function.
        if self._called and not self._is_named and finish is FinishReason.STOP:
            finish = FinishReason.TOOL_CALLS
        if delta is None:
            return (), finish
        return (delta.model_dump_json(exclude_unset=True, exclude_none=True).encode(),), finish

    def _parse_whole(
        self, answer: Any, finish: FinishReason | None
    ) -> tuple[tuple[bytes, ...] | None, FinishReason | None]:
        from vllm.renderers.chat_utils import make_tool_call_id

        self._text += answer.text
        self._token_ids += answer.token_ids
        if finish is None:
            return None, None
        self._parser.set_prompt_token_ids(self._prompt)
        reasoning, content, called = self._parser.parse(
            self._text,
            self.request,
            enable_auto_tools=True,
            model_output_token_ids=self._token_ids,
        )
        asked = self.request.tool_choice
        message: dict[str, Any] = {"content": content}
        if reasoning is not None and self.request.include_reasoning:
            message["reasoning"] = reasoning
        if called:
            message["tool_calls"] = [
                {
                    "index": index,
                    "id": call.id or make_tool_call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(called)
            ]
        if (called and asked == "auto") or (asked == "required" and finish is FinishReason.STOP):
            finish = FinishReason.TOOL_CALLS
        # Half a surrogate pair, which a model may write, is no UTF-8.
        return (json.dumps(message, ensure_ascii=False).encode(errors="replace"),), finish


def to_vllm(sampling: Sampling, grammar: Grammar | None = None, chat: Any = None) -> Any:
    """Our sampling parameters as vLLM's, streaming deltas."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    structured = None if grammar is None else _structured(grammar)
    skip_special_tokens = sampling.skip_special_tokens
    if chat is not None:  # parsers want to see markers, and may constrain the answer
        structured = chat.request.extract_structured_outputs() or structured
        skip_special_tokens = chat.request.skip_special_tokens
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        include_stop_str_in_output=sampling.include_stop,
        skip_special_tokens=skip_special_tokens,
        logit_bias=dict(sampling.logit_bias) or None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def _structured(grammar: Grammar) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
        case GrammarKind.JSON_SCHEMA:
            return StructuredOutputsParams(json=json.loads(grammar.text))
        case GrammarKind.REGEX:
            return StructuredOutputsParams(regex=grammar.text)
        case GrammarKind.CHOICE:
            return StructuredOutputsParams(choice=json.loads(grammar.text))
        case GrammarKind.GRAMMAR:
            return StructuredOutputsParams(grammar=grammar.text)


def _positions(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None, count: int | None
) -> tuple[Position, ...] | None:
    if count is None or logprobs is None:
        return None
    return tuple(
        _position(token_id, step, count) for token_id, step in zip(token_ids, logprobs, strict=True)
    )


def _prompt_positions(request: EngineRequest, output: Any) -> tuple[Position | None, ...] | None:
    count = request.sampling.prompt_logprobs
    if count is None or not output.prompt_logprobs:
        return None
    return tuple(
        None if step is None else _position(token_id, step, count)
        for token_id, step in zip(request.prompt_token_ids, output.prompt_logprobs, strict=True)
    )


def _position(token_id: int, step: Mapping[int, Any], count: int) -> Position:
    ranked = sorted(step.items(), key=lambda item: item[1].rank)
    top = tuple(_logprob(other, value) for other, value in ranked if value.rank <= count)
    return Position(_logprob(token_id, step[token_id]), top)


def _logprob(token_id: int, value: Any) -> TokenLogprob:
    # JSON knows no infinity.
    return TokenLogprob(token_id, value.decoded_token or "", max(value.logprob, LOGPROB_MIN))
