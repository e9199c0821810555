"""One suite for every engine: the fake, transformers and vLLM, the latter two for real."""

import asyncio
import ctypes
import mmap
import re
from contextlib import aclosing

import msgspec
import pytest
import pytest_asyncio

from market.errors import InvalidRequest
from market.fakes import FakeEngine
from market.types import EngineRequest, FinishReason, Grammar, GrammarKind, Sampling
from serve_apps.engines import transformers as transformers_engine
from serve_apps.engines.base import EngineSettings, start_engine

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

PROMPT = tuple(range(40, 60))
CONTEXT = 1024


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def start(tiny_model):
    """Engines by name, each started once for both fixtures below."""
    started = {"fake": FakeEngine()}

    async def get(name):
        if name not in started:
            settings = EngineSettings(tiny_model, max_context_tokens=CONTEXT, gpu_fraction=0.0)
            started[name] = await start_engine(name, settings)
            started[name].name = name
        return started[name]

    yield get
    del started["fake"]
    for engine in started.values():
        await engine.close()


@pytest_asyncio.fixture(
    loop_scope="module", scope="module", params=["fake", "transformers", "vllm"]
)
async def engine(request, start):
    """Every engine, for what the port promises."""
    return await start(request.param)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["transformers", "vllm"])
async def real(request, start):
    """Engines with a language model inside, for what sampling means."""
    return await start(request.param)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def transformers(start):
    """The engine that needs little."""
    return await start("transformers")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def vllm(start):
    """The engine that can do everything."""
    return await start("vllm")


_ids = iter(range(1_000_000))


def ask(max_tokens=8, prompt=PROMPT, salt="acme", **sampling):
    sampling = {"temperature": 0.0, "ignore_eos": True} | sampling
    return EngineRequest(f"r{next(_ids)}", prompt, Sampling(max_tokens, **sampling), salt)


async def run(engine, request):
    return [chunk async for chunk in engine.generate(request)]


def tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def text(chunks):
    return "".join(chunk.text for chunk in chunks)


class TestCounts:
    async def test_are_cumulative_and_match_the_tokens_given(self, engine):
        produced = 0
        async for chunk in engine.generate(ask(20)):
            produced += len(chunk.token_ids)
            assert chunk.counts.output_tokens == produced
            assert chunk.counts.input_tokens == len(PROMPT)
            assert 0 <= chunk.counts.cached_input_tokens <= len(PROMPT)
        assert produced == 20

    async def test_max_tokens_ends_with_length_in_the_last_chunk_only(self, engine):
        chunks = await run(engine, ask(5))
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])

    @pytest.mark.parametrize("limit", [1, 2, 200])
    async def test_exactly_max_tokens_are_generated(self, engine, limit):
        assert len(tokens(await run(engine, ask(limit)))) == limit

    async def test_prompt_may_fill_the_context_but_for_one_token(self, real):
        prompt = tuple(n % 1000 + 10 for n in range(CONTEXT - 1))
        chunks = await run(real, ask(1, prompt))
        assert chunks[-1].counts.input_tokens == CONTEXT - 1

    async def test_answer_in_blocks_is_the_streamed_one(self, vllm):
        asked = ask(100, temperature=1.0, seed=7, logprobs=2)
        streamed = await run(vllm, asked)
        whole = await run(vllm, msgspec.structs.replace(asked, request_id="whole", stream=False))
        assert (tokens(whole), text(whole)) == (tokens(streamed), text(streamed))
        assert sum(len(chunk.logprobs) for chunk in whole) == 100
        assert len(whole) <= 5
        assert whole[-1].counts.output_tokens == 100

    async def test_concurrent_answers_do_not_mix(self, real):
        alone = [tokens(await run(real, ask(12, PROMPT[n:]))) for n in range(4)]
        together = await asyncio.gather(*(run(real, ask(12, PROMPT[n:])) for n in range(4)))
        assert [tokens(chunks) for chunks in together] == alone


class TestAbort:
    async def test_closing_frees_the_engine_for_others(self, engine):
        async with aclosing(engine.generate(ask(900))) as chunks:
            await anext(chunks)
        assert len(tokens(await run(engine, ask(3)))) == 3

    async def test_cancelling_a_waiting_reader_is_an_abort_too(self, engine):
        async def read():
            async with aclosing(engine.generate(ask(900))) as chunks:
                async for _ in chunks:
                    started.set()

        started = asyncio.Event()
        reader = asyncio.create_task(read())
        await started.wait()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert len(tokens(await run(engine, ask(3)))) == 3

    async def test_many_aborts_leave_room_for_a_full_batch(self, real):
        for _ in range(40):
            async with aclosing(real.generate(ask(900))) as chunks:
                await anext(chunks)
        answers = await asyncio.gather(*(run(real, ask(10)) for _ in range(32)))
        assert [len(tokens(chunks)) for chunks in answers] == [10] * 32


