#!/usr/bin/env python3
"""Make a Qwen2-architecture model of about 1 M parameters from the text that ships with Python.

The tokenizer is a byte-level BPE trained on ``pydoc_data.topics``; the weights are random but
seeded (``--train-steps 0``: same bytes each time, answers are noise) or trained for a few hundred
steps on questions and answers cut from the same text (answers are text, though not wise ones).
The folder says which it is: ``training.json``. ``--embedding`` makes a BERT-architecture encoder of
the same size instead, in the files of sentence-transformers: mean of the token vectors, length one.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 2048
EMBEDDING_CONTEXT_TOKENS = 512
EMBEDDING_SIZE = 128
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM_PROMPT = "You are a helpful assistant."
# Qwen's form of ChatML, tools and their results included.
CHAT_TEMPLATE = (
    "{%- if tools -%}"
    "{{ '<|im_start|>system\n# Tools\n<tools>' }}"
    "{%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}"
    '{{ \'\n</tools>\nCall one as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>\' }}'
    "{{ '<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\n' }}"
    "{%- if message['role'] == 'tool' -%}"
    "{{ '<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{%- else -%}{{ message['content'] or '' }}{%- endif -%}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
QUESTIONS = (
    "What is {topic} in Python?",
    "Tell me about {topic}.",
    "Explain {topic}.",
    "What can you say about {topic}?",
    "{topic}?",
)


def load_topics() -> dict[str, list[str]]:
    """Topic name -> paragraphs of plain prose from Python's own manual pages."""
    from pydoc_data.topics import topics

    result: dict[str, list[str]] = {}
    for name, text in sorted(topics.items()):
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            line = re.sub(r"\s+", " ", block).strip()
            is_prose = len(line) > 60 and line.count(" ") > 8 and not line.startswith((">>>", "::"))
            if is_prose:
                paragraphs.append(re.sub(r"[*`]+", "", line))
        if paragraphs:
            result[name.replace("-", " ")] = paragraphs
    return result


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer with the ChatML markers as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(seed: int, hidden_size: int, layers: int) -> Any:
    """A Qwen2 causal language model with seeded random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def build_encoder(seed: int) -> Any:
    """A BERT encoder with seeded random weights: texts that share words get near vectors."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=EMBEDDING_SIZE,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=EMBEDDING_CONTEXT_TOKENS,
        pad_token_id=0,
    )
    return BertModel(config, add_pooling_layer=False)


def save_pooling(folder: Path) -> None:
    """The files by which sentence-transformers knows what comes after the encoder."""
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(steps)
    ]
    pooling = {"word_embedding_dimension": EMBEDDING_SIZE, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


def conversations(topics: dict[str, list[str]], rng: random.Random) -> str:
    """One ChatML conversation: a question about a topic and a paragraph that answers it."""
    topic = rng.choice(list(topics))
    question = rng.choice(QUESTIONS).format(topic=topic)
    paragraphs = topics[topic]
    answer = paragraphs[min(int(rng.expovariate(0.7)), len(paragraphs) - 1)]
    system = f"{IM_START}system\n{SYSTEM_PROMPT}{IM_END}\n" if rng.random() < 0.3 else ""
    return f"{system}{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"


def train(model: Any, tokenizer: Any, topics: dict[str, list[str]], steps: int, seed: int) -> float:
    """Train on packed conversations; returns the mean loss of the last tenth of the steps."""
    import torch

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1
    )
    batch, length = 16, 192
    stream: list[int] = []
    losses: list[float] = []
    model.train()
    began = time.monotonic()
    for step in range(steps):
        while len(stream) < batch * length:
            stream.extend(tokenizer.encode(conversations(topics, rng)).ids)
        ids = torch.tensor(stream[: batch * length]).view(batch, length)
        del stream[: batch * length]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            print(f"\r  step {step + 1}/{steps}  loss {losses[-1]:.2f}  {spent:.0f} s", end="")
            sys.stdout.flush()
    print()
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def save(
    folder: Path, model: Any, tokenizer: Any, facts: dict[str, object], embedding: bool
) -> None:
    """Write everything beside its final place, then rename: a crash leaves no half model."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    staging.chmod(0o755)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        chat_template=None if embedding else CHAT_TEMPLATE,
        model_max_length=EMBEDDING_CONTEXT_TOKENS if embedding else CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(staging)
    if embedding:
        save_pooling(staging)
    else:
        model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(staging)
    (staging / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(staging, folder)


def main() -> None:
    """Command line: where to write, how long to train, with which seed."""
    home = Path(os.environ.get("MARKET_HOME", Path.home() / ".market"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="default: tiny-qwen or tiny-embed")
    parser.add_argument("--embedding", action="store_true", help="make an embedding model")
    parser.add_argument("--train-steps", type=int, default=0, help="0 leaves seeded random weights")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--hidden-size", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="more make loading take longer")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if it is there")
    arguments = parser.parse_args()
    embedding = arguments.embedding
    if embedding and arguments.train_steps:
        parser.error("--train-steps: embedding models are not trained here")
    if arguments.hidden_size % 64 or arguments.hidden_size <= 0:
        parser.error("--hidden-size: must be a multiple of 64")
    if arguments.folder is None:
        arguments.folder = home / "models" / ("tiny-embed" if embedding else "tiny-qwen")
    if arguments.if_missing and (arguments.folder / "training.json").is_file():
        print(f"model is there: {arguments.folder}")
        return
    began = time.monotonic()
    topics = load_topics()
    texts = [paragraph for paragraphs in topics.values() for paragraph in paragraphs]
    tokenizer = train_tokenizer(texts)
    if embedding:
        model = build_encoder(arguments.seed)
    else:
        model = build_model(arguments.seed, arguments.hidden_size, arguments.layers)
    loss = None
    if arguments.train_steps > 0:
        loss = train(model, tokenizer, topics, arguments.train_steps, arguments.seed)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    facts: dict[str, object] = {
        "trained": arguments.train_steps > 0,
        "train_steps": arguments.train_steps,
        "seed": arguments.seed,
        "final_loss": None if loss is None else round(loss, 3),
        "parameters": parameters,
    }
    save(arguments.folder, model, tokenizer, facts, embedding)
    kind = "trained" if facts["trained"] else "random weights"
    spent = time.monotonic() - began
    print(f"made {arguments.folder} ({parameters:,} parameters, {kind}) in {spent:.0f} s")


if __name__ == "__main__":
    main()
