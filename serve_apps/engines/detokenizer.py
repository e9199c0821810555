"""Token ids -> text while they stream: never half a character, and stop strings held back."""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """The part of a tokenizer needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""
        ...


class Detokenizer:
    """Feeds on token ids, gives out text that later tokens cannot change.

    ``stopped`` is True once a stop string appeared; text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._held = max((len(text) - 1 for text in self._stop), default=0)
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._text = ""
        self._given = 0
        self.stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        self._ids.extend(token_ids)
        self._text += self._decode_new(final=False)
        return self._give(len(self._text) - self._held)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        self._text += self._decode_new(final=True)
        return self._give(len(self._text))

    def _decode_new(self, final: bool) -> str:
        """Decode with some tokens of context, since a tokenizer may look left (spaces, UTF-8)."""
        context = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        if len(whole) <= len(context) or (whole.endswith(REPLACEMENT) and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return whole[len(context) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _give(self, until: int) -> str:
        found = [
            at for at in (self._text.find(s, self._search_from()) for s in self._stop) if at >= 0
        ]
        if found:
            self.stopped = True
            until = min(found)
        until = max(until, self._given)
        text, self._given = self._text[self._given : until], until
        return text

    def _search_from(self) -> int:
        return max(0, self._given - self._held)
