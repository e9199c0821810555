"""Where model files come from: the Hugging Face hub, ModelScope, and every file system that fsspec
knows: HTTP, S3 and its kind, local folders.

Downloads go on where they broke off, and only what a model needs is taken: weights as safetensors,
never code.
"""

import errno
import fnmatch
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from market.errors import InvalidRequest, NotFound, Overloaded

TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS_AND_TOKENIZER = ("*.safetensors", *TOKENIZER)
# Lists of files with their SHA-256 as sha256sum writes them; where there is one it is believed.
CHECKSUMS = "SHA256SUMS"
# Under what names fsspec's file systems tell the version of a file, the surest first.
VERSIONS = ("ETag", "LastModified", "Last-Modified", "mtime")
BLOCK_BYTES = 4 * 1024 * 1024
READ_TIMEOUT_S = 30
HUB, MODELSCOPE = "hf://", "modelscope://"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a model; ``sha256`` in hexadecimal if the source says it.

    ``version`` changes with the content as far as the source can tell: an ETag, a time.
    """

    path: str
    size: int
    sha256: str | None = None
    version: str | None = None

    @property
    def mark(self) -> str | None:
        """What tells it from another of its size, if anything does."""
        return self.sha256 or self.version


class Source(Protocol):
    """Files of one model. Everything raises NotFound or Overloaded if they cannot be had."""

    def files(self, patterns: Sequence[str]) -> list[SourceFile]:
        """Those whose names match."""
        ...

    def download(self, files: Sequence[SourceFile], folder: Path) -> None:
        """Into the folder, going on with what is there."""
        ...

    def read(self, file: SourceFile, length: int) -> bytes:
        """The beginning of a file; hardly more than that is fetched."""
        ...


def open_source(source: str) -> Source:
    """The source of a catalog entry: ``owner/name`` is the hub's. Raises InvalidRequest."""
    if source.startswith(MODELSCOPE):
        return ModelScope(*_revision(source.removeprefix(MODELSCOPE)))
    if source.startswith(HUB) or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        return Hub(*_revision(source.removeprefix(HUB)))
    if "://" in source or source.startswith("/"):
        return FileSystem(source)
    raise InvalidRequest(
        f"model source {source!r}: use OWNER/NAME of the hub, modelscope://OWNER/NAME, a URL such "
        "as s3://BUCKET/FOLDER or https://HOST/FOLDER, or an absolute path"
    )


class Hub:
    """A repository of the Hugging Face hub; its own client resumes and runs in parallel."""

    def __init__(self, repository: str, revision: str | None) -> None:
        self._repository, self._revision = repository, revision

    def files(self, patterns: Sequence[str]) -> list[SourceFile]:
        """Large files have a checksum."""
        from huggingface_hub import HfApi

        with _reaching(f"the hub's {self._repository}"):
            info = HfApi().model_info(
                self._repository, revision=self._revision, files_metadata=True
            )
        return [
            SourceFile(f.rfilename, f.size or 0, None if f.lfs is None else f.lfs.sha256, f.blob_id)
            for f in info.siblings or ()
            if _wanted(f.rfilename, patterns)
        ]

    def download(self, files: Sequence[SourceFile], folder: Path) -> None:
        """By the hub's client."""
        from huggingface_hub import snapshot_download

        with _reaching(f"the hub's {self._repository}"):
            snapshot_download(
                self._repository,
                revision=self._revision,
                local_dir=folder,
                allow_patterns=[file.path for file in files],
            )

    def read(self, file: SourceFile, length: int) -> bytes:
        """Over HTTP, as its client would."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with _reaching(f"the hub's {self._repository}"):
            url = hf_hub_url(self._repository, file.path, revision=self._revision)
            return _beginning(get_session(), url, build_hf_headers(), length)


class ModelScope:
    """A repository of ModelScope, by its own client if that is installed."""

    def __init__(self, repository: str, revision: str | None) -> None:
        if importlib.util.find_spec("modelscope") is None:
            raise InvalidRequest(
                f"{MODELSCOPE}{repository} needs the package modelscope: pip install modelscope"
            )
        self._repository, self._revision = repository, revision

    def files(self, patterns: Sequence[str]) -> list[SourceFile]:
        """All have a checksum."""
        from modelscope.hub.api import HubApi

        with _reaching(f"ModelScope's {self._repository}"):
            rows: list[dict[str, Any]] = HubApi().get_model_files(
                self._repository, revision=self._revision or "master", recursive=True
            )
        return [
            SourceFile(row["Path"], row["Size"], row.get("Sha256") or None)
            for row in rows
            if row.get("Type") != "tree" and _wanted(row["Path"], patterns)
        ]

    def download(self, files: Sequence[SourceFile], folder: Path) -> None:
        """By ModelScope's client."""
        from modelscope import snapshot_download

        with _reaching(f"ModelScope's {self._repository}"):
            snapshot_download(
                self._repository,
                revision=self._revision or "master",
                local_dir=str(folder),
                allow_patterns=[file.path for file in files],
            )

    def read(self, file: SourceFile, length: int) -> bytes:
        """Over HTTP, as its client would."""
        import httpx
        from modelscope.hub.api import ModelScopeConfig
        from modelscope.hub.file_download import get_file_download_url

        with (
            _reaching(f"ModelScope's {self._repository}"),
            httpx.Client(cookies=ModelScopeConfig.get_cookies()) as client,
        ):
            revision = self._revision or "master"
            url = get_file_download_url(self._repository, file.path, revision)
            return _beginning(client, url, {}, length)


