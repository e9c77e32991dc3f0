"""Everything a release pickle may contain: six names, and placeholders for three objects.

No real object is ever made. Every call and every state in a file is compared with the one form that
the release's writer produces; anything else is Malformed.
"""

import math
from dataclasses import dataclass
from typing import Any

MAX_RANK = 3
ITEM_SIZES = {"int8": 1, "float32": 4, "bfloat16": 2}


class Malformed(Exception):
    """The reason why a file is refused, without its name."""


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise Malformed(complaint)


@dataclass(frozen=True)
class Global:
    """A pair of strings that named a Python object where the file was written."""

    module: str
    name: str


@dataclass(frozen=True)
class Blob:
    """Bytes of the file, not read; `value` is set where there is just one."""

    offset: int
    nbytes: int
    value: bytes | None = None


@dataclass(frozen=True)
class ArrayHeader:
    """One array of a file: `field` is "weight" or "scales", or "" in a file of a single array.

    `dtype` is "int8", "float32" or "bfloat16"; the `nbytes` bytes at `offset` are in C order.
    """

    field: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(eq=False)
class Dtype:
    """Stands for a numpy dtype; `complete` once its state has been set."""

    name: str
    complete: bool = False


@dataclass(eq=False)
class Array:
    """Stands for a numpy array; `data` is None until its state has been set."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: Blob | None = None


@dataclass(eq=False)
class Record:
    """Stands for a QuantizedWeight8bit; `fields` is None until its state has been set."""

    fields: dict[str, Any] | None = None


RECORD = Global("__main__", "QuantizedWeight8bit")
NDARRAY = Global("numpy", "ndarray")
DTYPE = Global("numpy", "dtype")
BFLOAT16 = Global("ml_dtypes", "bfloat16")
RECONSTRUCT = (  # numpy 1 and numpy 2
    Global("numpy.core.multiarray", "_reconstruct"),
    Global("numpy._core.multiarray", "_reconstruct"),
)
GLOBALS = {RECORD, NDARRAY, DTYPE, BFLOAT16, *RECONSTRUCT}

DTYPE_ARGUMENTS = {"int8": "i1", "float32": "f4", "bfloat16": BFLOAT16}
# Version, byte order, three fields of structured dtypes, item size, alignment, flags.
DTYPE_STATES: dict[str, list[tuple]] = {
    "int8": [(3, "|", None, None, None, -1, -1, 0)],
    "float32": [(3, "<", None, None, None, -1, -1, 0)],
    "bfloat16": [  # ml_dtypes before 0.6 and since
        (3, "<", None, None, None, 2, 2, 80),
        (3, "<", None, None, None, 2, 2, 64),
    ],
}


def same(values: Any, expected: tuple) -> bool:
    """Equality that tells 0 from False and does not descend into nested containers."""
    return (
        type(values) is tuple
        and len(values) == len(expected)
        and all(type(v) is type(e) and v == e for v, e in zip(values, expected, strict=True))
    )


def find(module: Any, name: Any) -> Global:
    require(type(module) is str and type(name) is str, "a name that is not a string")
    found = Global(module, name)
    require(found in GLOBALS, f"it refers to {module}.{name}, which is not allowed")
    return found


def new(function: Any, arguments: Any) -> Record:
    allowed = same((function,), (RECORD,)) and same(arguments, ())
    require(allowed, "it makes an object that is not a QuantizedWeight8bit")
    return Record()


def call(function: Any, arguments: Any) -> Array | Dtype:
    if same((function,), (DTYPE,)):
        for name, argument in DTYPE_ARGUMENTS.items():
            if same(arguments, (argument, False, True)):
                return Dtype(name)
        raise Malformed("an array that is neither int8, float32 nor bfloat16")
    require(type(function) is Global and function in RECONSTRUCT, "it calls a forbidden function")
    require(type(arguments) is tuple and len(arguments) == 3, "a malformed array")
    kind, shape, code = arguments
    usual = same((kind,), (NDARRAY,)) and same(shape, (0,))
    require(usual and type(code) is Blob and code.value == b"b", "a malformed array")
    return Array()


def set_state(target: Any, state: Any) -> None:
    if type(target) is Dtype:
        states = DTYPE_STATES[target.name]
        usual = not target.complete and any(same(state, each) for each in states)
        require(usual, f"an unusual {target.name} dtype (byte order, fields or flags)")
        target.complete = True
    elif type(target) is Array:
        require(target.data is None, "an array gets its contents twice")
        _fill(target, state)
    else:
        usual = type(target) is Record and target.fields is None and type(state) is dict
        require(usual, "it changes an object")
        target.fields = state


def headers(result: Any) -> tuple[ArrayHeader, ...]:
    """The arrays of the object in the file: one array, or a record of weight and scales."""
    if type(result) is Array:
        return (_header("", result),)
    require(type(result) is Record, "it holds neither an array nor a QuantizedWeight8bit")
    fields = result.fields or {}
    require(fields.keys() == {"weight", "scales"}, "a record that is not weight and scales")
    return _header("weight", fields["weight"]), _header("scales", fields["scales"])


def _fill(array: Array, state: Any) -> None:
    require(type(state) is tuple and len(state) == 5, "malformed array contents")
    version, shape, dtype, fortran, data = state
    require(same((version,), (1,)), "an array of a version other than 1")
    require(fortran is False, "an array in Fortran order")
    require(type(dtype) is Dtype and dtype.complete, "an array without a dtype")
    require(type(data) is Blob, "an array whose contents are not bytes")
    require(type(shape) is tuple and 1 <= len(shape) <= MAX_RANK, "an array of unsupported rank")
    require(all(type(size) is int and size > 0 for size in shape), "an array of impossible shape")
    expected = math.prod(shape) * ITEM_SIZES[dtype.name]
    held = f"an array of shape {shape} {dtype.name} holds {data.nbytes} bytes, not {expected}"
    require(expected == data.nbytes, held)
    array.dtype = dtype.name
    array.shape = shape
    array.data = data


def _header(field: str, array: Any) -> ArrayHeader:
    require(type(array) is Array and array.data is not None, "an array without contents")
    return ArrayHeader(field, array.dtype, array.shape, array.data.offset, array.data.nbytes)
