"""Vectors of a real encoder: the same alone and in a batch, and those that transformers gives."""

import asyncio
import json
import shutil
from contextlib import aclosing

import numpy as np
import pytest
import pytest_asyncio

from market.errors import EngineFailed, InvalidRequest
from market.types import EngineRequest, FinishReason, Sampling
from serve_apps.engines.base import EngineSettings, start_engine
from serve_apps.engines.embeddings import read_pooling

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

TEXTS = [
    "Assignment statements are used to bind names to values.",
    "An assignment statement binds a name to some value.",
    "Zebras!",
    "The operator or evaluates its left operand first and then, only if needed, its right one.",
]
_ids = iter(range(1_000_000))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_embed):
    settings = EngineSettings(tiny_embed, max_context_tokens=512, gpu_fraction=0.0, embeds=True)
    engine = await start_engine("transformers", settings)
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_embed):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_embed)


async def embed(engine, token_ids):
    request = EngineRequest(f"r{next(_ids)}", tuple(token_ids), Sampling(1), "acme", embeds=True)
    (chunk,) = [chunk async for chunk in engine.generate(request)]
    assert chunk.finish_reason is FinishReason.STOP
    assert (chunk.counts.input_tokens, chunk.counts.output_tokens) == (len(token_ids), 0)
    return np.frombuffer(chunk.embedding, "<f4")


async def test_vectors_are_the_mean_of_the_token_vectors_normalised(engine, tokenizer, tiny_embed):
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_embed).eval()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = hidden.mean(axis=0)
        found = await embed(engine, ids)
        assert found == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


async def test_neighbours_in_a_batch_do_not_change_a_vector(engine, tokenizer):
    asked = [tokenizer.encode(text) for text in TEXTS * 8]
    alone = [await embed(engine, ids) for ids in asked[: len(TEXTS)]]
    together = await asyncio.gather(*(embed(engine, ids) for ids in asked))
    for index, vector in enumerate(together):
        assert vector == pytest.approx(alone[index % len(TEXTS)], abs=1e-5)


async def test_texts_with_the_same_words_are_nearer(engine, tokenizer):
    one, other, zebras, _ = [await embed(engine, tokenizer.encode(text)) for text in TEXTS]
    assert one @ other > one @ zebras


async def test_a_reader_that_goes_leaves_the_others_their_vectors(engine, tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    leaving = asyncio.create_task(embed(engine, ids))
    await asyncio.sleep(0)
    leaving.cancel()
    assert len(await embed(engine, ids)) == 128


async def test_an_answer_is_refused(engine):
    request = EngineRequest("r", (1, 2), Sampling(5), "acme")
    with pytest.raises(InvalidRequest, match="embeddings only"):
        async with aclosing(engine.generate(request)) as chunks:
            await anext(chunks)


async def test_pooling_comes_from_the_models_own_files(tiny_embed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_embed, folder)
    config = folder / "1_Pooling" / "config.json"
    for name, how in (("cls_token", "first"), ("lasttoken", "last")):
        config.write_text(json.dumps({f"pooling_mode_{name}": True}))
        assert read_pooling(folder) == (how, True)
    config.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EngineFailed, match="max_tokens is not known"):
        read_pooling(folder)
    (folder / "modules.json").unlink()
    assert read_pooling(folder) == ("mean", True)
