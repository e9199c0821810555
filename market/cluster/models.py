"""The model store: models on this machine's disk, pulled once, checked, evicted when room is short.

A model is a folder of its name under ``$MARKET_HOME/models``. One that was pulled has a manifest in
it; others were put there by hand and are never removed. Downloads grow in ``.partial`` and are
renamed in when they are complete and right.
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from market.catalog import Model
from market.cluster import pagecache
from market.cluster.sources import (
    TOKENIZER,
    WEIGHTS_AND_TOKENIZER,
    SourceFile,
    open_source,
)
from market.errors import Conflict, EngineFailed, InvalidRequest, MarketError, NotFound, Overloaded
from market.types import StoredModel, StoredState

MANIFEST = ".market.json"
PARTIAL, LOCKS, TOKENIZERS = ".partial", ".locks", ".tokenizers"
LIMIT_VARIABLE = "MARKET_MODELS_MAX_GIB"
# Of the disk so much stays free for everything else.
SPARE_BYTES = 2 * 1024**3
# Who looks whether a model is used is gone after so many looks.
LOOKS, LOOK_S = 20, 0.02
HEADER_MAX_BYTES = 100 * 1024 * 1024
GIB = 1024**3


def model_path(model: Model, models_dir: Path) -> Path:
    """Folder of the model. Raises NotFound if a local model was not made yet."""
    folder = models_dir / model.name
    if model.source == "local" and not (folder / "config.json").is_file():
        option = "--embedding " if model.embeds else ""
        raise NotFound(
            f"{model.name} is made on this machine, but {folder} is not there; "
            f"run: scripts/make_tiny_model.py {option}{folder}",
            code="model_not_found",
        )
    return folder


def fetch(model: Model, models_dir: Path, *, weights: bool) -> Path:
    """Make sure the files are on this machine; returns their folder.

    With ``weights`` this process uses the model until it ends: it is not evicted meanwhile. Raises
    EngineFailed if they cannot be had.
    """
    folder, store = model_path(model, models_dir), ModelStore(models_dir)
    if model.source == "local":
        return folder
    try:
        if weights:
            store.use(model)
            return folder
        return folder if _has(folder, weights=False) else store.tokenizer(model)
    except (MarketError, OSError) as error:
        message = error.message if isinstance(error, MarketError) else str(error)
        raise EngineFailed(
            f"could not get {model.name} from {model.source}: {message}; put its files into "
            f"{folder} to use it offline"
        ) from error


def least_used(stored: Iterable[StoredModel], need_bytes: int) -> list[str] | None:
    """The least recently used models whose going makes room; None if that is not enough."""
    gone, freed = [], 0
    free = [m for m in stored if m.state == StoredState.READY and not (m.pinned or m.in_use)]
    for model in sorted(free, key=lambda m: (m.used_s, m.model)):
        if freed >= need_bytes:
            break
        gone.append(model.model)
        freed += model.bytes
    return gone if freed >= need_bytes else None


class ModelStore:
    """The store of one folder; any number of processes may use it."""

    # Locks of what this process uses, until it ends.
    _using: dict[Path, int] = {}  # noqa: RUF012  # one per process, like the locks themselves

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self._folder = folder
        self._max_bytes = _limit(os.environ) if max_bytes is None else max_bytes

    def stored(self) -> list[StoredModel]:
        """What there is, by name."""
        found = {}
        for folder in self._folders(self._folder / PARTIAL):
            found[folder.name] = StoredModel(
                folder.name, StoredState.PARTIAL, *_partial(folder), folder.stat().st_mtime
            )
        for folder in self._folders(self._folder):
            found[folder.name] = self._one(folder)
        return [found[name] for name in sorted(found)]

    def pull(self, model: Model, *, pin: bool = False, evict: bool = True) -> None:
        """Have a model here, complete and right; again goes on or changes nothing.

        Others are evicted for it, or with ``evict`` false it is not pulled if room is short.

        Raises NotFound, Overloaded (try again; ``storage_full`` if there is no room), or
        InvalidRequest if it is not what can be served.
        """
        folder = model_path(model, self._folder)
        if model.source != "local" and not _has(folder, weights=True):
            with self._locked(model.name, fcntl.LOCK_EX):
                if not _has(folder, weights=True):  # another process may have pulled it meanwhile
                    self._pull(model, folder, evict)
        if pin:
            self.pin(model.name, True)

    def use(self, model: Model) -> None:
        """Pull it, and keep it from being evicted until this process ends."""
        path, folder = self._folder / LOCKS / model.name, self._folder / model.name
        path.parent.mkdir(parents=True, exist_ok=True)
        while path not in self._using:
            self.pull(model)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _has(folder, weights=True):
                self._using[path] = handle
            else:  # evicted in the moment between; a pull needs the lock that we have
                os.close(handle)
        with suppress(OSError):
            os.utime(folder / MANIFEST)

    def tokenizer(self, model: Model) -> Path:
        """A folder with all but the weights. Raises as ``pull`` does."""
        folder = self._folder / TOKENIZERS / model.name
        with self._locked(f"{model.name}.tokenizer", fcntl.LOCK_EX):
            if _manifest(folder) is None:
                source = open_source(model.source)
                folder.mkdir(parents=True, exist_ok=True)
                files = source.files(TOKENIZER)
                source.download(files, folder)
                _write(folder, {"source": model.source, "files": _facts(files, folder)})
                _forget_client(folder)
        return folder

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a model until it is unpinned. Raises NotFound if it was not pulled."""
        folder = self._folder / name
        manifest = _manifest(folder)
        if manifest is None:
            raise NotFound(f"{name} was not pulled here (market models pull {name})")
        _write(folder, {**manifest, "pinned": pinned})

    def remove(self, name: str) -> int:
        """Remove a model or what was pulled of it; the bytes that it had.

        Raises NotFound, Conflict if it is in use or was put there by hand.
        """
        known = {model.model: model for model in self.stored()}.get(name)
        if known is None:
            raise NotFound(f"{name} is not on this disk (market models ls --stored)")
        if known.state == StoredState.BY_HAND:
            raise Conflict(f"{self._folder / name} was put there by hand; remove it by hand")
        with self._unused(name):
            for folder in (self._folder, self._folder / PARTIAL, self._folder / TOKENIZERS):
                _delete(folder / name)
        return known.bytes

    # -- one pull ------------------------------------------------------------------------------

    def _pull(self, model: Model, folder: Path, evict: bool) -> None:
        source = open_source(model.source)
        files = source.files(WEIGHTS_AND_TOKENIZER)
        if not any(file.path.endswith(".safetensors") for file in files):
            raise InvalidRequest(f"{model.source} has no weights as safetensors")
        partial = self._folder / PARTIAL / model.name
        partial.mkdir(parents=True, exist_ok=True)
        total = sum(file.size for file in files)
        (partial / MANIFEST).write_text(json.dumps({"total_bytes": total}))
        self._make_room(model.name, total - _partial(partial)[0], evict)
        source.download(files, partial)
        manifest = {"source": model.source, "pinned": False, "files": _facts(files, partial)}
        _write(partial, manifest)
        _forget_client(partial)
        partial.rename(folder)

    def _make_room(self, name: str, need_bytes: int, evict: bool) -> None:
        """Evict what is needed least. Raises Overloaded if that is not enough."""
        stored = [model for model in self.stored() if model.model != name]
        short = need_bytes + SPARE_BYTES - shutil.disk_usage(self._folder).free
        if self._max_bytes is not None:
            had = sum(model.bytes for model in stored if model.state != StoredState.BY_HAND)
            short = max(short, had + need_bytes - self._max_bytes)
        if short <= 0:
            return
        gone = least_used(stored, short) if evict else None
        if gone is None:
            kept = ", ".join(m.model for m in stored if m.pinned or m.in_use) or "none"
            raise Overloaded(
                f"{name} needs {need_bytes / GIB:.2f} GiB, {short / GIB:.2f} GiB more than there "
                f"is room for; pinned or in use: {kept} (market models rm, {LIMIT_VARIABLE})",
                code="storage_full",
            )
        for other in gone:
            # One that is used since a moment stays; the disk says whether there is room.
            with suppress(Conflict, NotFound):
                self.remove(other)

    # -- what is there -------------------------------------------------------------------------

    def _folders(self, where: Path) -> Iterator[Path]:
        if where.is_dir():
            for path in sorted(where.iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield path

    def _one(self, folder: Path) -> StoredModel:
        manifest = _manifest(folder)
        if manifest is None:
            size, used_s = _size(folder), folder.stat().st_mtime
            by_hand = StoredState.BY_HAND
            return StoredModel(folder.name, by_hand, size, size, used_s, cached=_cached(folder))
        size = sum(size for size, _ in manifest["files"].values())
        return StoredModel(
            folder.name,
            StoredState.READY,
            size,
            size,
            (folder / MANIFEST).stat().st_mtime,
            bool(manifest["pinned"]),
            self._in_use(folder.name),
            cached=_cached(folder),
        )

    def read_in(self, name: str) -> None:
        """Read a model's weights, so that they are in memory as far as there is room."""
        with suppress(OSError):  # it may be evicted meanwhile
            for path in (self._folder / name).glob("*.safetensors"):
                pagecache.read_in(path)

    def _in_use(self, name: str) -> bool:
        try:
            with self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except Conflict:
            return True

    @contextmanager
    def _unused(self, name: str) -> Iterator[None]:
        """Nobody uses or pulls the model meanwhile. Raises Conflict if somebody does.

        Whoever only looks whether it is used has the lock for a moment, too: that is waited for.
        """
        with ExitStack() as held:
            for left in reversed(range(LOOKS)):
                try:
                    held.enter_context(self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    break
                except Conflict:
                    if not left:
                        raise
                    time.sleep(LOOK_S)
            yield

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        """Hold a model's lock. Raises Conflict if another has it and we do not wait."""
        path = self._folder / LOCKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, how)
            except BlockingIOError:
                raise Conflict(f"{name} is in use on this machine") from None
            yield
        finally:
            os.close(handle)


def _limit(environ: Mapping[str, str]) -> int | None:
    """Raises InvalidRequest."""
    text = environ.get(LIMIT_VARIABLE)
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise InvalidRequest(f"{LIMIT_VARIABLE}={text!r}: GiB for pulled models, e.g. 200")
    return int(limit * GIB)


def _cached(folder: Path) -> float:
    """Share of its weights that are in memory; 0 if nobody can tell."""
    weights = list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    try:
        held = sum(pagecache.cached_share(path) * path.stat().st_size for path in weights)
    except OSError:
        return 0.0
    return held / size if size else 0.0


def _has(folder: Path, *, weights: bool) -> bool:
    """Whether a folder can be served from; one with a manifest is complete."""
    if _manifest(folder) is not None:
        return True
    tokenizer = (folder / "tokenizer_config.json").is_file()
    return tokenizer and (not weights or any(folder.glob("*.safetensors")))


def _manifest(folder: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return found
    return None


def _write(folder: Path, manifest: Mapping[str, object]) -> None:
    """At once or not at all."""
    fresh = folder / f"{MANIFEST}.{os.getpid()}"
    fresh.write_text(json.dumps(manifest, indent=1))
    fresh.replace(folder / MANIFEST)


def _facts(files: Sequence[SourceFile], folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by path. What is wrong is removed, so that the next pull fetches it again.

    Raises Overloaded for a wrong checksum, InvalidRequest for what can never be served.
    """
    facts = {}
    for file in files:
        path = folder / file.path
        digest = _sha256(path)
        facts[file.path] = file.size, digest
        if path.stat().st_size != file.size or file.sha256 not in (None, digest):
            path.unlink()
            raise Overloaded(
                f"{file.path} is not what its source promised (size or SHA-256); it was removed, "
                "pull again",
                code="checksum_mismatch",
            )
        if path.suffix == ".safetensors":
            _check_safetensors(path)
    return facts


def _check_safetensors(path: Path) -> None:
    """Raises InvalidRequest unless the header fits the file (safetensors format, 8-byte length)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        good = length <= min(size - 8, HEADER_MAX_BYTES)
        try:
            header = json.loads(file.read(length)) if good else None
            tensors = [v for k, v in header.items() if k != "__metadata__"] if header else []
            ends = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            good = header is not None and 8 + length + ends == size
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
    if not good:
        path.unlink()
        raise InvalidRequest(f"{path.name} is no safetensors file")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget_client(folder: Path) -> None:
    """Remove what the hub's client keeps to go on with a download."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _partial(folder: Path) -> tuple[int, int]:
    """(bytes so far, bytes in all) of a download."""
    manifest = _manifest(folder) or {}
    return _size(folder), int(str(manifest.get("total_bytes", 0)))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # parts of downloads come and go
            total += path.stat().st_size if path.is_file() else 0
    return total


def _delete(folder: Path) -> None:
    """Out of sight at once, then gone: a reader never sees a half."""
    if folder.is_dir():
        gone = folder.parent / f".gone-{folder.name}-{time.time_ns()}"
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