LIKELIEST = pytest.mark.parametrize(
    "cut", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=["top_k", "top_p", "min_p"]
)


class TestSampling:
    async def test_zero_temperature_is_deterministic(self, real):
        first, second = [tokens(await run(real, ask(20))) for _ in range(2)]
        assert first == second

    async def test_seed_repeats_and_another_seed_differs(self, real):
        def seeded(seed):
            return run(real, ask(20, temperature=1.0, seed=seed))

        a, again, b = [tokens(await seeded(seed)) for seed in (1, 1, 2)]
        assert a == again != b

    async def test_without_a_seed_answers_differ(self, real):
        a, b = [tokens(await run(real, ask(30, temperature=1.0))) for _ in range(2)]
        assert a != b

    @LIKELIEST
    async def test_cut_to_the_likeliest_is_greedy(self, transformers, cut):
        greedy = tokens(await run(transformers, ask(10)))
        assert tokens(await run(transformers, ask(10, temperature=1.0, **cut))) == greedy

    @LIKELIEST
    async def test_cut_to_the_likeliest_takes_it(self, vllm, cut):
        """In bfloat16 several are the likeliest now and then, and greedy may take another."""
        chunks = await run(vllm, ask(10, temperature=1.0, logprobs=1, **cut))
        positions = [position for chunk in chunks for position in chunk.logprobs]
        assert len(positions) == 10
        for position in positions:
            assert position.chosen.logprob == max(top.logprob for top in position.top)

    async def test_extreme_values_harm_nobody(self, real):
        extreme = {"temperature": 1e-4, "top_p": 1e-300, "min_p": 1.0, "repetition_penalty": 10.0}
        await run(real, ask(5, **extreme, logit_bias=((5, 100.0), (6, -100.0))))
        assert len(tokens(await run(real, ask(3)))) == 3

    async def test_logit_bias_forces_and_forbids(self, real):
        forced = tokens(await run(real, ask(5, logit_bias=((77, 100.0),))))
        assert forced == [77] * 5
        free = tokens(await run(real, ask(5)))
        forbidden = tokens(await run(real, ask(5, logit_bias=((free[0], -100.0),))))
        assert free[0] not in forbidden

    async def test_penalties_stop_repetition(self, real):
        bias = ((77, 4.0), (78, 3.9), (79, 3.8))
        plain = tokens(await run(real, ask(12, logit_bias=bias)))
        penalised = tokens(
            await run(real, ask(12, logit_bias=bias, frequency_penalty=2.0, presence_penalty=2.0))
        )
        assert len(set(penalised)) > len(set(plain))

    async def test_repetition_penalty_changes_the_answer(self, real):
        plain = tokens(await run(real, ask(30)))
        assert tokens(await run(real, ask(30, repetition_penalty=5.0))) != plain


