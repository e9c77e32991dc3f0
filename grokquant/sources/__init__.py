"""Checkpoints as they lie on disk, opened without reading their weights.

A new kind of source is one module with a `SourceKind` and a line in `SOURCE_KINDS`.
"""

from pathlib import Path

from grokquant.errors import InputError
from grokquant.files.links import refuse_links_out
from grokquant.files.unfinished import check_directory
from grokquant.sources import gguf_directory, release, safetensors_directory
from grokquant.sources.kind import SourceKind
from grokquant.types import Source

# In the order in which they are tried.
SOURCE_KINDS: tuple[SourceKind, ...] = (
    release.KIND,
    safetensors_directory.KIND,
    gguf_directory.KIND,
)

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_source(path: Path, config_path: Path | None = None) -> Source:
    """Opens the checkpoint in directory `path`, or the .gguf file `path`; `config_path` replaces
    its config.json.

    Raises InputError where `path` is not a checkpoint of a known kind or is a broken one, and where
    a link in it leads elsewhere.
    """
    try:
        if path.suffix == gguf_directory.SUFFIX and not path.is_dir():
            return gguf_directory.open_source(path, config_path)
        check_directory(path)
        refuse_links_out(path)
        for kind in SOURCE_KINDS:
            if kind.recognizes(path):
                return kind.open_source(path, config_path)
        _refuse_pickles(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if (path / "config.json").is_file():
        text = "it has a config.json but no weights; download them"
        raise InputError(f"{path}: not a checkpoint: {text}")
    wanted = "; ".join(kind.looks_for for kind in SOURCE_KINDS)
    raise InputError(f"{path}: not a checkpoint; looked for {wanted}")


def _refuse_pickles(path: Path) -> None:
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{pickles[0]}: is a pickle, which could run code and is never opened; convert the "
            "model to safetensors if you trust it"
        )
