"""Weight files beside those that are read: an older download, another format, a stale index.

transformers takes the file that config.json calls `transformers_weights`, else model.safetensors,
else the shards of the index, and never mentions the others (transformers 5,
`modeling_utils._get_resolved_checkpoint_files`).
"""

from collections.abc import Collection, Iterable
from pathlib import Path

# Of weights only: a training run also leaves optimizer.pt or training_args.bin.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "consolidated*.pt",
    "consolidated*.pth",
)
_NAMED = 3  # of the names in one line
_LONGEST = 100  # characters of a name, which may be as long as a header


def left_aside(path: Path, used: Collection[str]) -> tuple[str, ...]:
    """A line that names the weight files in `path` that are not in `used`; none if there are none.

    `used` are the names of all files that are read, the index among them.
    """
    found = {file.name for pattern in _WEIGHTS for file in path.glob(pattern)}
    others = found - set(used)
    if not others:
        return ()
    first = min(used, default="ckpt-0")
    return (f"{path}: the weights are those of {first}; not read: {named(others)}",)


def unlisted(file: Path, tensors: Collection[str]) -> tuple[str, ...]:
    """A line that names the `tensors` of a shard that the index does not place there, if any."""
    if not tensors:
        return ()
    return (f"{file}: not read, since the index does not place them here: {named(tensors)}",)


def named(names: Iterable[str]) -> str:
    """The first names, an index before the shards that it names, and the number of the others."""
    ordered = sorted(names, key=lambda name: (not name.endswith(".index.json"), name))
    first = ", ".join(name[:_LONGEST] for name in ordered[:_NAMED])
    more = len(ordered) - _NAMED
    return f"{first} and {more} more" if more > 0 else first