class TestStop:
    async def test_end_token_ends_with_stop_and_is_counted(self, real):
        end = ((2, 100.0),)  # <|im_end|>
        chunks = await run(real, ask(10, logit_bias=end, ignore_eos=False))
        assert chunks[-1].finish_reason is FinishReason.STOP
        assert chunks[-1].counts.output_tokens == 1
        assert text(chunks) == ""

    async def test_stop_string_ends_the_text_before_it(self, real):
        whole = text(await run(real, ask(40)))
        stop = whole[len(whole) // 2 :][:3]
        assert stop.strip(), "the seeded model's answer changed; choose another slice"
        chunks = await run(real, ask(40, stop=(stop,)))
        assert text(chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason is FinishReason.STOP
        assert chunks[-1].counts.output_tokens < 40

    async def test_min_tokens_holds_the_end_back(self, real):
        end = ((2, 50.0),)
        chunks = await run(real, ask(10, logit_bias=end, ignore_eos=False, min_tokens=4))
        assert 4 <= chunks[-1].counts.output_tokens <= 5


class TestText:
    async def test_is_the_decoded_tokens_whatever_the_chunks(self, real, tiny_model):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        chunks = await run(real, ask(120, temperature=1.0, seed=5))
        assert text(chunks) == tokenizer.decode(tokens(chunks), skip_special_tokens=True)


class TestPrivacy:
    async def test_prefix_cache_is_not_shared_between_salts(self, real):
        prompt = tuple(n * 7 % 900 + 20 for n in range(300))
        await run(real, ask(1, prompt, salt="first"))
        other = await run(real, ask(1, prompt, salt="second"))
        assert other[-1].counts.cached_input_tokens == 0

    async def test_vllm_reports_cached_tokens_within_a_salt(self, real):
        prompt = tuple(n * 11 % 900 + 20 for n in range(300))
        await run(real, ask(1, prompt, salt="same"))
        again = await run(real, ask(1, prompt, salt="same"))
        cached = again[-1].counts.cached_input_tokens
        if real.name == "vllm":
            assert 0 < cached < len(prompt)
        else:
            assert cached == 0  # the transformers engine shares nothing at all


async def test_health_is_good_while_it_runs(real):
    await real.check_health()


class TestLogprobs:
    async def test_vllm_gives_the_chosen_and_the_best_per_token(self, vllm):
        request = ask(6, logprobs=3)
        chunks = await run(vllm, request)
        positions = [position for chunk in chunks for position in chunk.logprobs]
        assert [position.chosen.token_id for position in positions] == tokens(chunks)
        for position in positions:
            best = [top.logprob for top in position.top]
            assert len(best) == 3
            assert best == sorted(best, reverse=True)
            assert position.chosen.logprob == best[0]  # greedy

    async def test_vllm_gives_those_of_the_prompt(self, vllm):
        chunks = await run(vllm, ask(1, prompt_logprobs=1))
        given = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs]
        (positions,) = given
        assert positions[0] is None  # nothing comes before the first
        assert [position.chosen.token_id for position in positions[1:]] == list(PROMPT[1:])


class TestGrammar:
    @pytest.mark.parametrize(
        ("kind", "constraint", "matches"),
        [
            (GrammarKind.JSON_OBJECT, "", r"\s*\{[\s\S]*"),
            (GrammarKind.JSON_SCHEMA, '{"type": "boolean"}', r"\s*(true|false)"),
            (GrammarKind.REGEX, "[ab]{3}", r"[ab]{3}"),
            (GrammarKind.CHOICE, '["left", "right"]', r"left|right"),
            (GrammarKind.GRAMMAR, 'root ::= "x" "y"?', r"xy?"),
        ],
    )
    async def test_vllm_keeps_to_it(self, vllm, kind, constraint, matches):
        request = ask(24, temperature=1.0, ignore_eos=False)
        request = msgspec.structs.replace(request, grammar=Grammar(kind, constraint))
        assert re.fullmatch(matches, text(await run(vllm, request)))

    async def test_vllm_refuses_a_broken_one(self, vllm):
        request = msgspec.structs.replace(ask(4), grammar=Grammar(GrammarKind.REGEX, "("))
        with pytest.raises(InvalidRequest, match="vLLM refused"):
            await run(vllm, request)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"sampling": Sampling(1, logprobs=1)}, "logprobs"),
        ({"grammar": Grammar(GrammarKind.JSON_OBJECT, "")}, "response_format"),
        ({"chat": b"{}"}, "tools"),
    ],
)
async def test_transformers_refuses_what_it_cannot(start, asked, named):
    engine = await start("transformers")
    with pytest.raises(InvalidRequest, match=named) as caught:
        await run(engine, msgspec.structs.replace(ask(1), **asked))
    assert caught.value.param == named


async def test_cache_of_transformers_takes_memory_only_where_it_is_used(transformers):
    await run(transformers, ask())
    cache = transformers._manager.batch_processor.cache.cache_tensor
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-cache.nbytes // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    address, size = ctypes.c_void_p(cache.data_ptr()), ctypes.c_size_t(cache.nbytes)
    assert libc.mincore(address, size, resident) == 0, ctypes.get_errno()
    used = sum(page & 1 for page in resident)
    assert 0 < used < pages // 2


async def test_rehearsal_is_a_whole_answer(monkeypatch):
    asked = []
    generate = transformers_engine.TransformersEngine.generate

    def watched(self, request):
        asked.append(request.sampling.max_tokens)
        return generate(self, request)

    monkeypatch.setattr(transformers_engine.TransformersEngine, "generate", watched)
    await asyncio.to_thread(transformers_engine.rehearse)
    assert asked == [2]
