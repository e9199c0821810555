"""Model files on this machine's disk: local folders, or a download from the hub."""

from pathlib import Path

from market.catalog import Model
from market.errors import EngineFailed, NotFound

WEIGHTS_AND_TOKENIZER = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKENIZER = ["*.json", "*.txt", "*.model", "*.jinja"]


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
    """Make sure the files are in the folder, from the hub if need be; returns the folder.

    Safetensors only and no remote code. Raises EngineFailed if the hub cannot be reached.
    """
    folder = model_path(model, models_dir)
    if model.source == "local" or _complete(folder, weights):
        return folder
    from huggingface_hub import snapshot_download

    patterns = WEIGHTS_AND_TOKENIZER if weights else TOKENIZER
    try:
        snapshot_download(model.source, local_dir=folder, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise EngineFailed(
            f"could not download {model.source} from the hub: {error}; "
            f"put its files into {folder} to use it offline"
        ) from error
    return folder


def _complete(folder: Path, weights: bool) -> bool:
    tokenizer = (folder / "tokenizer_config.json").is_file()
    return tokenizer and (not weights or any(folder.glob("*.safetensors")))
