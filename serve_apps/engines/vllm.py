"""vLLM's AsyncLLM as an engine: its CPU build here, CUDA where there is a GPU."""

import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Any

from market.errors import EngineFailed, InvalidRequest
from market.types import EngineChunk, EngineRequest, Sampling
from serve_apps.engines.base import EngineSettings, chunk

MIB_PER_GIB = 1024


async def start(settings: EngineSettings) -> "VllmEngine":
    """Load the model; takes 15 to 60 s. Raises EngineFailed if vLLM cannot start."""
    on_gpu = settings.gpu_fraction > 0
    if not on_gpu:
        cache_gib = max(1, settings.kv_cache_mib // MIB_PER_GIB)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
        if settings.tensor_parallel > 1:
            # vLLM wants a NUMA node per worker to bind threads; logical GPUs share one machine.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
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
        enable_prefix_caching=True,
        trust_remote_code=False,
        disable_log_stats=True,
        **placed,
    )
    try:
        return VllmEngine(AsyncLLM.from_engine_args(arguments))
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineFailed(f"vLLM did not start: {error}") from error


class VllmEngine:
    """Thin: parameters in, chunks out. vLLM coalesces chunks while the reader is slow."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream an answer; closing the iterator aborts it in vLLM."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(
            prompt_token_ids=list(request.prompt_token_ids), cache_salt=request.cache_salt
        )
        produced = 0
        try:
            parameters = to_vllm(request.sampling)
            outputs = self._engine.generate(prompt, parameters, request_id=request.request_id)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    answer = output.outputs[0]
                    produced += len(answer.token_ids)
                    counts = (
                        len(request.prompt_token_ids),
                        output.num_cached_tokens or 0,
                        produced,
                    )
                    reason = answer.finish_reason
                    if reason not in (None, "stop", "length"):
                        raise EngineFailed(f"vLLM gave the request up: {reason}")
                    yield chunk(answer.text, tuple(answer.token_ids), counts, reason)
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"vLLM failed: {error}") from error
        except (ValueError, VLLMClientError) as error:
            raise InvalidRequest(f"vLLM refused the request: {error}") from error

    async def check_health(self) -> None:
        """Raises EngineFailed if vLLM's engine process is gone."""
        if self._engine.errored:
            raise EngineFailed("vLLM's engine process died")

    async def close(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()


def to_vllm(sampling: Sampling) -> Any:
    """Our sampling parameters as vLLM's, streaming deltas."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

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
        logit_bias=dict(sampling.logit_bias) or None,
        ignore_eos=sampling.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
    )
