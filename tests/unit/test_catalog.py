"""Models that an operator adds: what their files say, and who knows of them."""

import functools
import http.server
import json
import threading
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from market import catalog
from market.catalog import Model
from market.cluster.facts import HEAD_BYTES, Facts, read_facts
from market.config import Config
from market.errors import Conflict, InvalidRequest, MarketError, NotFound
from market.scheduler.shares import GatewayReport
from market.types import Deployment, LanePolicy, Mode, Place, Replica, ReplicaState
from serve_apps.live import LiveRoutes
from serve_apps.model import ReplicaSettings, settings_of
from tests.boxes import FARM, order, pool
from tests.hub import hub
from tests.samples import NOON
from tests.unit.test_models import Server

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 512,
}
PART = 3_000_000  # bytes of a weights file: more than what is read of it
OURS = Model("ours", "/srv/ours", "MIT", 1_000_000, 2_000_000, 2048, 4, 2, 32, "0.1", "0.05", "0.4")


@pytest.fixture
def folder(tmp_path):
    """Weights in two parts, and the same once more in a form that is not loaded."""
    made = tmp_path / "origin"
    made.mkdir()
    index = {}
    for number in (1, 2):
        name = f"model-{number}-of-2.safetensors"
        save_file({f"w{number}": np.zeros((PART // 2, 1), np.float16)}, made / name)
        index[f"w{number}"] = name
    save_file({"all": np.zeros(2 * PART, np.uint8)}, made / "consolidated.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "tokenizer_config.json").write_text("{}")
    return made


def facts(folder, **changes):
    size = sum(path.stat().st_size for path in folder.glob("model-*"))
    return replace(Facts(PART, size, 512, 2, 2, 16, False), **changes)


class Careful(Server):
    """Knows how much of each file it was asked for."""

    def do_GET(self):  # noqa: N802  # http.server's name
        if self.path.endswith(".safetensors"):
            _, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
            self.server.lasts.append(int(last))
        super().do_GET()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Knows no ranges."""

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    """Starts a web server over the folder's parent; the folder's URL."""
    servers = []

    def start(handler):
        made = functools.partial(handler, directory=str(tmp_path))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
        server.asked, server.limits, server.gate, server.lasts = [], {}, None, []
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/origin"
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class TestFacts:
    def test_of_a_folder(self, folder):
        assert read_facts(str(folder)) == facts(folder)

    def test_of_a_web_server_without_its_weights(self, folder, serve):
        server = serve(Careful)
        assert read_facts(server.url) == facts(folder)
        assert len(server.lasts) == 2
        assert max(server.lasts) < 2 * HEAD_BYTES < PART

    def test_of_a_web_server_that_knows_no_ranges(self, folder, serve):
        assert read_facts(serve(Quiet).url) == facts(folder)

    def test_of_the_hub(self, folder, monkeypatch):
        with hub("acme/ours", folder) as server:
            files = server.address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
            monkeypatch.setattr(constants, "ENDPOINT", server.address)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            assert read_facts("acme/ours") == facts(folder)
            assert read_facts("acme/ours@v1") == facts(folder)
        assert not any(path.endswith("consolidated.safetensors") for _, path in server.asked)

    def test_header_longer_than_what_is_read_at_first(self, folder, serve):
        (folder / "model.safetensors.index.json").unlink()
        many = {f"layers.{i}.weight": np.zeros(1, np.float16) for i in range(6000)}
        save_file(many, folder / "model.safetensors")
        size = (folder / "model.safetensors").stat().st_size
        assert size > HEAD_BYTES
        for source in (str(folder), serve(Careful).url, serve(Quiet).url):
            assert read_facts(source).parameters == 6000

    def test_what_makes_vectors(self, folder):
        bert = CONFIG | {"model_type": "bert", "architectures": ["BertModel"]}
        (folder / "config.json").write_text(json.dumps(bert))
        (folder / "modules.json").write_text("[]")
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 510}')
        wanted = facts(folder, embeds=True, context_tokens=510, kv_heads=4)
        assert replace(read_facts(str(folder)), kv_heads=4) == wanted

    def test_quantized_one_must_say_its_parameters(self, folder):
        packed = CONFIG | {"quantization_config": {"quant_method": "awq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(packed))
        with pytest.raises(InvalidRequest, match="--parameters"):
            read_facts(str(folder))
        assert read_facts(str(folder), 7_000_000).parameters == 7_000_000

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model_type": "of-its-own", "auto_map": {"AutoModel": "m.M"}}, "never run"),
            ({"model_type": None}, "not known"),
            ({"architectures": ["Qwen2ForSequenceClassification"]}, "neither a language model"),
            ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "neither"),
            ({"num_hidden_layers": "two"}, "config.json is wrong"),
            ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ],
    )
    def test_configurations_that_are_refused(self, folder, changes, words):
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(InvalidRequest, match=words):
            read_facts(str(folder))

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("config.json", None, "has no config.json"),
            ("config.json", b"[1, 2]", "make no sense"),
            ("config.json", b"\xff", "make no sense"),
            ("model-2-of-2.safetensors", None, "which its index lists"),
            ("model-2-of-2.safetensors", b"short", "no safetensors file"),
            ("model-2-of-2.safetensors", b"\xff" * 100, "no safetensors file"),
            ("model-2-of-2.safetensors", b"\x02" + bytes(7) + b"xx", "make no sense"),
        ],
    )
    def test_files_that_are_refused(self, folder, name, content, words):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(InvalidRequest, match=words):
            read_facts(str(folder))

    def test_needs_safetensors(self, folder):
        for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(InvalidRequest, match="no weights as safetensors"):
            read_facts(str(folder))

    @pytest.mark.parametrize(
        ("source", "error", "words"),
        [
            ("nonsense", InvalidRequest, "absolute path"),
            ("local", InvalidRequest, "absolute path"),
            ("/not/there", NotFound, "not there"),
            ("http://127.0.0.1:9/ours", MarketError, "cannot be read now"),
            ("https://me:secret@host/ours", InvalidRequest, "password"),
        ],
    )
    def test_sources_that_are_refused(self, source, error, words):
        with pytest.raises(error, match=words) as caught:
            read_facts(source)
        assert "secret" not in str(caught.value)


def prices(box):
    """Of output, in the order in which they were set."""
    return [card.output_pico for card in box.ledger._cards.values() if card.model == "ours"]


class TestScheduler:
    async def test_added_one_is_priced_deployed_and_there_after_a_restart(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.add_model(OURS)
            assert prices(farm) == [400_000]
            await pool(scheduler, "ours", minimum=1, maximum=1)
        async with farm.opened() as scheduler:
            assert await scheduler.model("ours") == OURS
            await farm.rounds(scheduler, 5)
            assert [route.model for route in (await scheduler.routes()).ready] == ["ours"]
            assert await scheduler.pull_model("ours", [], False) == ["farm"]

    async def test_same_again_changes_nothing(self, farm):
        async with farm.opened() as scheduler:
            for _ in range(2):
                await scheduler.add_model(OURS)
            assert (await scheduler.models()).count(OURS) == 1
            assert prices(farm) == [400_000]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"name": "tiny-qwen"}, "shipped"),
            ({"source": "/elsewhere"}, "added already, from /srv/ours"),
            ({"output_price": "0.5"}, "market prices set ours"),
            ({"name": "smart"}, "deployment auto-acme-smart"),
        ],
    )
    async def test_name_that_means_something_else(self, farm, changes, words):
        async with farm.opened() as scheduler:
            await scheduler.add_model(OURS)
            deal = LanePolicy(2.0, cheap="smollm2-135m", strong="tiny-qwen")
            await scheduler.open_auto("smart", "acme", deal)
            cards = len(farm.ledger._cards)
            with pytest.raises(Conflict, match=words):
                await scheduler.add_model(replace(OURS, **changes))
            assert (await scheduler.models())[-1] == OURS
            assert prices(farm) == [400_000]
            assert len(farm.ledger._cards) == cards

    async def test_one_without_a_price_is_not_there(self, farm, monkeypatch):
        async def down(*_, **__):
            raise MarketError("the ledger does not answer")

        async with farm.opened() as scheduler:
            monkeypatch.setattr(farm.ledger, "add_rate_cards", down)
            with pytest.raises(MarketError):
                await scheduler.add_model(OURS)
            with pytest.raises(NotFound):
                await scheduler.model("ours")

    async def test_forgotten_one_is_sold_no_more_and_keeps_its_name(self, farm):
        async with farm.opened() as scheduler:
            await scheduler.add_model(OURS)
            deployment, _ = await pool(scheduler, "ours", minimum=0, maximum=1)
            with pytest.raises(Conflict, match=deployment.deployment_id):
                await scheduler.forget_model("ours")
            await scheduler.undeploy("ours")
            await farm.rounds(scheduler, 5)
            asked = order(model="ours", gpu_count=2, max_price_pico=1)
            await scheduler.order(asked, queue=True)
            with pytest.raises(Conflict, match="order-1"):
                await scheduler.forget_model("ours")
            await scheduler.cancel_order("order-1", None)
            await scheduler.forget_model("ours")
        async with farm.opened() as scheduler:
            for command in (scheduler.model("ours"), pool(scheduler, "ours", minimum=1, maximum=1)):
                with pytest.raises(NotFound, match="not in the catalog"):
                    await command
            with pytest.raises(NotFound):
                await scheduler.forget_model("ours")
            with pytest.raises(Conflict, match="shipped"):
                await scheduler.forget_model("tiny-qwen")
            with pytest.raises(Conflict, match="files may still be on"):
                await scheduler.add_model(replace(OURS, source="/elsewhere"))
            farm.clock.advance(1)
            dearer = replace(OURS, output_price="0.8")
            await scheduler.add_model(dearer)
            assert await scheduler.model("ours") == dearer
            assert prices(farm) == [400_000, 800_000]

    async def test_one_forgotten_while_it_is_deployed_is_not_deployed(self, farm, monkeypatch):
        """The price is asked for outside the lock."""
        async with farm.opened() as scheduler:
            await scheduler.add_model(OURS)
            price = farm.ledger.rate_card

            async def slow(name):
                await scheduler.forget_model("ours")
                return await price(name)

            monkeypatch.setattr(farm.ledger, "rate_card", slow)
            with pytest.raises(NotFound):
                await pool(scheduler, "ours", minimum=0, maximum=1)
            assert await scheduler.deployments() == []


async def test_every_gateway_learns_of_it_with_its_routes(farm, tmp_path):
    async with farm.opened() as scheduler:
        await scheduler.add_model(OURS)
        for name in ("gw0", "gw1"):
            told = await scheduler.sync(GatewayReport(name, 1, {}, frozenset()))
            routes = LiveRoutes(Config(tmp_path, "http://127.0.0.1:1"), None, None, dict, None)
            with pytest.raises(NotFound):
                routes.model("ours")
            routes.know(told.models)
            assert routes._prompters._find("ours") == OURS
        await scheduler.forget_model("ours")
        told = await scheduler.sync(GatewayReport("gw0", 1, {}, frozenset()))
        routes.know(told.models)
        with pytest.raises(NotFound):
            routes.model("ours")


def test_replica_is_told_all_of_its_model(tmp_path):
    place = Place("farm", "farm", (1,), 500)
    replica = Replica("r-0", "d", place, ReplicaState.WAITING, "", NOON)
    deployment = Deployment("d", "ours", Mode.TOKENS, "vllm", None, NOON)
    told = json.loads(json.dumps(settings_of(replica, deployment, OURS, FARM, tmp_path, 4)))
    assert msgspec.convert(told, ReplicaSettings).model == OURS


def test_name_that_is_shipped_later_stays_the_operators():
    own = replace(OURS, name="qwen-7b")
    assert catalog.find("qwen-7b", [own]) == own
    assert [model.name for model in catalog.models([own])].count("qwen-7b") == 1
