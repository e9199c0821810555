#!/usr/bin/env python3
"""Tools of others against the market, unchanged: ``vllm bench serve`` and lm-eval.

Each gets an address, a key and a tokenizer, nothing else. What they print of themselves is shown;
then the market's ledger is read: every answer must be there, and charged by exactly the tokens that
the tool counted. lm-eval lives in an environment of its own beside ours, made at the first run.

    .venv/bin/python scripts/check_clients.py [--prompts 200]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from own_market import MODEL, OwnMarket, tiny_model

LM_EVAL = ("lm_eval[api]==0.4.13", "transformers==5.24.0")
# What the command ``vllm bench serve`` runs; the command itself looks for a package named vllm.
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: %s
doc_to_text: "{{question}}"
doc_to_target: %s
%smetric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": f"What is the colour of {thing}?", "answers": ["blue", "green"], "answer": answer}
    for thing, answer in (("the sky", 0), ("grass", 1), ("the sea", 0), ("a leaf", 1))
]


def run(command: list[str], **env: str) -> str:
    """Run to the end; its output. Raises SystemExit with it if that fails."""
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def rows(own: OwnMarket, tenant: str, count: int) -> pd.DataFrame:
    """The tenant's ledger rows, once there are so many. Raises SystemExit if there never are."""
    deadline = time.monotonic() + 30
    mine = pd.DataFrame()
    while len(mine) < count and time.monotonic() < deadline:
        time.sleep(0.5)
        usage = pd.read_parquet(own.home / "ledger" / "usage")
        mine = usage[usage["tenant_id"] == tenant]
    if len(mine) != count:
        raise SystemExit(f"the ledger has {len(mine)} rows of {tenant}, not {count}")
    return mine


def vllm_bench(own: OwnMarket, tokenizer: Path, prompts: int) -> None:
    """Random prompts at 32 at a time, counted on both sides."""
    key = own.tenant("vllm-bench")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BENCH, "--base-url", own.url, "--model", MODEL]
        command += ["--tokenizer", str(tokenizer), "--dataset-name", "random"]
        command += ["--random-input-len", "64", "--random-output-len", "64"]
        command += ["--num-prompts", str(prompts), "--max-concurrency", "32", "--save-result"]
        command += ["--result-dir", folder, "--result-filename", "result.json", "--ignore-eos"]
        print(run(command, OPENAI_API_KEY=key)[-2400:])
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    booked = rows(own, "vllm-bench", prompts)
    check("answers", result["completed"], len(booked))
    check("input tokens", result["total_input_tokens"], int(booked["input_tokens"].sum()))
    check("output tokens", result["total_output_tokens"], int(booked["output_tokens"].sum()))


def lm_eval(own: OwnMarket, tokenizer: Path) -> None:
    """A local task by log probabilities of given answers, and one by generated text."""
    key = own.tenant("lm-eval")
    asked = 0
    for kind, target, choices, metric in (
        ("multiple_choice", "answer", 'doc_to_choice: "{{answers}}"\n', "acc"),
        ("generate_until", '"{{answers[answer]}}"', "", "exact_match"),
    ):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = folder / "questions.jsonl"
            data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
            task = TASK % (data, kind, target, choices, metric)
            (folder / "colours.yaml").write_text(task)
            arguments = f"model={MODEL},base_url={own.url}/v1/completions,tokenizer={tokenizer}"
            arguments += ",tokenizer_backend=huggingface,num_concurrent=4"
            command = [str(lm_eval_python().parent / "lm_eval"), "run"]
            command += ["--model", "local-completions", "--model_args", arguments]
            command += ["--tasks", "colours", "--include_path", name]
            print(run(command, OPENAI_API_KEY=key, HF_HOME=name)[-900:])
        asked += len(QUESTIONS) * (2 if kind == "multiple_choice" else 1)
        check(f"requests of {kind}", asked, len(rows(own, "lm-eval", asked)))


def lm_eval_python() -> Path:
    """lm-eval in an environment of its own beside ours, made at the first run."""
    folder = Path(sys.executable).parent.parent / "lm-eval"
    python, stamp = folder / "bin" / "python", folder / LM_EVAL[0]
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", *LM_EVAL]
        subprocess.run(pip, check=True)
        stamp.touch()
    return python


def check(what: str, told: int, booked: int) -> None:
    """Raises SystemExit if the tool counted otherwise than the ledger."""
    print(f"{what}: the tool counted {told}, the ledger has {booked}")
    if told != booked:
        raise SystemExit(1)


def main() -> None:
    """Start a market, run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", type=Path, help="folder of the tiny model, made if missing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="market-clients-") as name:
        folder = Path(name)
        model = tiny_model(arguments.model or folder / MODEL)
        with OwnMarket(folder / "home", model) as own:
            own.cli("deploy", MODEL, "--mode", "tokens", "--engine", "vllm")
            vllm_bench(own, model, arguments.prompts)
            lm_eval(own, model)


if __name__ == "__main__":
    main()
