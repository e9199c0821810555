"""Prompts -> token ids with the model's own tokenizer and chat template."""

import asyncio
from collections.abc import Sequence
from typing import Any

from market.errors import InvalidRequest, MarketFault
from serve_apps.wire import ChatBody, CompletionBody

INLINE_CHARACTERS = 16_000


class Prompter:
    """Turns requests for one model into token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = len(tokenizer)

    async def chat(self, body: ChatBody) -> tuple[int, ...]:
        """The conversation through the chat template, ready for the assistant's turn."""
        from jinja2 import TemplateError

        messages = [message.for_template() for message in body.messages]
        size = sum(len(message["content"]) for message in messages)
        try:
            ids = await _compute(size, self._apply_template, messages)
        except (TemplateError, ValueError) as error:
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {error}", param="messages"
            ) from None
        return tuple(ids)

    async def completion(self, body: CompletionBody) -> tuple[int, ...]:
        """The prompt as text or token ids. Raises InvalidRequest for an empty or unknown one."""
        prompt = body.prompt
        if isinstance(prompt, str):
            ids: Sequence[int] = await _compute(len(prompt), self._tokenizer.encode, prompt)
        else:
            ids = prompt
        if not ids or not all(0 <= token_id < self.vocabulary for token_id in ids):
            raise InvalidRequest(
                f"prompt must hold at least one token, ids from 0 to {self.vocabulary - 1}",
                param="prompt",
            )
        return tuple(ids)

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
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
        return Prompter(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise MarketFault(f"no tokenizer in {folder}: {error}") from error
