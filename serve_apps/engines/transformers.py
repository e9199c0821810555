"""transformers with its own continuous batching: small to install, starts in seconds."""

import asyncio
import contextlib
import importlib
import mmap
import queue
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from market.errors import EngineFailed, InvalidRequest
from market.types import EngineChunk, EngineRequest, Sampling
from serve_apps.engines import embeddings
from serve_apps.engines.base import EngineSettings, LoadedEngine, chunk
from serve_apps.engines.detokenizer import Detokenizer

PAGE_TOKENS = 32
# Attention reads a dense mask, batch times cache: on CPUs small batches are faster and need less.
BATCH_TOKENS = {"cpu": 256, "cuda": 1024}
MIB = 1024 * 1024
STOP_TIMEOUT_S = 10
IMPORTED = [
    "transformers.generation.continuous_batching",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",  # what most models of its kind share
    "serve_apps.engines.sampler",
]


def warm() -> None:
    """Import what loading imports: nearly all of the seconds that a start takes."""
    for module in IMPORTED:
        importlib.import_module(module)


def rehearse() -> None:
    """Load a model and ask it: much is imported and set up where it is first used."""
    with tempfile.TemporaryDirectory() as folder:
        _make_smallest(folder)
        asyncio.run(_rehearse(EngineSettings(Path(folder), PAGE_TOKENS, 0.0, sequences_max=1)))


def _make_smallest(folder: str) -> None:
    """A model that can be loaded and asked, though it has nothing to say."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=PAGE_TOKENS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = {str(token): token for token in range(PAGE_TOKENS)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, []))).save_pretrained(
        folder
    )


async def _rehearse(settings: EngineSettings) -> None:
    engine = await start(settings)
    request = EngineRequest("rehearsal", (1, 2), Sampling(2, temperature=0), "rehearsal")
    async with aclosing(engine.generate(request)) as chunks:
        async for _ in chunks:
            pass
    await engine.close()


async def start(settings: EngineSettings) -> LoadedEngine:
    """Load the model. Raises EngineFailed if its files cannot be read."""
    load = embeddings.load if settings.embeds else _load
    try:
        return await asyncio.to_thread(load, settings)
    except (OSError, ValueError) as error:
        raise EngineFailed(f"transformers could not load {settings.folder}: {error}") from error


def _load(settings: EngineSettings) -> "TransformersEngine":
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        ContinuousBatchingConfig,
        GenerationConfig,
        LogitsProcessorList,
    )

    from serve_apps.engines.sampler import RequestSampler

    device = "cuda" if settings.gpu_fraction > 0 and torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(settings.folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype="auto", attn_implementation="sdpa", use_safetensors=True
    ).to(device)
    eos = model.generation_config.eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    sampler = RequestSampler(eos_ids)
    # The manager asks the model for its logits processors; ours replaces all of them.
    model._get_logits_processor = lambda _config: LogitsProcessorList([sampler])
    pages = _cache_pages(model.config, settings)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=eos_ids),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=pages,
            max_batch_tokens=max(BATCH_TOKENS[device], settings.sequences_max),
            # One tenant must not learn from timing what another has asked.
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        ),
    )
    # It counts only processors it converted itself; ours needs its (empty) row of arguments too.
    manager.logit_processor.tensors_required = 1
    if device == "cpu":
        _zero_lazily(manager)
    manager.start()
    return TransformersEngine(manager, tokenizer, sampler, eos_ids, pages * PAGE_TOKENS)


def _zero_lazily(manager: Any) -> None:
    """Let the system zero the pages of the KV cache when they are first used.

    ``torch.zeros`` writes all of it before the first answer, and an idle replica would keep it.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class LazyZeros(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}  # torch gives none as None
            size = args[0] if args and isinstance(args[0], int) else 0
            if func is torch.zeros and kwargs.get("dtype") is torch.uint8 and size >= MIB:
                private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                return torch.frombuffer(private, dtype=torch.uint8)
            return func(*args, **kwargs)

    create = manager._create_batch_processor

    def create_lazily() -> Any:
        with LazyZeros():
            return create()

    manager._create_batch_processor = create_lazily