class FileSystem:
    """A folder behind a URL or path. Without SHA256SUMS in it sizes are all that can be checked."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InvalidRequest(f"model source {url}: {error}") from error
        self._root = self._root.rstrip("/")

    def files(self, patterns: Sequence[str]) -> list[SourceFile]:
        """What SHA256SUMS lists, else what the folder has."""
        with _reaching(self._url):
            # What was listed before may have changed since.
            self._fs.invalidate_cache()
            sums = self._checksums()
            paths = sums or dict.fromkeys(
                path.removeprefix(f"{self._root}/") for path in self._fs.find(self._root)
            )
            if not paths:
                raise FileNotFoundError("no files there")
            return [
                self._file(path, known) for path, known in paths.items() if _wanted(path, patterns)
            ]

    def download(self, files: Sequence[SourceFile], folder: Path) -> None:
        """One after another, block by block."""
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with _reaching(f"{self._url}/{file.path}"):
                self._copy(file, target)

    def _file(self, path: str, sha256: str | None) -> SourceFile:
        info = self._fs.info(f"{self._root}/{path}")
        version = next((str(info[key]) for key in VERSIONS if info.get(key)), None)
        return SourceFile(path, int(info["size"] or 0), sha256, version)

    def read(self, file: SourceFile, length: int) -> bytes:
        """In one go from the first byte, which servers without ranges give, too."""
        path = f"{self._root}/{file.path}"
        with (
            _reaching(f"{self._url}/{file.path}"),
            self._fs.open(path, "rb", block_size=length, size=file.size) as source,
        ):
            content: bytes = source.read(length)
            return content

    def _copy(self, file: SourceFile, target: Path) -> None:
        have = target.stat().st_size if target.exists() else 0
        if have > file.size:
            target.unlink()
            have = 0
        if have == file.size:
            target.touch()
            return
        path = f"{self._root}/{file.path}"
        with (
            self._fs.open(path, "rb", block_size=BLOCK_BYTES, size=file.size) as source,
            target.open("ab") as out,
        ):
            source.seek(have)
            while block := source.read(BLOCK_BYTES):
                out.write(block)

    def _checksums(self) -> dict[str, str | None]:
        try:  # asking whether it exists would take a server that is away for a no
            lines = self._fs.cat_file(f"{self._root}/{CHECKSUMS}").decode().splitlines()
        except FileNotFoundError:
            return {}
        rows = (line.split(maxsplit=1) for line in lines if line.strip())
        return {name.lstrip("*").removeprefix("./"): digest for digest, name in rows}


def _beginning(client: Any, url: str, headers: Mapping[str, str], length: int) -> bytes:
    """The first bytes at a URL, whether or not its server knows ranges."""
    asked = {**headers, "range": f"bytes=0-{length - 1}", "accept-encoding": "identity"}
    content = b""
    with client.stream(
        "GET", url, headers=asked, follow_redirects=True, timeout=READ_TIMEOUT_S
    ) as answer:
        answer.raise_for_status()
        for block in answer.iter_bytes():
            content += block
            if len(content) >= length:
                break
    return content[:length]


class _reaching:  # noqa: N801  # reads as a statement
    """Turns what a client throws into our errors."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, FileNotFoundError) or "NotFound" in type(error).__name__:
            raise NotFound(f"{self._what} is not there: {_line(error)}") from error
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise Overloaded(
                f"the disk is full: {self._what} cannot be stored (market models rm)",
                code="storage_full",
            ) from error
        raise Overloaded(
            f"{self._what} cannot be read now: {_line(error)}", code="source_unreachable"
        ) from error


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _revision(text: str) -> tuple[str, str | None]:
    name, _, revision = text.partition("@")
    return name, revision or None


def _wanted(path: str, patterns: Sequence[str]) -> bool:
    """Names only from inside the folder; hidden ones are not the model's."""
    parts = Path(path).parts
    inside = not Path(path).is_absolute() and not any(part.startswith(".") for part in parts)
    return inside and any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
