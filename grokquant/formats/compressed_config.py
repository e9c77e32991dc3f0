"""The `quantization_config` of compressed-tensors, read whichever way the codes are stored."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from grokquant.formats.reading import validated
from grokquant.formats.targets import check_target, engine_targets
from grokquant.grids import Scheme
from grokquant.types import Source, Unit

NAME = "compressed-tensors"
# How a matrix is stored, as the package calls it.
Storage = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp8-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
]
_WRITTEN: Storage = "pack-quantized"
# `naive-quantized` is one of these, by the type of its weights.
_NAIVE: dict[str, Storage] = {"int": "int-quantized", "float": "float-quantized"}


def config_of(units: Iterable[Unit], unquantized: Iterable[str]) -> dict:
    """The `quantization_config`, with a group of targets per scheme; `unquantized` names the
    modules that hold a matrix but stay as they are."""
    by_scheme: dict[Scheme, list[str]] = {}
    for unit in units:
        by_scheme.setdefault(unit.scheme, []).append(unit.tensor.removesuffix(".weight"))
    # compressed-tensors itself would take a target `experts` for transformers' own module.
    targets, ignored = engine_targets(by_scheme.values(), unquantized, fused_experts=False)
    largest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]), default=None)
    groups = {
        f"group_{index}": {
            # Names come before Linear; SGLang looks up fused experts by Linear and nothing else.
            "targets": targets[index] + ["Linear"] * (s == largest),
            "weights": _weight_arguments(s),
            "input_activations": None,
            "output_activations": None,
            "format": _WRITTEN,
        }
        for index, s in enumerate(by_scheme)
    }
    return {
        "quant_method": NAME,
        "format": _WRITTEN,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True)
class Group:
    """How the matrices that a config group targets are stored: `weights` is of the class that
    WEIGHTS has for `storage`."""

    storage: Storage
    weights: "Weights"


def groups_of(source: Source) -> list[tuple[str, Group]]:
    """Targets with their groups in the order of the config, of which the first match counts.
    Raises InputError naming the key that cannot be read."""
    config = validated(source, _Config)
    found: list[tuple[str, Group]] = []
    for name, group in config.config_groups.items():
        storage = group.format or config.storage
        if storage == "naive-quantized":
            storage = _NAIVE.get(str(group.weights.get("type", "int")), storage)
        weights = validated(source, WEIGHTS[storage], "config_groups", name, "weights")
        found += [(target, Group(storage, weights)) for target in group.targets]
    return found


def activations(config: dict) -> Iterable[str]:
    """How a config that can be read has activations and the cache quantized, in words."""
    read = _Config.model_validate(config)
    for group in read.config_groups.values():
        if group.input_activations:
            yield f"inputs of matrices ({group.input_activations})"
        if group.output_activations:
            yield f"outputs of matrices ({group.output_activations})"
    if read.kv_cache_scheme:
        yield f"cache of keys and values ({read.kv_cache_scheme})"


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        # -1, since vLLM up to 0.28 knows experts with one scale a row by it only
        "group_size": scheme.group_size or -1,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": None,
    }


class Weights(BaseModel):
    """The `weights` of a config group, as far as they can be read."""


class Integers(Weights):
    """Of `int-quantized`."""

    num_bits: Literal[4, 8]
    type: Literal["int"] = "int"
    strategy: Literal["group", "channel", "tensor"]
    group_size: Annotated[int, Field(ge=-1)] | None = None
    symmetric: bool = True
    # `group` would reorder columns; no writer makes it any more.
    actorder: Literal["weight", "static", False] | None = None

    @property
    def scheme(self) -> Scheme:
        whole_row = self.strategy != "group" or self.group_size in (0, -1)
        return Scheme(self.num_bits, None if whole_row else self.group_size, self.symmetric)


class PackedIntegers(Integers):
    """Of `pack-quantized`."""

    strategy: Literal["group", "channel"]


class _Floats(Weights):
    type: Literal["float"]
    symmetric: Literal[True] = True


_Size = Annotated[int, Field(ge=1)]


class Float8(_Floats):
    """Of `float-quantized`."""

    num_bits: Literal[8]
    strategy: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None
    block_structure: tuple[_Size, _Size] | None = None

    @model_validator(mode="after")
    def _has_its_size(self) -> Self:
        if self.strategy in ("group", "block") and self.block is None:
            raise ValueError(f"strategy {self.strategy} lacks its size")
        return self

    @property
    def block(self) -> tuple[int, int] | None:
        """The rows and columns that share a scale, where the config says how many."""
        if self.strategy == "group" and self.group_size is not None and self.group_size > 0:
            return 1, self.group_size
        return self.block_structure if self.strategy == "block" else None


class Microscaled8(_Floats):
    """Of `mxfp8-quantized`."""

    num_bits: Literal[8]
    strategy: Literal["group"]
    group_size: Literal[32]


class Microscaled4(_Floats):
    """Of `mxfp4-pack-quantized`."""

    num_bits: Literal[4]
    strategy: Literal["group"]
    group_size: Literal[32]


class Nvidia4(_Floats):
    """Of `nvfp4-pack-quantized`."""

    num_bits: Literal[4]
    strategy: Literal["tensor_group"]
    group_size: Literal[16]


WEIGHTS: dict[Storage, type[Weights]] = {
    "pack-quantized": PackedIntegers,
    "int-quantized": Integers,
    "float-quantized": Float8,
    "naive-quantized": Float8,  # of a type that is neither: refused
    "mxfp8-quantized": Microscaled8,
    "mxfp4-pack-quantized": Microscaled4,
    "nvfp4-pack-quantized": Nvidia4,
}


class _Activations(BaseModel):
    """How activations are quantized, as far as it is named."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    dynamic: bool | Literal["local"] = False

    def __str__(self) -> str:
        return f"{self.num_bits}-bit {self.type}, {'dynamic' if self.dynamic else 'static'}"


class _Group(BaseModel):
    targets: list[Annotated[str, AfterValidator(check_target)]]
    weights: dict[str, Any]
    input_activations: _Activations | None = None
    output_activations: _Activations | None = None
    format: Storage | None = None


class _Sparsity(BaseModel):
    format: Literal["dense"]


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    config_groups: dict[str, _Group]
    format: Storage | Literal["mixed-precision"] = "pack-quantized"
    kv_cache_scheme: _Activations | None = None
    transform_config: None = None  # rotations at run time
    # Only "dense": otherwise weights are stored without their zeros.
    sparsity_config: _Sparsity | None = None

    @field_validator("transform_config", "sparsity_config", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @property
    def storage(self) -> Storage:
        return "pack-quantized" if self.format == "mixed-precision" else self.format
