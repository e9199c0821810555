"""What the folder of a pulled model says of itself, and that it holds what it says.

The manifest tells where the files came from. A download has one from its beginning, so that it is
only gone on with for the same files; with ``files`` in it the folder is complete and right.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from market.cluster.sources import SourceFile
from market.errors import InvalidRequest, Overloaded

logger = logging.getLogger(__name__)

MANIFEST = ".market.json"
HEADER_MAX_BYTES = 100 * 1024 * 1024

Facts = Mapping[str, tuple[int, str | None]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """``listed``: by path, size and mark as the source said when the download began.

    ``files``: by path, size and SHA-256 of what is there; empty until it is complete.
    """

    source: str
    listed: Facts = field(default_factory=dict)
    files: Facts = field(default_factory=dict)
    pinned: bool = False


def began(source: str, files: Iterable[SourceFile]) -> Manifest:
    """The manifest of a download that begins."""
    return Manifest(source, {file.path: (file.size, file.mark) for file in files})


def read(folder: Path) -> Manifest | None:
    """None if there is none, or if it is damaged: nothing can be served from there."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        listed, files = (
            {path: (int(size), mark) for path, (size, mark) in found.get(key, {}).items()}
            for key in ("listed", "files")
        )
        return Manifest(found["source"], listed, files, bool(found.get("pinned")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged: %r", folder / MANIFEST, error)
        return None


def write(folder: Path, manifest: Manifest) -> None:
    """At once or not at all, also if the power is cut."""
    fresh = folder / f"{MANIFEST}.{os.getpid()}"
    fresh.write_text(json.dumps(asdict(manifest), indent=1))
    sync(fresh)
    fresh.replace(folder / MANIFEST)
    sync(folder)


def seal(folder: Path, manifest: Manifest, files: Sequence[SourceFile]) -> None:
    """Check what was downloaded, remove all else, and write that it is complete.

    Raises Overloaded for a wrong checksum, InvalidRequest for what can never be served.
    """
    facts = _facts(files, folder)
    _keep_only(folder, facts)
    # The manifest must not outlive a power cut that its files do not.
    sync(*(folder / path for path in facts), *(p for p in folder.rglob("*") if p.is_dir()))
    write(folder, replace(manifest, files=facts))


def sync(*paths: Path) -> None:
    """Have files, or the entries of folders, on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep_only(folder: Path, paths: Collection[str]) -> None:
    """Remove the rest, such as what the hub's client keeps to go on with a download."""
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it has files that are kept
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in (MANIFEST, *paths):
            path.unlink()


def _facts(files: Sequence[SourceFile], folder: Path) -> dict[str, tuple[int, str | None]]:
    """Size and SHA-256 by path. What is wrong is removed, so that the next pull fetches it again.

    Raises Overloaded for a wrong checksum, InvalidRequest for what can never be served.
    """
    facts: dict[str, tuple[int, str | None]] = {}
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
