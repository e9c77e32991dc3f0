"""ggml's own quantizer, called in its shared library."""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path


def ggml_library() -> Path | None:
    """The file that GGML_LIBRARY names, or the libggml-base of an installed llama_cpp package."""
    if "GGML_LIBRARY" in os.environ:
        return Path(os.environ["GGML_LIBRARY"])
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("lib/*ggml-base.*"), None)


def quantizer(library: Path) -> Callable[..., int]:
    """ggml_quantize_chunk(type, float32 weights, output, first weight, rows, columns, importance)
    where weights, output and importance are addresses; returns the bytes written."""
    quantize = ctypes.CDLL(str(library), os.RTLD_LAZY).ggml_quantize_chunk
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    quantize.restype = ctypes.c_size_t
    return quantize