def _cache_pages(config: Any, settings: EngineSettings) -> int:
    """Pages for every sequence's full context, or what ``kv_cache_mib`` allows."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4
    affordable = settings.kv_cache_mib * MIB // (bytes_per_token * PAGE_TOKENS)
    wanted = settings.sequences_max * -(-settings.max_context_tokens // PAGE_TOKENS)
    one_sequence = -(-settings.max_context_tokens // PAGE_TOKENS) + 1
    return max(int(min(affordable, wanted)), one_sequence)


class TransformersEngine:
    """Requests go to the manager's thread; its results come back on the caller's loop."""

    def __init__(
        self, manager: Any, tokenizer: Any, sampler: Any, eos_ids: list[int], kv_tokens: int
    ) -> None:
        self.kv_tokens = kv_tokens
        self._manager = manager
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._eos_ids = frozenset(eos_ids)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer; closing the iterator cancels it. Nothing is cached between requests.

        Raises InvalidRequest for what only vLLM can do.
        """
        _require_plain(request)
        await self.check_health()
        request_id, sampling = request.request_id, request.sampling
        results: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(request_id, results.put_nowait)
        accepted = self._manager.add_request(
            list(request.prompt_token_ids),
            request_id=request_id,
            max_new_tokens=sampling.max_tokens,
            streaming=True,
            eos_token_id=-1 if sampling.ignore_eos else None,
            sampling=sampling,
        )
        if accepted is None:
            raise EngineFailed("the generation thread takes no more requests")
        text = Detokenizer(self._tokenizer, sampling.stop)
        if request.resumed:  # what was given before, perhaps up to the middle of a character
            text.add(request.prompt_token_ids[-request.resumed :])
        produced, finish = 0, None
        try:
            while finish is None:
                result = await self._latest(results)
                if result.error is not None:
                    raise EngineFailed(f"transformers failed: {result.error}")
                fresh = tuple(result.generated_tokens[produced:])
                piece, used = self._feed(text, fresh)
                fresh = fresh[:used]
                produced += used
                if text.stopped:
                    finish = "stop"
                elif result.is_finished():
                    piece += text.finish()
                    ended = bool(fresh) and fresh[-1] in self._eos_ids and not sampling.ignore_eos
                    finish = "stop" if ended or text.stopped else "length"
                counts = (len(request.prompt_token_ids), 0, produced)
                yield chunk(piece, fresh, counts, finish)
        finally:
            self._manager.cancel_request(request_id)
            self._manager.output_router.result_handlers.pop(request_id, None)
            self._sampler.forget(request_id)
            self._drop_leftovers()

    def _drop_leftovers(self) -> None:
        """Results of requests that were given up before go to a queue that nobody reads."""
        leftovers = self._manager.output_router.output_queue
        with contextlib.suppress(queue.Empty):
            while True:
                leftovers.get_nowait()

    def _feed(self, text: Detokenizer, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """(new text, tokens used): tokens behind a stop string are neither given nor counted."""
        piece = ""
        for used, token_id in enumerate(token_ids, 1):
            if token_id not in self._eos_ids:
                piece += text.add([token_id])
            if text.stopped:
                return piece, used
        return piece, len(token_ids)

    async def _latest(self, results: "asyncio.Queue[Any]") -> Any:
        """The newest result (each carries all tokens so far): a slow reader gets fewer chunks."""
        result = await results.get()
        while not results.empty():
            result = results.get_nowait()
        return result

    async def check_health(self) -> None:
        """Raises EngineFailed if the generation thread has ended."""
        if not self._manager.is_running():
            raise EngineFailed("the generation thread ended")

    async def close(self) -> None:
        """Stop the generation thread."""
        await asyncio.to_thread(self._manager.stop, block=True, timeout=STOP_TIMEOUT_S)


def _require_plain(request: EngineRequest) -> None:
    sampling = request.sampling
    asked = {
        "logprobs": sampling.logprobs is not None or sampling.prompt_logprobs is not None,
        "response_format": request.grammar is not None,
        "tools": request.chat is not None,
        "stop_token_ids": bool(sampling.stop_token_ids),
        "include_stop_str_in_output": sampling.include_stop,
        "skip_special_tokens": not sampling.skip_special_tokens,
    }
    for name, present in asked.items():
        if present:
            raise InvalidRequest(
                f"{name}: this model is served by transformers, which cannot; deployed with "
                "--engine vllm it can",
                code="unsupported_parameter",
                param=name,
            )
