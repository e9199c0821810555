"""Vectors of texts: a transformers encoder, pooled as the model's own files say.

The files are those of sentence-transformers: ``modules.json`` lists the steps after the encoder,
``1_Pooling/config.json`` says how token vectors become one. Read here rather than through that
package, which would bring scikit-learn and scipy for twenty lines.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from market.errors import EngineFailed, InvalidRequest
from market.types import EngineChunk, EngineRequest, FinishReason, TokenCounts
from serve_apps.engines.base import EngineSettings

# Tokens of a batch, padding included: enough to fill a GPU, little enough to keep answers short.
BATCH_TOKENS = 16_384
POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def load(settings: EngineSettings) -> "EmbeddingEngine":
    """Load the model. Raises EngineFailed for a pooling that is not known; OSError, ValueError."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    device = "cuda" if settings.gpu_fraction > 0 and torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(settings.folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(
        settings.folder,
        dtype="auto" if device == "cuda" else torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
    ).to(device)
    pooling, normalised = read_pooling(settings.folder)
    return EmbeddingEngine(model.eval(), tokenizer.pad_token_id or 0, pooling, normalised)


def read_pooling(folder: Path) -> tuple[str, bool]:
    """(``mean``, ``first`` or ``last``; whether vectors get length one). Raises EngineFailed.

    Without ``modules.json`` the mean, normalised.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return "mean", True
    modules = {module["type"].rpartition(".")[2]: module for module in _json(listed)}
    unknown = modules.keys() - {"Transformer", "Pooling", "Normalize"}
    if unknown or "Pooling" not in modules:
        raise EngineFailed(f"{listed}: steps {sorted(modules)} are not all known")
    config = _json(folder / modules["Pooling"]["path"] / "config.json")
    chosen = [how for name, how in POOLINGS.items() if config.get(name)]
    others = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    if len(chosen) != 1 or len(others) != 1:
        raise EngineFailed(f"{folder}: pooling {', '.join(others) or 'none'} is not known")
    return chosen[0], "Normalize" in modules


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class EmbeddingEngine:
    """Texts that wait together are computed together, in order of arrival."""

    kv_tokens = 0

    def __init__(self, model: Any, pad_id: int, pooling: str, normalised: bool) -> None:
        self._model = model
        self._pad_id = pad_id
        self._pooling = pooling
        self._normalised = normalised
        self._waiting: deque[tuple[tuple[int, ...], asyncio.Future[bytes]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """One chunk with the text's vector. Raises InvalidRequest if an answer was wanted."""
        if not request.embeds:
            raise InvalidRequest("this model makes embeddings only", param="model")
        await self.check_health()
        vector: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((request.prompt_token_ids, vector))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        counts = TokenCounts(len(request.prompt_token_ids), 0, 0)
        yield EngineChunk("", (), counts, FinishReason.STOP, embedding=await vector)

    async def _work(self) -> None:
        """Compute until nobody waits."""
        while batch := self._next_batch():
            try:
                vectors = await asyncio.to_thread(self._embed, [ids for ids, _ in batch])
            except Exception as error:  # noqa: BLE001  # whatever it was, all of the batch must know
                self._settle(batch, EngineFailed(f"transformers failed: {error}"))
            else:
                self._settle(batch, vectors)
        self._worker = None

    def _next_batch(self) -> list[tuple[tuple[int, ...], "asyncio.Future[bytes]"]]:
        batch: list[tuple[tuple[int, ...], asyncio.Future[bytes]]] = []
        longest = 0
        while self._waiting:
            ids, vector = self._waiting[0]
            longest = max(longest, len(ids))
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                break
            self._waiting.popleft()
            if not vector.done():  # its reader may have gone
                batch.append((ids, vector))
        return batch

    def _settle(self, batch: Any, outcome: "list[bytes] | EngineFailed") -> None:
        for index, (_, vector) in enumerate(batch):
            if vector.done():
                continue
            if isinstance(outcome, EngineFailed):
                vector.set_exception(outcome)
            else:
                vector.set_result(outcome[index])

    def _embed(self, batch: list[tuple[int, ...]]) -> list[bytes]:
        """Vectors of little-endian 32-bit floats."""
        import torch

        longest = max(map(len, batch))
        device = self._model.device
        ids = torch.full((len(batch), longest), self._pad_id, device=device)
        mask = torch.zeros((len(batch), longest), dtype=torch.long, device=device)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            lengths = mask.sum(1)
            if self._pooling == "mean":
                pooled = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
            elif self._pooling == "first":
                pooled = hidden[:, 0]
            else:
                pooled = hidden[torch.arange(len(batch), device=device), lengths - 1]
            if self._normalised:
                pooled = torch.nn.functional.normalize(pooled, dim=1)
        return [row.numpy().astype("<f4").tobytes() for row in pooled.cpu()]

    async def check_health(self) -> None:
        """It has no process of its own that could end."""

    async def close(self) -> None:
        """Let the batch in work end."""
        if self._worker is not None:
            await self._worker
