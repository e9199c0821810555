"""The model store: models on this machine's disk, pulled once, checked, evicted when room is short.

A model is a folder of its name under ``$MARKET_HOME/models``. One that was pulled has a manifest in
it; others, and links, were put there by hand and are never removed. Downloads grow in ``.partial``
and are renamed in when they are complete and right.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from market.catalog import Model
from market.cluster import manifests, pagecache
from market.cluster.manifests import MANIFEST, Manifest
from market.cluster.sources import TOKENIZER, WEIGHTS_AND_TOKENIZER, open_source
from market.errors import Conflict, EngineFailed, InvalidRequest, MarketError, NotFound, Overloaded
from market.types import StoredModel, StoredState

PARTIAL, LOCKS, TOKENIZERS = ".partial", ".locks", ".tokenizers"
# Locks beside the one that says that a model is used, which has its name.
PULL, TOKENIZER_PULL = ".pull", ".tokenizer"
# The lock of who looks for room, of the whole store.
ROOM = ".room"
LIMIT_VARIABLE = "MARKET_MODELS_MAX_GIB"
# Of the disk so much stays free for everything else.
SPARE_BYTES = 2 * 1024**3
# Who looks whether a model is used is gone after so many looks.
LOOKS, LOOK_S = 20, 0.02
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
        return folder if _has(folder, model, weights=False) else store.tokenizer(model)
    except (MarketError, OSError) as error:
        message = error.message if isinstance(error, MarketError) else str(error)
        raise EngineFailed(
            f"could not get {model.name} from {model.source}: {message}; put its files into "
            f"{folder} to use it offline"
        ) from error


def least_used(stored: Iterable[StoredModel], need_bytes: int) -> list[str] | None:
    """The models whose going makes room; None if that is not enough.

    Pulls that broke off go first, then what was not used for longest.
    """
    gone, freed = [], 0
    evictable = (StoredState.READY, StoredState.PARTIAL)
    free = [m for m in stored if m.state in evictable and not (m.pinned or m.in_use)]
    for model in sorted(free, key=lambda m: (m.state is StoredState.READY, m.used_s, m.model)):
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
        """What there is, by name, and which part of it is in memory."""
        return [
            replace(entry, cached=_cached(self._folder / entry.model)) for entry in self._entries()
        ]

    def pull(self, model: Model, *, pin: bool | None = None, evict: bool = True) -> None:
        """Have a model here, complete and right; again goes on or changes nothing but the pin.

        Others are evicted for it, or with ``evict`` false it is not pulled if room is short. What
        was pulled from another source is replaced.

        Raises NotFound, Overloaded (try again; ``storage_full`` if there is no room), Conflict if
        its place is taken, or InvalidRequest if it is not what can be served.
        """
        folder = model_path(model, self._folder)
        if model.source != "local" and not _has(folder, model):
            with self._locked(model.name, fcntl.LOCK_EX, PULL):
                if not _has(folder, model):  # another process may have pulled it meanwhile
                    self._pull(model, folder, evict)
        if pin is not None:
            self.pin(model.name, pin)

    def use(self, model: Model) -> None:
        """Pull it, and keep it from being evicted until this process ends."""
        path, folder = self._folder / LOCKS / model.name, self._folder / model.name
        path.parent.mkdir(parents=True, exist_ok=True)
        while path not in self._using:
            self.pull(model)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _has(folder, model):
                self._using[path] = handle
            else:  # evicted in the moment between
                os.close(handle)
        if not _by_hand(folder):
            with suppress(OSError):
                os.utime(folder / MANIFEST)

    def tokenizer(self, model: Model) -> Path:
        """A folder with all but the weights. Raises as ``pull`` does."""
        folder = self._folder / TOKENIZERS / model.name
        with self._locked(model.name, fcntl.LOCK_EX, TOKENIZER_PULL):
            known = manifests.read(folder)
            if known is None or known.source != model.source:
                source = open_source(model.source)
                files = source.files(TOKENIZER)
                _delete(folder)  # what broke off is small, and may be of another version
                folder.mkdir(parents=True)
                source.download(files, folder)
                manifests.seal(folder, manifests.began(model.source, files), files)
        return folder

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a model until it is unpinned. Raises NotFound if it was not pulled."""
        folder = self._folder / name
        manifest = None if _by_hand(folder) else manifests.read(folder)
        if manifest is None:
            raise NotFound(f"{name} was not pulled here (market models pull {name})")
        manifests.write(folder, replace(manifest, pinned=pinned))

    def remove(self, name: str) -> int:
        """Remove a model or what was pulled of it; the bytes that it had.

        Raises NotFound, Conflict if it is in use or was put there by hand.
        """
        known = {model.model: model for model in self._entries()}.get(name)
        if known is None:
            raise NotFound(f"{name} is not on this disk (market models ls --stored)")
        if known.state == StoredState.BY_HAND:
            raise Conflict(f"{self._folder / name} was put there by hand; remove it by hand")
        with self._free(name, PULL), self._free(name):
            for folder in (self._folder, self._folder / PARTIAL, self._folder / TOKENIZERS):
                _delete(folder / name)
        return known.bytes

    # -- one pull ------------------------------------------------------------------------------

    def _pull(self, model: Model, folder: Path, evict: bool) -> None:
        if _by_hand(folder):
            raise Conflict(
                f"{folder} was put there by hand, without weights as safetensors or without a "
                "tokenizer; complete it or take it away"
            )
        source = open_source(model.source)
        files = source.files(WEIGHTS_AND_TOKENIZER)
        if not any(file.path.endswith(".safetensors") for file in files):
            raise InvalidRequest(f"{model.source} has no weights as safetensors")
        fresh = manifests.began(model.source, files)
        if folder.exists():  # damaged, or from another source
            old = manifests.read(folder)
            fresh = replace(fresh, pinned=old is not None and old.pinned)
            with self._free(model.name):
                _delete(folder)
        partial = self._folder / PARTIAL / model.name
        with self._locked(ROOM, fcntl.LOCK_EX):
            manifest = _begin(partial, fresh)
            self._make_room(model.name, evict)
        source.download(files, partial)
        manifests.seal(partial, manifest, files)
        partial.rename(folder)
        manifests.sync(partial.parent, self._folder)

    def _make_room(self, name: str, evict: bool) -> None:
        """Evict what is needed least for all that is pulled now. Raises Overloaded if it cannot."""
        stored = self._entries()
        to_come = {
            model.model: max(0, model.total_bytes - model.bytes)
            for model in stored
            if model.state is StoredState.PARTIAL and model.in_use
        }
        need_bytes = sum(to_come.values())
        short = need_bytes + SPARE_BYTES - shutil.disk_usage(self._folder).free
        if self._max_bytes is not None:
            had = sum(model.bytes for model in stored if model.state is not StoredState.BY_HAND)
            short = max(short, had + need_bytes - self._max_bytes)
        if short <= 0:
            return
        gone = least_used(stored, short) if evict else None
        if gone is None:
            others = [m.model for m in stored if (m.pinned or m.in_use) and m.model != name]
            raise Overloaded(
                f"{name} needs {to_come[name] / GIB:.2f} GiB, {short / GIB:.2f} GiB more than "
                f"there is room for; pinned, in use or being pulled: {', '.join(others) or 'none'} "
                f"(market models rm, {LIMIT_VARIABLE})",
                code="storage_full",
            )
        for other in gone:
            # One that is used since a moment stays; the disk says whether there is room.
            with suppress(Conflict, NotFound):
                self.remove(other)

    # -- what is there -------------------------------------------------------------------------

    def _entries(self) -> list[StoredModel]:
        found = {}
        for folder in self._folders(self._folder / PARTIAL):
            with suppress(FileNotFoundError):  # renamed in, or removed, in this moment
                found[folder.name] = self._unfinished(folder)
        for folder in self._folders(self._folder):
            with suppress(FileNotFoundError):
                found[folder.name] = self._one(folder)
        return [found[name] for name in sorted(found)]

    def _folders(self, where: Path) -> Iterator[Path]:
        if where.is_dir():
            for path in sorted(where.iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield path

    def _one(self, folder: Path) -> StoredModel:
        name, by_hand = folder.name, _by_hand(folder)
        manifest = None if by_hand else manifests.read(folder)
        if manifest is None:  # one whose manifest is damaged can be pulled again, or go
            state = StoredState.BY_HAND if by_hand else StoredState.PARTIAL
            size, used_s = _size(folder), folder.stat().st_mtime
            in_use = not by_hand and self._in_use(name)
            return StoredModel(name, state, size, size, used_s, False, in_use)
        size = sum(size for size, _ in manifest.files.values())
        used_s, in_use = (folder / MANIFEST).stat().st_mtime, self._in_use(name)
        return StoredModel(name, StoredState.READY, size, size, used_s, manifest.pinned, in_use)

    def _unfinished(self, partial: Path) -> StoredModel:
        name, manifest, size = partial.name, manifests.read(partial), _size(partial)
        total = size if manifest is None else _total(manifest)
        used_s, in_use = partial.stat().st_mtime, self._in_use(name)
        return StoredModel(name, StoredState.PARTIAL, size, total, used_s, False, in_use)

    def read_in(self, name: str) -> None:
        """Read a model's weights, so that they are in memory as far as there is room."""
        with suppress(OSError):  # it may be evicted meanwhile
            for path in (self._folder / name).glob("*.safetensors"):
                pagecache.read_in(path)

    def _in_use(self, name: str) -> bool:
        """Whether somebody uses or pulls it."""
        try:
            with (
                self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB),
                self._locked(name, fcntl.LOCK_SH | fcntl.LOCK_NB, PULL),
            ):
                return False
        except Conflict:
            return True

    @contextmanager
    def _free(self, name: str, kind: str = "") -> Iterator[None]:
        """Hold a lock that nobody has. Raises Conflict if somebody does.

        Whoever only looks whether it is used has the lock for a moment, too: that is waited for.
        """
        with ExitStack() as held:
            for left in reversed(range(LOOKS)):
                try:
                    held.enter_context(self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB, kind))
                    break
                except Conflict:
                    if not left:
                        raise
                    time.sleep(LOOK_S)
            yield

    @contextmanager
    def _locked(self, name: str, how: int, kind: str = "") -> Iterator[None]:
        """Hold a model's lock. Raises Conflict if another has it and we do not wait."""
        path = self._folder / LOCKS / f"{name}{kind}"
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
    try:
        sizes = {path: path.stat().st_size for path in folder.glob("*.safetensors")}
        held = sum(pagecache.cached_share(path) * size for path, size in sizes.items())
    except OSError:
        return 0.0
    return held / sum(sizes.values()) if held else 0.0


def _by_hand(folder: Path) -> bool:
    """Whether it is there and not ours: behind a link may be the store of another market."""
    return folder.is_symlink() or (folder.exists() and not (folder / MANIFEST).exists())


def _has(folder: Path, model: Model, *, weights: bool = True) -> bool:
    """Whether the model can be served from a folder; not if it was pulled from another source."""
    if _by_hand(folder):
        tokenizer = (folder / "tokenizer_config.json").is_file()
        return tokenizer and (not weights or any(folder.glob("*.safetensors")))
    manifest = manifests.read(folder)
    return manifest is not None and manifest.source == model.source


def _begin(partial: Path, fresh: Manifest) -> Manifest:
    """A folder for a download: the one that broke off if it was for the same files."""
    known = manifests.read(partial)
    if known is not None and (known.source, known.listed) == (fresh.source, fresh.listed):
        return known
    _delete(partial)
    partial.mkdir(parents=True)
    manifests.write(partial, fresh)
    return fresh


def _total(manifest: Manifest) -> int:
    return sum(size for size, _ in manifest.listed.values())


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
