"""What a model is and needs, read where its files are: its configuration and its weights' headers.

No weights are downloaded, and no code of the model's own is run.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from market.cluster.manifests import HEADER_MAX_BYTES
from market.cluster.sources import WEIGHTS_AND_TOKENIZER, Source, SourceFile, open_source
from market.errors import InvalidRequest

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
# How the files of sentence-transformers are known: they make vectors.
EMBEDDING_MARK = "modules.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# The headers of nearly all files are shorter.
HEAD_BYTES = 256 * 1024
JSON_MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Facts:
    """What the catalog says of a model, as far as its files do."""

    parameters: int
    weights_bytes: int
    context_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    embeds: bool


def read_facts(source: str, parameters: int | None = None) -> Facts:
    """The facts of the model at a source; ``parameters`` only for one that is quantized.

    Raises InvalidRequest if it cannot be served or described, NotFound, Overloaded.
    """
    try:
        if urlsplit(source).password is not None:  # whoever may see the catalog would see it
            raise InvalidRequest(
                "source: leave the password out of its URL; clients take it from the environment"
            )
        return _read(_Files(source), parameters)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{source}: its files make no sense: {error!r}") from error


class _Files:
    """The files at a source, by path."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._origin: Source = open_source(source)
        self.by_path = {file.path: file for file in self._origin.files(WEIGHTS_AND_TOKENIZER)}

    def json(self, path: str) -> Any:
        """Raises InvalidRequest if it is not there."""
        file = self.by_path.get(path)
        if file is None:
            raise InvalidRequest(f"{self.source} has no {path}")
        if file.size > JSON_MAX_BYTES:
            raise InvalidRequest(f"{self.source}: {path} is too large")
        return json.loads(self._origin.read(file, file.size))

    def header(self, file: SourceFile) -> dict[str, Any]:
        """What a safetensors file says of its tensors. Raises InvalidRequest."""
        head = self._origin.read(file, min(HEAD_BYTES, file.size))
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else file.size
        if not 2 <= length <= min(file.size - 8, HEADER_MAX_BYTES):
            raise InvalidRequest(f"{self.source}: {file.path} is no safetensors file")
        if len(head) < 8 + length:
            head = self._origin.read(file, 8 + length)
        header: dict[str, Any] = json.loads(head[8 : 8 + length])
        header.pop("__metadata__", None)
        return header


def _read(files: _Files, parameters: int | None) -> Facts:
    config = files.json(CONFIG)
    weights = _weights(files)
    embeds = EMBEDDING_MARK in files.by_path
    text = _text_config(files.source, config, embeds)
    heads = _whole(files.source, text, "num_attention_heads")
    width = _whole(files.source, text, "hidden_size")
    context_tokens = _whole(files.source, text, "max_position_embeddings")
    if embeds and TOKENIZER_CONFIG in files.by_path:  # some positions are not for tokens
        limit = files.json(TOKENIZER_CONFIG).get("model_max_length", context_tokens)
        context_tokens = min(context_tokens, int(limit))
    return Facts(
        parameters=_parameters(files, weights, config, parameters),
        weights_bytes=sum(file.size for file in weights),
        context_tokens=context_tokens,
        layers=_whole(files.source, text, "num_hidden_layers"),
        kv_heads=_whole(files.source, text, "num_key_value_heads", heads),
        head_dim=_whole(files.source, text, "head_dim", width // heads),
        embeds=embeds,
    )


def _weights(files: _Files) -> list[SourceFile]:
    """The files that are loaded: others may hold the same weights in another form."""
    if INDEX in files.by_path:
        names = sorted(set(files.json(INDEX)["weight_map"].values()))
    elif WEIGHTS in files.by_path:
        names = [WEIGHTS]
    else:
        names = [n for n in sorted(files.by_path) if n.endswith(".safetensors") and "/" not in n]
    missing = [name for name in names if name not in files.by_path]
    if missing or not names:
        what = f"no {missing[0]}, which its index lists" if missing else "no weights as safetensors"
        raise InvalidRequest(f"{files.source} has {what}")
    return [files.by_path[name] for name in names]


def _text_config(source: str, config: Mapping[str, Any], embeds: bool) -> Any:
    """The configuration of what reads and writes text, with the defaults of its kind."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING_NAMES:
        raise InvalidRequest(
            f"{source} is of kind {kind!r}, which is not known here, and code of a model's own is "
            "never run"
        )
    try:
        known = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        text = known.get_text_config()
    except Exception as error:  # its classes raise what they like
        reason = str(error).strip().splitlines()[-1:]
        raise InvalidRequest(f"{source}: {CONFIG} is wrong: {' '.join(reason)}") from error
    names = [str(name) for name in config.get("architectures") or ()]
    writes = any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)
    if known.is_encoder_decoder or not (writes or embeds):
        raise InvalidRequest(
            f"{source} is a {', '.join(names) or kind}: neither a language model (...ForCausalLM) "
            f"nor one that makes embeddings ({EMBEDDING_MARK} of sentence-transformers)"
        )
    return text


def _parameters(
    files: _Files, weights: list[SourceFile], config: Mapping[str, Any], told: int | None
) -> int:
    """Numbers in all tensors; what packs several into one must be told how many there were."""
    headers = [files.header(file) for file in weights]
    count: int = sum(math.prod(t["shape"]) for header in headers for t in header.values())
    if "quantization_config" in config:
        if told is None:
            raise InvalidRequest(
                f"{files.source} is quantized, so its parameters cannot be counted: say how many "
                "it has (--parameters)",
                param="parameters",
            )
        return told
    if told is not None:
        raise InvalidRequest(
            f"{files.source} has {count} parameters, as its files say; leave --parameters out",
            param="parameters",
        )
    return count


def _whole(source: str, config: Any, name: str, default: int | None = None) -> int:
    """Raises InvalidRequest unless it is a number from 1 on."""
    said = getattr(config, name, None)
    value = default if said is None else said
    if not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{source}: {CONFIG} says {name}={value!r}, so it cannot be placed")
    return value
