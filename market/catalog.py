"""The catalog: models that can be served, what they need and what they cost by default.

Shipped ones are in a file beside this one. Others an operator adds: they are state of the market,
which the scheduler keeps, so whoever knows them passes them in.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from market import pricing
from market.errors import NotFound
from market.types import CURRENCY, RateCard

MIB = 1024 * 1024
OVERHEAD_MIB = 1024
SERVED_CONTEXT_MAX = 32_768
KV_BYTES = 2
CPU_PARAMETERS_MAX = 700_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """A catalog entry. ``source`` is ``local`` (made by our script) or as cluster/sources.py reads.

    Prices are per million tokens, as decimal strings. A model that ``embeds`` makes vectors, not
    answers. Parsers are vLLM's, by name: how the model writes tool calls and reasoning. One that
    was added and ``forgotten`` is sold no more, but its name stays its source's: nodes and gateways
    may have files of that name.
    """

    name: str
    source: str
    licence: str
    parameters: int
    weights_bytes: int
    context_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    input_price: str
    cached_input_price: str
    output_price: str
    embeds: bool = False
    tool_parser: str = "hermes"
    reasoning_parser: str = ""
    forgotten: bool = False

    @property
    def served_context_tokens(self) -> int:
        """Context offered by default: all of it up to 32k, so that one sequence fits a GPU."""
        return min(self.context_tokens, SERVED_CONTEXT_MAX)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of key-value cache per token at 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_dim * KV_BYTES

    @property
    def memory_mib(self) -> int:
        """Memory to serve it: weights, the cache of one full context, 1 GiB for the engine."""
        kv = self.kv_bytes_per_token * self.served_context_tokens
        return -(-(self.weights_bytes + kv) // MIB) + OVERHEAD_MIB

    @property
    def runs_on_cpu(self) -> bool:
        """Small enough to answer at reading speed without a GPU."""
        return self.parameters <= CPU_PARAMETERS_MAX

    def rate_card(self, valid_from: datetime) -> RateCard:
        """The default price as a dated rate card."""
        prices = (
            pricing.parse_price(self.input_price, f"{self.name} input_price"),
            pricing.parse_price(self.cached_input_price, f"{self.name} cached_input_price"),
            pricing.parse_price(self.output_price, f"{self.name} output_price"),
        )
        return pricing.make_rate_card(self.name, prices, valid_from, CURRENCY)


def models(added: Iterable[Model] = ()) -> tuple[Model, ...]:
    """The shipped models (smallest first), then those added.

    A name that was added before it was shipped stays what it was: its files are on disks.
    """
    own = tuple(model for model in added if not model.forgotten)
    names = {model.name for model in own}
    return (*(model for model in _shipped() if model.name not in names), *own)


@cache
def _shipped() -> tuple[Model, ...]:
    with (Path(__file__).parent / "catalog.toml").open("rb") as file:
        entries = tomllib.load(file)
    return tuple(Model(name=name, **facts) for name, facts in entries["models"].items())


def find(name: str, added: Iterable[Model] = ()) -> Model:
    """The entry called ``name``, shipped or ``added``. Raises NotFound with close names."""
    known = models(added)
    for model in known:
        if model.name == name:
            return model
    import difflib

    names = [model.name for model in known]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise NotFound(
        f"model {name!r} is not in the catalog{hint} (market models ls)",
        code="model_not_found",
        param="model",
    )


def default_rate_cards() -> list[RateCard]:
    """Default prices of all shipped models, valid since the catalog's date."""
    return [model.rate_card(datetime(2026, 1, 1, tzinfo=UTC)) for model in models()]
