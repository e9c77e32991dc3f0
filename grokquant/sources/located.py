"""Where a model is that somebody names: a directory, one of its files, or a model of the hub."""

from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.published import is_repository
from grokquant.files.unfinished import work_path
from grokquant.sources.gguf_directory import is_own

WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def located(name: str | Path) -> Path:
    """The directory of the model that `name` means, or the .gguf file that describes it alone.

    `name` is that directory, its one file of weights, a .gguf file of any program, or
    ORGANIZATION/NAME of a model in the local cache of the Hugging Face hub; nothing is downloaded.
    Any other path is returned as it is.
    Raises InputError for a file that is only a part of a model.
    """
    path = Path(name)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        described = path.suffix == ".gguf" and not is_own(path.parent)
        return path if described else _directory_of(path)
    is_path = path.exists() or work_path(path).exists()
    if is_path or not is_repository(str(name)):
        return path
    return _cached(str(name)) or path


def _directory_of(file: Path) -> Path:
    """The directory of the model whose weights are all in `file`."""
    parts = sorted(file.parent.glob(f"*{file.suffix}"))
    if len(parts) > 1:
        raise InputError(
            f"{file}: is one of {len(parts)} {file.suffix} files beside each other; give the "
            f"directory of the model, {file.parent}"
        )
    if not (file.parent / "config.json").is_file():
        raise InputError(f"{file}: there is no config.json beside it, which says what it is")
    return file.parent


def _cached(repository: str) -> Path | None:
    """The directory of a downloaded model, None if there is none."""
    # Imported here: most models are directories.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    if not any(path for suffix in WEIGHT_SUFFIXES for path in found.glob(f"*{suffix}")):
        raise InputError(
            f"{repository}: the cache of the hub has none of its weights, only "
            f"{found}; download them with: hf download {repository}"
        )
    return found
