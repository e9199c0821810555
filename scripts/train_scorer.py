"""Train the scorer that deals requests between two models, and say how well it does.

    python scripts/train_scorer.py --answers FOLDER [--write]

FOLDER holds CSV files with the columns ``prompt`` and, for each of two models, whether it answered
right (the cheap one first): those of a checkout of lm-sys/RouteLLM under ``routellm/evals``, or
answers of your own models. A fifth of the questions, and besides some whole subjects, are held out.
"""

import argparse
import csv
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from market.scorer import BUCKETS, LinearScorer, counted, features

csv.field_size_limit(sys.maxsize)
HELD_OUT_SUBJECTS = ("college_physics", "formal_logic", "marketing", "world_religions", "nutrition")
DECAY = 3e-4
SHARES = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and who answered it right."""

    text: str
    subject: str
    cheap: bool
    strong: bool


def read(folder: Path) -> Iterator[Answered]:
    """All questions of the CSV files under a folder."""
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="") as file:
            rows = csv.reader(file)
            next(rows)
            for row in rows:
                if len(row) >= 3 and {row[1], row[2]} <= {"True", "False"}:
                    # The tail that all questions of a benchmark share says nothing of one.
                    text = row[0].removesuffix("Answer:")
                    yield Answered(text, path.stem, row[1] == "True", row[2] == "True")


def train(known: list[Answered]) -> LinearScorer:
    """Fit by L-BFGS; the label is whether only the strong model was right."""
    seen = np.zeros(BUCKETS, np.float32)
    for question in known:
        seen[list(counted(question.text))] += 1
    idf = np.log((1 + len(known)) / (1 + seen)).astype(np.float32) + 1
    inputs = torch.from_numpy(np.stack([features(q.text, idf) for q in known]))
    labels = torch.tensor([float(q.strong and not q.cheap) for q in known])
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss = loss + DECAY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    plain = LinearScorer(weights.detach().numpy(), bias.item(), idf, [0.5])
    scores = np.array([plain.score(q.text) for q in known])
    usual = np.quantile(scores, np.linspace(0.025, 0.975, 39)).tolist()
    return LinearScorer(weights.detach().numpy(), bias.item(), idf, usual)


def say(name: str, scorer: LinearScorer, held: list[Answered]) -> None:
    """Accuracy by the share of requests that the strong model gets, against a blind deal."""
    order = np.argsort([-scorer.score(q.text) for q in held], kind="stable")
    cheap = np.array([q.cheap for q in held], float)[order]
    strong = np.array([q.strong for q in held], float)[order]
    low, high = cheap.mean(), strong.mean()
    print(f"{name}: {len(held)} questions; right: cheap {low:.3f}, strong {high:.3f}")
    for share in SHARES:
        count = round(share * len(held))
        right = (strong[:count].sum() + cheap[count:].sum()) / len(held)
        got = (right - low) / (high - low)
        print(
            f"  strong for {share:.0%}: right {right:.3f}, {got:.0%} of the gap (blind {share:.0%})"
        )
    gains = np.cumsum(strong - cheap) / (strong - cheap).sum()
    print(f"  APGR (area under the gap's curve; blind 0.5): {gains.mean():.3f}")


def main() -> None:
    """Split, train, report, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="replace market/scorer.json")
    arguments = parser.parse_args()
    questions = list(read(arguments.answers))
    subjects = [q for q in questions if q.subject.removeprefix("mmlu_") in HELD_OUT_SUBJECTS]
    rest = [q for q in questions if q.subject.removeprefix("mmlu_") not in HELD_OUT_SUBJECTS]
    held = [q for q in rest if zlib.crc32(q.text.encode()) % 5 == 0]
    known = [q for q in rest if zlib.crc32(q.text.encode()) % 5]
    scorer = train(known)
    print(f"trained on {len(known)} questions")
    say("held-out questions", scorer, held)
    say("held-out subjects", scorer, subjects)
    if arguments.write:
        path = Path(__file__).parent.parent / "market" / "scorer.json"
        scorer.save(path)
        print(f"wrote {path.name}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
