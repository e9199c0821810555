"""The model store over folders and a web server of the test's own."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from market import catalog
from market.cluster import models
from market.cluster.agent import Pulls
from market.cluster.models import ModelStore, fetch, least_used
from market.cluster.sources import FileSystem, Hub, SourceFile, open_source
from market.errors import Conflict, EngineFailed, InvalidRequest, NotFound, Overloaded
from market.types import StoredModel, StoredState

WEIGHTS = 300_000  # bytes of a model's weights, about


def make(folder, seed=0, parts=2):
    """A model's files: weights in parts, a configuration, a tokenizer, and code nobody wants."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for part in range(parts):
        tensor = rng.integers(0, 255, WEIGHTS // parts, np.uint8)
        save_file({f"w{part}": tensor}, folder / f"model-{part}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def checksums(folder):
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def model(source, name="qwen-7b"):
    return replace(catalog.find(name), source=str(source))


@pytest.fixture
def origin(tmp_path):
    return make(tmp_path / "origin")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "models").mkdir()
    return ModelStore(tmp_path / "models")


def named(store):
    return {entry.model: entry for entry in store.stored()}


def same(folder, origin):
    """Whether a folder has exactly the origin's weights."""
    ours, theirs = (
        {path.name: path.read_bytes() for path in where.glob("*.safetensors")}
        for where in (folder, origin)
    )
    return ours == theirs


def breaks_off(store, origin):
    """A pull that ends in the middle of its second file of weights."""
    copy, copied = FileSystem._copy, []

    def breaks(self, file, target):
        if copied:
            target.write_bytes((origin / file.path).read_bytes()[:1000])
            raise ConnectionError("cable pulled")
        if file.path.endswith(".safetensors"):
            copied.append(file.path)
        copy(self, file, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "_copy", breaks)
        with pytest.raises(Overloaded, match="cable pulled"):
            store.pull(model(origin))


class TestPull:
    def test_takes_what_can_be_served_and_no_code(self, store, origin, tmp_path):
        store.pull(model(origin))
        folder = tmp_path / "models" / "qwen-7b"
        names = {path.name for path in folder.iterdir()} - {models.MANIFEST}
        assert names == {
            *("model-0.safetensors", "model-1.safetensors"),
            *("config.json", "tokenizer_config.json"),
        }
        for name in names:
            assert (folder / name).read_bytes() == (origin / name).read_bytes()
        entry = named(store)["qwen-7b"]
        assert (entry.state, entry.pinned, entry.in_use) == (StoredState.READY, False, False)
        assert entry.bytes == entry.total_bytes == sum((folder / n).stat().st_size for n in names)
        manifest = json.loads((folder / models.MANIFEST).read_text())
        digest = hashlib.sha256((origin / "config.json").read_bytes()).hexdigest()
        assert manifest["files"]["config.json"][1] == digest

    def test_again_asks_nobody(self, store, origin):
        store.pull(model(origin))
        origin.rename(origin.parent / "gone")
        store.pull(model(origin))

    def test_other_source_replaces_what_was_pulled(self, store, origin, tmp_path):
        store.pull(model(origin), pin=True)
        other = make(tmp_path / "other", seed=1)
        with pytest.raises(NotFound):  # nothing is lost before the other is seen
            store.pull(model(tmp_path / "gone"))
        with holding(store._folder, model(origin)), pytest.raises(Conflict, match="in use"):
            store.pull(model(other))
        assert same(store._folder / "qwen-7b", origin)
        fetch(model(other), store._folder, weights=True)
        assert same(store._folder / "qwen-7b", other)
        assert named(store)["qwen-7b"].pinned

    def test_goes_on_where_it_broke_off(self, store, origin, tmp_path):
        breaks_off(store, origin)
        entry = named(store)["qwen-7b"]
        assert entry.state is StoredState.PARTIAL
        assert 1000 < entry.bytes < entry.total_bytes
        with pytest.raises(FileNotFoundError):
            os.stat(tmp_path / "models" / "qwen-7b")
        store.pull(model(origin))
        assert named(store)["qwen-7b"].state is StoredState.READY

    def test_does_not_go_on_with_another_version(self, store, origin):
        """The source has other files of equal size meanwhile."""
        breaks_off(store, origin)
        shutil.rmtree(origin)
        make(origin, seed=2)
        store.pull(model(origin))
        assert same(store._folder / "qwen-7b", origin)

    def test_does_not_go_on_with_another_source(self, store, origin, tmp_path):
        breaks_off(store, make(tmp_path / "other", seed=1, parts=3))
        store.pull(model(origin))
        assert same(store._folder / "qwen-7b", origin)

    def test_what_is_not_listed_does_not_come_along(self, store, origin):
        breaks_off(store, origin)
        old = store._folder / models.PARTIAL / "qwen-7b" / "old"
        old.mkdir()
        (old / "model-9.safetensors").write_bytes(b"x")
        store.pull(model(origin))
        assert not (store._folder / "qwen-7b" / "old").exists()

    def test_is_on_the_disk_before_it_has_its_name(self, store, origin, monkeypatch):
        """A power cut leaves what was synced until then."""
        synced, before = set(), set()
        fsync, rename = os.fsync, Path.rename

        def syncing(descriptor):
            synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def renaming(path, target):
            before.update(synced)
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(Path, "rename", renaming)
        store.pull(model(origin))
        partial = store._folder / models.PARTIAL / "qwen-7b"
        names = {path.name for path in (store._folder / "qwen-7b").iterdir()}
        written = names - {models.MANIFEST} | {f"{models.MANIFEST}.{os.getpid()}"}
        assert {partial, *(partial / name for name in written)} <= before
        assert {store._folder, partial.parent} <= synced

    @pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"source": "x", "files": 3}'])
    def test_damaged_manifest_is_in_nobodys_way_and_pulled_again(
        self, store, origin, tmp_path, damaged, caplog
    ):
        store.pull(model(origin))
        store.pull(model(origin, "qwen-3b"))
        manifest = store._folder / "qwen-7b" / models.MANIFEST
        manifest.write_text(damaged)
        states = {name: entry.state for name, entry in named(store).items()}
        assert states == {"qwen-7b": StoredState.PARTIAL, "qwen-3b": StoredState.READY}
        assert "damaged" in caplog.text
        with pytest.raises(EngineFailed):
            fetch(model(tmp_path / "gone"), store._folder, weights=True)
        store.pull(model(origin))
        assert named(store)["qwen-7b"].state is StoredState.READY
        manifest.write_text(damaged)
        assert store.remove("qwen-7b") > WEIGHTS

    def test_wrong_checksum_is_thrown_away_and_fetched_again(self, store, origin):
        checksums(origin)
        whole = (origin / "model-0.safetensors").read_bytes()
        (origin / "model-0.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(Overloaded) as caught:
            store.pull(model(origin))
        assert caught.value.code == "checksum_mismatch"
        (origin / "model-0.safetensors").write_bytes(whole)
        store.pull(model(origin))

    def test_what_only_looks_like_weights_is_refused(self, store, origin):
        (origin / "model-1.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"x" * 100)
        with pytest.raises(InvalidRequest, match="no safetensors"):
            store.pull(model(origin))

    def test_truncated_weights_are_refused(self, store, origin):
        whole = (origin / "model-1.safetensors").read_bytes()
        (origin / "model-1.safetensors").write_bytes(whole[:-10])
        with pytest.raises(InvalidRequest, match="no safetensors"):
            store.pull(model(origin))

    def test_needs_safetensors(self, store, origin):
        for path in origin.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(InvalidRequest, match="no weights as safetensors"):
            store.pull(model(origin))

    def test_missing_folder(self, store, origin):
        with pytest.raises(NotFound, match="no files there"):
            store.pull(model(origin.parent / "gone"))

    def test_names_outside_the_folder_are_not_followed(self, store, origin):
        digest = hashlib.sha256(b"x").hexdigest()
        checksums(origin)
        with (origin / "SHA256SUMS").open("a") as file:
            file.write(f"{digest}  ../evil.json\n{digest}  /etc/evil.json\n")
        store.pull(model(origin))
        assert all("evil" not in name for name in os.listdir(store._folder / "qwen-7b"))

    @pytest.mark.parametrize("source", ["nonsense", "a/b/c", "modelscope://a/b", "gopher://x/y"])
    def test_sources_that_nobody_knows(self, source):
        with pytest.raises(InvalidRequest):
            open_source(source)

    def test_hubs_names(self):
        assert isinstance(open_source("Qwen/Qwen2.5-7B-Instruct"), Hub)
        assert isinstance(open_source("hf://Qwen/Qwen2.5-7B-Instruct@main"), Hub)


class TestRoom:
    def fill(self, store, tmp_path):
        """Three models, the first used last."""
        names = ("qwen-3b", "qwen-14b", "qwen-32b")
        for number, name in enumerate(names):
            store.pull(model(make(tmp_path / name, number), name))
            os.utime(store._folder / name / models.MANIFEST, (number, number))
        os.utime(store._folder / names[0] / models.MANIFEST, (9, 9))
        return names

    def test_least_recently_used_goes_first(self, tmp_path, store, origin):
        first, _, third = self.fill(store, tmp_path)
        limited = ModelStore(store._folder, max_bytes=4 * WEIGHTS - 1)
        limited.pull(model(origin))
        assert set(named(store)) == {"qwen-7b", first, third}

    def test_pinned_and_used_ones_stay_and_are_named(self, tmp_path, store, origin):
        first, second, third = self.fill(store, tmp_path)
        store.pin(second, True)
        with holding(store._folder, model(tmp_path / third, third)):
            limited = ModelStore(store._folder, max_bytes=3 * WEIGHTS)
            with pytest.raises(Overloaded, match=f"{second}, {third}") as caught:
                limited.pull(model(make(tmp_path / "big", 7, parts=1), "qwen-72b"))
            assert caught.value.code == "storage_full"
            assert named(store)[third].in_use
            with pytest.raises(Conflict, match="in use"):
                store.remove(third)
        assert set(named(store)) >= {first, second, third}
        store.remove(third)
        assert third not in named(store)

    def test_what_is_pulled_ahead_puts_nobody_out(self, tmp_path, store, origin):
        names = self.fill(store, tmp_path)
        limited = ModelStore(store._folder, max_bytes=4 * WEIGHTS - 1)
        with pytest.raises(Overloaded):
            limited.pull(model(origin), evict=False)
        assert set(named(store)) >= set(names)

    def test_what_others_are_pulling_has_its_room(self, tmp_path, origin, monkeypatch):
        """One may begin to pull while nothing of the other is there yet."""
        store = ModelStore(tmp_path / "models", max_bytes=2 * WEIGHTS)
        copy, began, over = FileSystem._copy, threading.Event(), threading.Event()

        def waits(self, file, target):
            began.set()
            over.wait(10)
            copy(self, file, target)

        monkeypatch.setattr(FileSystem, "_copy", waits)
        thread = threading.Thread(target=store.pull, args=(model(origin),))
        thread.start()
        assert began.wait(10)
        with pytest.raises(Overloaded, match="being pulled: qwen-7b") as caught:
            store.pull(model(origin, "qwen-3b"))
        assert caught.value.code == "storage_full"
        over.set()
        thread.join(10)
        assert named(store)["qwen-7b"].state is StoredState.READY

    def test_what_was_pulled_before_a_break_counts(self, tmp_path, origin):
        store = ModelStore(tmp_path / "models")
        breaks_off(store, origin)
        limited = ModelStore(store._folder, max_bytes=WEIGHTS - 1000)
        with pytest.raises(Overloaded, match="room"):
            limited.pull(model(origin))

    def test_pulls_that_broke_off_go_first(self, tmp_path, store, origin):
        names = self.fill(store, tmp_path)
        breaks_off(store, origin)
        limited = ModelStore(store._folder, max_bytes=int(4.1 * WEIGHTS))
        limited.pull(model(make(tmp_path / "new", 8), "qwen-72b"))
        assert set(named(store)) == {*names, "qwen-72b"}

    def test_full_disk_is_named(self, store, origin, monkeypatch):
        def full(self, file, target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

        monkeypatch.setattr(FileSystem, "_copy", full)
        with pytest.raises(Overloaded, match="disk is full") as caught:
            store.pull(model(origin))
        assert caught.value.code == "storage_full"

    def test_room_is_made_without_a_look_at_memory(self, tmp_path, store, origin, monkeypatch):
        self.fill(store, tmp_path)
        monkeypatch.setattr(models, "_cached", None)
        ModelStore(store._folder, max_bytes=4 * WEIGHTS - 1).pull(model(origin))

    def test_one_that_is_evicted_just_before_it_is_used_comes_back(self, store, origin):
        pull, pulled = store.pull, []

        def raced(model, **options):
            pull(model, **options)
            pulled.append(model.name)
            if len(pulled) == 1:
                store.remove(model.name)

        store.pull = raced
        store.use(model(origin))
        assert pulled == ["qwen-7b"] * 2
        assert named(store)["qwen-7b"].in_use

    def test_who_only_looks_is_in_nobodys_way(self, store, origin):
        store.pull(model(origin))
        looking, over = threading.Event(), threading.Event()

        def look():
            with store._locked("qwen-7b", fcntl.LOCK_EX):
                looking.set()
                over.wait(0.1)

        thread = threading.Thread(target=look)
        thread.start()
        assert looking.wait(10)
        store.remove("qwen-7b")
        thread.join(10)

    def test_room_is_made_for_what_is_missing_only(self):
        ready = StoredState.READY
        stored = [
            StoredModel("a", ready, 5, 5, 1.0),
            StoredModel("b", ready, 5, 5, 2.0),
            StoredModel("c", StoredState.BY_HAND, 50, 50, 0.0),
            StoredModel("d", ready, 50, 50, 0.0, pinned=True),
            StoredModel("e", StoredState.PARTIAL, 2, 50, 9.0),
            StoredModel("f", StoredState.PARTIAL, 9, 50, 0.0, in_use=True),
        ]
        assert least_used(stored, 2) == ["e"]
        assert least_used(stored, 7) == ["e", "a"]
        assert least_used(stored, 8) == ["e", "a", "b"]
        assert least_used(stored, 13) is None

    @pytest.mark.parametrize("text", ["0", "much", "-1"])
    def test_senseless_limits(self, tmp_path, monkeypatch, text):
        monkeypatch.setenv(models.LIMIT_VARIABLE, text)
        with pytest.raises(InvalidRequest, match=models.LIMIT_VARIABLE):
            ModelStore(tmp_path)

    def test_limit_in_gib(self, tmp_path, monkeypatch):
        monkeypatch.setenv(models.LIMIT_VARIABLE, "1.5")
        assert ModelStore(tmp_path)._max_bytes == 1.5 * 2**30


class TestByHand:
    def test_is_served_shown_and_never_removed(self, store, origin):
        (store._folder / "qwen-7b").symlink_to(origin)
        assert fetch(model("nobody/knows"), store._folder, weights=True)
        assert named(store)["qwen-7b"].state is StoredState.BY_HAND
        with pytest.raises(Conflict, match="by hand"):
            store.remove("qwen-7b")
        with pytest.raises(NotFound):
            store.pin("qwen-7b", True)

    def test_link_to_what_another_store_pulled_is_by_hand_all_the_same(
        self, store, origin, tmp_path
    ):
        ModelStore(tmp_path / "other").pull(model(origin))
        linked = tmp_path / "other" / "qwen-7b"
        (store._folder / "qwen-7b").symlink_to(linked)
        os.utime(linked / models.MANIFEST, (9, 9))
        with holding(store._folder, model("nobody/knows")):
            assert named(store)["qwen-7b"].state is StoredState.BY_HAND
        with pytest.raises(NotFound):
            store.pin("qwen-7b", True)
        assert (linked / models.MANIFEST).stat().st_mtime == 9

    def test_folder_without_weights_is_told_before_anything_is_pulled(self, store, origin):
        (store._folder / "qwen-7b").mkdir()
        (store._folder / "qwen-7b" / "tokenizer_config.json").write_text("{}")
        assert fetch(model(origin), store._folder, weights=False) == store._folder / "qwen-7b"
        with pytest.raises(Conflict, match="by hand"):
            store.pull(model(origin))
        assert not (store._folder / models.PARTIAL).exists()

    def test_nothing_to_remove(self, store):
        with pytest.raises(NotFound):
            store.remove("qwen-7b")


class TestFetch:
    def test_tokenizer_comes_without_weights(self, store, origin):
        folder = fetch(model(origin), store._folder, weights=False)
        names = {path.name for path in folder.iterdir()} - {models.MANIFEST}
        assert names == {"config.json", "tokenizer_config.json"}
        assert store.stored() == []

    def test_tokenizer_of_another_source_is_fetched(self, store, origin, tmp_path):
        fetch(model(origin), store._folder, weights=False)
        other = make(tmp_path / "other")
        (other / "tokenizer_config.json").write_text("[]")
        folder = fetch(model(other), store._folder, weights=False)
        assert (folder / "tokenizer_config.json").read_text() == "[]"

    def test_half_a_tokenizer_is_none(self, store, origin):
        (origin / "tokenizer.json").write_text("{}")
        checksums(origin)
        (origin / "tokenizer.json").write_text("{ }")
        for _ in range(2):
            with pytest.raises(EngineFailed, match="promised"):
                fetch(model(origin), store._folder, weights=False)
        (origin / "tokenizer.json").write_text("{}")
        assert (fetch(model(origin), store._folder, weights=False) / "tokenizer.json").exists()

    def test_tokenizer_of_a_model_that_is_here(self, store, origin):
        store.pull(model(origin))
        assert fetch(model(origin), store._folder, weights=False) == store._folder / "qwen-7b"

    def test_says_how_to_do_without_the_source(self, store, origin):
        with pytest.raises(EngineFailed, match="put its files into"):
            fetch(model(origin.parent / "gone"), store._folder, weights=True)

    def test_two_processes_pull_once(self, store, origin):
        context = multiprocessing.get_context("spawn")
        both = [
            context.Process(target=fetch, args=(model(origin), store._folder), kwargs=WITH)
            for _ in range(2)
        ]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        assert named(store)["qwen-7b"].state is StoredState.READY


WITH = {"weights": True}


@contextlib.contextmanager
def holding(folder, used):
    """Another process that uses a model."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder, used, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        done.set()
        process.join(60)


def hold(folder, used, ready, done):
    ModelStore(folder).use(used)
    ready.set()
    done.wait(60)


class Server(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, as object stores serve them; breaks off when the test says so."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.translate_path(self.path)
        if os.path.isdir(path):
            super().do_GET()
            return
        if not os.path.exists(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            content = file.read()
        asked = self.headers.get("range")
        first, last = 0, len(content) - 1
        if asked:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self.server.asked.append((os.path.basename(path), first))
        body = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("accept-ranges", "bytes")
        self.send_header("content-length", str(len(body)))
        self.send_header("content-range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        limit = self.server.limits.pop(os.path.basename(path), None)
        if limit is not None and self.server.gate is not None:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            self.server.gate.wait(60)
            self.close_connection = True
            return
        if limit is not None:
            self.wfile.write(body[:limit])
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, origin):
    """A web server over ``origin``'s parent; ``asked`` are (file, first byte)."""
    handler = functools.partial(Server, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.limits, server.gate = [], {}, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/origin"
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


class TestHttp:
    def test_is_pulled_from_a_listing(self, store, origin, web):
        store.pull(model(web.url))
        for name in ("model-0.safetensors", "config.json"):
            assert (store._folder / "qwen-7b" / name).read_bytes() == (origin / name).read_bytes()
        assert all("bin" not in name and "py" not in name for name, _ in web.asked)

    def test_checksums_are_believed(self, store, origin, web):
        checksums(origin)
        store.pull(model(web.url))
        whole = (origin / "config.json").read_text()
        (origin / "config.json").write_text(whole.replace("qwen2", "qwen3"))
        store.remove("qwen-7b")
        with pytest.raises(Overloaded, match="promised"):
            store.pull(model(web.url))

    def test_only_the_rest_is_asked_for_after_a_break(self, store, origin, web):
        checksums(origin)
        size = (origin / "model-0.safetensors").stat().st_size
        web.limits["model-0.safetensors"] = 0
        with pytest.raises(Overloaded):
            store.pull(model(web.url))
        partial = store._folder / models.PARTIAL / "qwen-7b"
        half = (origin / "model-0.safetensors").read_bytes()[: size // 2]
        (partial / "model-0.safetensors").write_bytes(half)
        web.asked.clear()
        store.pull(model(web.url))
        firsts = [first for name, first in web.asked if name == "model-0.safetensors"]
        assert size // 2 in firsts
        assert 0 not in firsts
        assert named(store)["qwen-7b"].state is StoredState.READY

    def test_connection_that_breaks_is_an_error_to_try_again(self, store, origin, web):
        web.limits["model-0.safetensors"] = 1000
        with pytest.raises(Overloaded) as caught:
            store.pull(model(web.url))
        assert caught.value.code in ("source_unreachable", "checksum_mismatch")
        store.pull(model(web.url))

    def test_killed_in_the_middle_it_goes_on_there(self, tmp_path, store, web):
        """kill -9 of the process that pulls: its lock is gone with it, what it had is not."""
        size = 12 * 1024 * 1024  # three of the blocks in which a file is asked for
        save_file({"w": np.zeros(size, np.uint8)}, tmp_path / "origin" / "model-0.safetensors")
        checksums(tmp_path / "origin")
        web.gate, web.limits = threading.Event(), {"model-1.safetensors": 1000}
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=fetch, args=(model(web.url), store._folder), kwargs=WITH)
        process.start()
        while "model-1.safetensors" not in [name for name, _ in web.asked]:
            assert process.is_alive()
            process.join(0.05)
        process.kill()
        process.join(10)
        web.gate.set()
        entry = named(store)["qwen-7b"]
        assert entry.state is StoredState.PARTIAL
        assert entry.bytes > size
        web.asked.clear()
        store.pull(model(web.url))
        assert "model-0.safetensors" not in [name for name, _ in web.asked]
        assert named(store)["qwen-7b"].state is StoredState.READY

    def test_nobody_answers(self, store):
        with pytest.raises(Overloaded):
            store.pull(model("http://127.0.0.1:9/origin"))


class TestPulls:
    """What a node's agent makes of it."""

    def settle(self, pulls):
        for thread in pulls._threads.values():
            thread.join(30)

    def test_runs_beside_and_tells_how_far_it_is(self, store, origin):
        pulls = Pulls()
        pulls.begin(model(origin), store._folder, pin=True)
        self.settle(pulls)
        (entry,) = pulls.stored(store._folder)
        assert (entry.state, entry.pinned, entry.message) == (StoredState.READY, True, "")
        for pin, pinned in ((None, True), (False, False)):
            pulls.begin(model(origin), store._folder, pin=pin)
            self.settle(pulls)
            assert pulls.stored(store._folder)[0].pinned is pinned
        assert pulls.remove("qwen-7b", store._folder) == entry.bytes

    def test_other_source_is_being_pulled_though_the_old_one_is_there(
        self, store, origin, tmp_path, monkeypatch
    ):
        store.pull(model(origin))
        over, files = threading.Event(), FileSystem.files
        monkeypatch.setattr(FileSystem, "files", lambda *args: over.wait(10) and files(*args))
        pulls = Pulls()
        pulls.begin(model(make(tmp_path / "other")), store._folder, pin=False)
        assert pulls.stored(store._folder)[0].state is StoredState.PULLING
        over.set()
        self.settle(pulls)
        assert pulls.stored(store._folder)[0].state is StoredState.READY

    def test_failure_is_told_until_the_next_try(self, store, origin):
        (origin / "model-1.safetensors").rename(origin / "later")
        (origin / "model-0.safetensors").rename(origin / "earlier")
        pulls = Pulls()
        pulls.begin(model(origin), store._folder, pin=False)
        self.settle(pulls)
        (entry,) = pulls.stored(store._folder)
        assert entry.state is StoredState.FAILED
        assert "safetensors" in entry.message
        (origin / "later").rename(origin / "model-1.safetensors")
        pulls.begin(model(origin), store._folder, pin=False)
        self.settle(pulls)
        (entry,) = pulls.stored(store._folder)
        assert (entry.state, entry.message) == (StoredState.READY, "")


def test_files_of_the_hub_have_checksums_where_they_are_large(monkeypatch):
    class Lfs:
        sha256 = "ab" * 32

    class Sibling:
        def __init__(self, name, size, lfs=None):
            self.rfilename, self.size, self.lfs, self.blob_id = name, size, lfs, f"of {name}"

    class Info:
        siblings = (
            Sibling("model.safetensors", 10, Lfs()),
            Sibling("config.json", 5),
            Sibling("modeling.py", 5),
            Sibling(".gitattributes", 5),
        )

    class Api:
        def model_info(self, repository, revision, files_metadata):
            assert (repository, revision, files_metadata) == ("a/b", "v1", True)
            return Info()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert Hub("a/b", "v1").files(("*.safetensors", "*.json")) == [
        SourceFile("model.safetensors", 10, "ab" * 32, "of model.safetensors"),
        SourceFile("config.json", 5, None, "of config.json"),
    ]
