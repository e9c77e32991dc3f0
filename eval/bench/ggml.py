"""ggml's own quantizer and products, called in its shared libraries."""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_POINTER = ctypes.c_void_p
_NUMBER = ctypes.c_int64
_FLOAT32 = 0  # GGML_TYPE_F32
# Room for the descriptions of three tensors and of a graph, which data does not lie in.
_CONTEXT_BYTES = 1 << 20


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
    quantize.argtypes = [ctypes.c_int, _POINTER, _POINTER, _NUMBER, _NUMBER, _NUMBER, _POINTER]
    quantize.restype = ctypes.c_size_t
    return quantize


class _InitParams(ctypes.Structure):
    """ggml_init_params: `no_alloc` leaves tensors without memory."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


# The functions used: what they take and return, as in ggml.h and ggml-backend.h. Every object is an
# address.
_BASE = {
    "ggml_init": ([_InitParams], _POINTER),
    "ggml_new_tensor_2d": ([_POINTER, ctypes.c_int, _NUMBER, _NUMBER], _POINTER),
    "ggml_mul_mat": ([_POINTER] * 3, _POINTER),
    "ggml_new_graph": ([_POINTER], _POINTER),
    "ggml_build_forward_expand": ([_POINTER] * 2, None),
    "ggml_backend_cpu_buffer_type": ([], _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": ([_POINTER] * 2, _POINTER),
    "ggml_backend_tensor_set": ([_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t], None),
    "ggml_backend_tensor_get": ([_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t], None),
    "ggml_backend_graph_compute": ([_POINTER] * 2, ctypes.c_int),
    "ggml_backend_reg_dev_get": ([_POINTER, ctypes.c_size_t], _POINTER),
    "ggml_backend_reg_get_proc_address": ([_POINTER, ctypes.c_char_p], _POINTER),
    "ggml_backend_dev_supports_op": ([_POINTER] * 2, ctypes.c_bool),
    "ggml_backend_buft_name": ([_POINTER], ctypes.c_char_p),
}
_CPU = {
    "ggml_backend_cpu_init": ([], _POINTER),
    "ggml_backend_cpu_reg": ([], _POINTER),
    "ggml_backend_cpu_set_n_threads": ([_POINTER, ctypes.c_int], None),
}


class Ggml:
    """ggml on this CPU, from a libggml-base and the best libggml-cpu beside it."""

    def __init__(self, library: Path) -> None:
        self.base = _typed(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL), _BASE)
        builds = map(ctypes.CDLL, map(str, library.parent.glob("*ggml-cpu*")))
        self.cpu = _typed(max(builds, key=_score), _CPU)
        self.backend = self.cpu.ggml_backend_cpu_init()
        registry = self.cpu.ggml_backend_cpu_reg()
        self.device = self.base.ggml_backend_reg_dev_get(registry, 0)
        plain = self.base.ggml_backend_cpu_buffer_type()
        self.buffer_types = {"plain": plain} | self._extra(registry)

    def _extra(self, registry: int) -> dict[str, int]:
        """Types of buffers that rearrange weights for quicker products, by name."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.base.ggml_backend_reg_get_proc_address(registry, name)
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(self.device)
        kinds = takewhile(bool, (listed[place] for place in count()))  # ends with a null pointer
        return {self.base.ggml_backend_buft_name(kind).decode(): kind for kind in kinds}

    def context(self) -> int:
        return self.base.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))

    def compute(self, graph: int) -> None:
        """On as many threads as torch has."""
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        status = self.base.ggml_backend_graph_compute(self.backend, graph)
        assert status == 0, status


class GgmlMatrix:
    """A matrix of blocks uint8 [out, ..] of a type of ggml, in a type of buffers."""

    def __init__(
        self, ggml: Ggml, ggml_type: int, blocks: Tensor, columns: int, buffer_type: str
    ) -> None:
        self.ggml = ggml
        self.shape = (len(blocks), columns)
        context = ggml.context()
        kind = ggml.buffer_types[buffer_type]
        self.weights = ggml.base.ggml_new_tensor_2d(context, ggml_type, columns, len(blocks))
        ggml.base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        self.graphs: dict[int, tuple[int, int, int]] = {}  # by the number of tokens
        _, _, result = self._graph(1)
        self.is_supported = ggml.base.ggml_backend_dev_supports_op(ggml.device, result)
        if self.is_supported:
            address = blocks.data_ptr()
            ggml.base.ggml_backend_tensor_set(self.weights, address, 0, blocks.nbytes)

    def product(self, x: Tensor) -> Tensor:
        """x [tokens, in] times the transposed matrix: float32 [tokens, out]."""
        base = self.ggml.base
        given = x.float().contiguous()
        out = torch.empty(len(x), self.shape[0])
        if len(x) not in self.graphs:
            self.graphs[len(x)] = self._graph(len(x))
        graph, inputs, result = self.graphs[len(x)]
        base.ggml_backend_tensor_set(inputs, given.data_ptr(), 0, given.nbytes)
        self.ggml.compute(graph)
        base.ggml_backend_tensor_get(result, out.data_ptr(), 0, out.nbytes)
        return out

    def _graph(self, tokens: int) -> tuple[int, int, int]:
        """(graph, inputs, result) of a product."""
        base = self.ggml.base
        context = self.ggml.context()
        inputs = base.ggml_new_tensor_2d(context, _FLOAT32, self.shape[1], tokens)
        result = base.ggml_mul_mat(context, self.weights, inputs)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, result)
        plain = self.ggml.buffer_types["plain"]
        base.ggml_backend_alloc_ctx_tensors_from_buft(context, plain)
        return graph, inputs, result


def _typed(library: ctypes.CDLL, functions: dict[str, tuple[list, Any]]) -> ctypes.CDLL:
    for name, (takes, returns) in functions.items():
        function = getattr(library, name)
        function.argtypes = takes
        function.restype = returns
    return library


def _score(library: ctypes.CDLL) -> int:
    """How well a libggml-cpu suits this CPU, 0 for not at all; 1 for one that does not say."""
    return library.ggml_backend_score() if hasattr(library, "ggml_backend_score") else 1
