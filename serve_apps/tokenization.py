"""Prompts -> token ids with the model's own tokenizer and chat template, and back."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from market.catalog import Model
from market.cluster.models import fetch
from market.errors import InvalidRequest, MarketError, MarketFault
from serve_apps.wire import ChatBody

logger = logging.getLogger(__name__)

INLINE_CHARACTERS = 16_000
LOAD_AGAIN_S = 60.0
# Tokenizers that are loaded at once: the threads are for others, too.
LOADS_MAX = 2
# What the tokenizer's own function takes besides the template's variables.
_RESERVED = frozenset(
    {"conversation", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)


class Prompter:
    """Turns requests for one model into token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        # What transformers' own call ends in, after three times the work of encoding a short text.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    async def chat(self, body: ChatBody, size: int) -> tuple[int, ...]:
        """The conversation through the chat template, ready for the assistant's turn.

        ``size`` is that of the whole request: what is large is computed in a thread.
        """
        from jinja2 import TemplateError

        messages = [message.for_template() for message in body.messages]
        options = dict(body.chat_template_kwargs or {})
        taken = _RESERVED & options.keys()
        if taken:
            raise InvalidRequest(
                f"chat_template_kwargs: {min(taken)} cannot be set", param="chat_template_kwargs"
            )
        if body.reasoning_effort is not None:
            options["reasoning_effort"] = body.reasoning_effort
        try:
            ids = await _compute(
                size, self._apply_template, messages, body.tools_for_template(), options
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {error}", param="messages"
            ) from None
        return tuple(ids)

    async def text(
        self, prompt: str | list[int], size: int, param: str = "prompt"
    ) -> tuple[int, ...]:
        """A text's token ids, or token ids checked. Raises InvalidRequest for empty or unknown."""
        if isinstance(prompt, str):
            ids: Sequence[int] = await _compute(size, self._encode, prompt, True)
        else:
            ids = prompt
        if not ids or not all(0 <= token_id < self.vocabulary for token_id in ids):
            raise InvalidRequest(
                f"{param} must hold at least one token, ids from 0 to {self.vocabulary - 1}",
                param=param,
            )
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _apply_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> list[int]:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        return self._encode(text, False)  # the template writes special tokens itself

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        if self._backend is None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens)
        else:
            ids = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids


async def _compute(size: int, function: Any, *arguments: Any) -> Any:
    """Short prompts at once; long ones in a thread, so that other streams go on."""
    if size <= INLINE_CHARACTERS:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def load_prompter(folder: str) -> Prompter:
    """Load the tokenizer in ``folder``. Raises MarketFault if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.chat_template:  # compile it now, not in the first request
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        return Prompter(tokenizer)
    except (OSError, ValueError) as error:
        raise MarketFault(f"no tokenizer in {folder}: {error}") from error


class Prompters:
    """Those of all models that are asked here, each loaded once."""

    def __init__(self, models_dir: Path, find: Callable[[str], Model]) -> None:
        self._models_dir = models_dir
        self._find = find
        self._prompters: dict[str, Prompter] = {}
        self._ahead: dict[str, asyncio.Task[None]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._loads = asyncio.Semaphore(LOADS_MAX)

    async def get(self, model: str) -> Prompter:
        """Raises MarketError if its files cannot be had or read."""
        prompter = self._prompters.get(model)
        if prompter is None:
            async with self._locks[model]:
                prompter = self._prompters.get(model)
                if prompter is None:
                    async with self._loads:
                        prompter = await asyncio.to_thread(self._load, model)
                    self._prompters[model] = prompter
        return prompter

    def load_ahead(self, model: str) -> None:
        """A tokenizer takes seconds to load, mostly its package: no request shall wait for it."""
        if model not in self._ahead:
            self._ahead[model] = asyncio.create_task(self._load_ahead(model))

    async def _load_ahead(self, model: str) -> None:
        try:
            await self.get(model)
        except MarketError as error:
            logger.warning("no tokenizer for %s yet: %s", model, error)
            await asyncio.sleep(LOAD_AGAIN_S)
            del self._ahead[model]

    def _load(self, model: str) -> Prompter:
        folder = fetch(self._find(model), self._models_dir, weights=False)
        return load_prompter(str(folder))
