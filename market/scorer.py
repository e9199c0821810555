"""How hard a request is, in [0, 1]: TF-IDF features, hashed, under a logistic regression.

The weights in scorer.json were trained by scripts/train_scorer.py on public answers of a strong and
a cheaper model; docs/lanes.md says how well they do. Any object with ``score`` and ``usual`` can
stand in (MARKET_SCORER). Written by hand, because it is twenty lines and a gateway must not load a
machine learning library for them.
"""

import base64
import importlib
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from market.errors import InvalidRequest

BUCKETS = 4096
# Beyond this a text is not read: it is scored while others' streams wait.
TEXT_MAX = 2000
# Beside the words: the logarithm of the length, and shares of what tells kinds of questions apart.
DENSE = 5

Vector = NDArray[np.float32]


class Scorer(Protocol):
    """Says how hard requests are."""

    @property
    def usual(self) -> Sequence[float]:
        """Quantiles of what it says of usual requests, in order."""
        ...

    def score(self, text: str) -> float:
        """In [0, 1]; above a threshold it is one for the strong model."""
        ...


def counted(text: str) -> Counter[int]:
    """Words and pairs of words of a text by hashed bucket. Stable over processes and versions."""
    words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text[:TEXT_MAX].lower())
    pairs = (f"{one} {two}" for one, two in itertools.pairwise(words))
    return Counter(zlib.crc32(term.encode()) % BUCKETS for term in (*words, *pairs))


def dense(text: str) -> list[float]:
    """Features of the text as a whole, each about in [0, 1]."""
    cut = text[:TEXT_MAX]
    length = max(1, len(cut))
    return [
        math.log1p(length) / 10,
        sum(map(str.isdigit, cut)) / length * 5,
        cut.count("\n") / length * 20,
        cut.count("?") / 4,
        sum(cut.count(mark) for mark in "{}()=<>\\^") / length * 10,
    ]


def features(text: str, idf: Vector) -> Vector:
    """``BUCKETS + DENSE`` numbers; the words' part has length one."""
    found = np.zeros(BUCKETS + DENSE, np.float32)
    for bucket, count in counted(text).items():
        found[bucket] = (1 + math.log(count)) * idf[bucket]
    found[:BUCKETS] /= max(1e-9, float(np.linalg.norm(found[:BUCKETS])))
    found[BUCKETS:] = dense(text)
    return found


class LinearScorer:
    """A logistic regression."""

    def __init__(self, weights: Vector, bias: float, idf: Vector, usual: Sequence[float]) -> None:
        self._weights = weights
        self._bias = bias
        self._idf = idf
        self.usual = tuple(usual)

    def score(self, text: str) -> float:
        """The probability that only the strong model answers well."""
        value = float(features(text, self._idf) @ self._weights) + self._bias
        return 1 / (1 + math.exp(-value))

    def save(self, path: Path) -> None:
        """As JSON; numbers at 16 bits, which change no decision."""
        facts = {
            "weights": _packed(self._weights),
            "idf": _packed(self._idf),
            "bias": self._bias,
            "usual": [round(value, 4) for value in self.usual],
        }
        path.write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "LinearScorer":
        """What ``save`` wrote."""
        facts = json.loads(path.read_text())
        weights, idf = _unpacked(facts["weights"]), _unpacked(facts["idf"])
        return cls(weights, facts["bias"], idf, facts["usual"])


@cache
def load_scorer(name: str = "") -> Scorer:
    """The scorer called ``package.module:name``; the market's own without a name.

    Raises InvalidRequest if there is none.
    """
    if not name:
        return LinearScorer.load(Path(__file__).parent / "scorer.json")
    module, _, attribute = name.partition(":")
    try:
        found: Scorer = getattr(importlib.import_module(module), attribute)
        assert len(found.usual) > 0, "usual is empty"
        assert 0 <= found.score("") <= 1, "scores must be in [0, 1]"
    except Exception as error:
        raise InvalidRequest(
            f"MARKET_SCORER={name!r}: no scorer there ({error}); it is package.module:name of an "
            "object with score(text) and usual"
        ) from error
    return found


def _packed(values: Vector) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> Vector:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
