"""Per-request sampling for the transformers engine, with vLLM's parameters and meanings.

transformers' continuous batching knows temperature, top-k and top-p per request, no penalties
and no seeds. It calls our processor with the scores of all running requests; we reduce each row
to the one token drawn for that request, so that any sampling after us picks it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from market.types import Sampling

GREEDY_BELOW = 1e-5


class RequestSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Draws each running request's next token by its own parameters."""

    supported_kwargs: ClassVar[dict[str, type]] = {"sampling": Sampling}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, eos_token_ids: Sequence[int], seed: int | None = None) -> None:
        self._eos_token_ids = list(eos_token_ids)
        self._running: list[Any] = []
        self._generators: dict[str, torch.Generator] = {}
        self._shared = torch.Generator()
        if seed is None:
            self._shared.seed()
        else:
            self._shared.manual_seed(seed)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Nothing travels in the tensor; the requests themselves are looked up."""
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Remember which request each row of scores belongs to."""
        self._running = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._running), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] -> the same with one finite entry per row."""
        drawn = torch.full_like(scores, float("-inf"))
        for row, state in enumerate(self._running):
            drawn[row, self._draw(scores[row], state)] = 0.0
        return drawn

    def forget(self, request_id: str) -> None:
        """Drop the random state of a request that has ended."""
        self._generators.pop(request_id, None)

    def _draw(self, scores: torch.Tensor, state: Any) -> int:
        sampling: Sampling = state.logit_processor_kwargs["sampling"]
        row = _penalised(scores, sampling, state.initial_tokens, state.generated_tokens)
        if sampling.ignore_eos or len(state.generated_tokens) < sampling.min_tokens:
            row[self._eos_token_ids] = float("-inf")
        if sampling.temperature < GREEDY_BELOW:
            return int(row.argmax())
        probabilities = _filtered(row / sampling.temperature, sampling).softmax(-1)
        if not probabilities.isfinite().all():
            return int(row.nan_to_num().argmax())  # an exception here would end all requests
        return int(torch.multinomial(probabilities, 1, generator=self._generator(state, sampling)))

    def _generator(self, state: Any, sampling: Sampling) -> torch.Generator:
        if sampling.seed is None:
            return self._shared
        generator = self._generators.get(state.request_id)
        if generator is None:
            generator = torch.Generator().manual_seed(sampling.seed)
            self._generators[state.request_id] = generator
        return generator


def _penalised(
    scores: torch.Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]
) -> torch.Tensor:
    """OpenAI's penalties over the answer so far; repetition over prompt and answer."""
    row = scores.detach().to("cpu", torch.float32, copy=True)
    for token_id, bias in sampling.logit_bias:
        row[token_id] += bias
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *generated}))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(list(generated)).unique(return_counts=True)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return row


def _filtered(row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Top-k, then top-p, then min-p."""
    if 0 < sampling.top_k < row.numel():
        threshold = row.topk(sampling.top_k).values[-1]
        row = row.masked_fill(row < threshold, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, indices = row.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = before >= sampling.top_p
        dropped[0] = False  # also when top_p is too small for a 32-bit float
        row = row.index_fill(0, indices[dropped], float("-inf"))
    if sampling.min_p > 0.0:
        probabilities = row.softmax(-1)
        floor = sampling.min_p * probabilities.max()
        row = row.masked_fill(probabilities < floor, float("-inf"))
    return row
