"""The `quantization_config` of compressed-tensors, read whichever way the codes are stored."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator

from grokquant.formats.reading import validated
from grokquant.formats.targets import check_target, engine_targets
from grokquant.grids import Scheme
from grokquant.types import Source, Unit

NAME = "compressed-tensors"
# How codes are stored: several in an int32 word, or each as an int8.
Storage = Literal["pack-quantized", "int-quantized"]
_WRITTEN: Storage = "pack-quantized"


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


def schemes_of(source: Source) -> list[tuple[str, tuple[Scheme, Storage]]]:
    """Targets with their grids and storage in the order of the config, of which the first match
    counts. Raises InputError naming the key that cannot be read."""
    config = validated(source, _Config)
    return [
        (target, (group.weights.scheme, group.format or config.storage))
        for group in config.config_groups.values()
        for target in group.targets
    ]


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": None,
    }


class _Weights(BaseModel):
    """The `weights` of a config group, as far as grids can be read."""

    num_bits: Literal[4, 8]
    type: Literal["int"] = "int"
    strategy: Literal["group", "channel"]
    group_size: Annotated[int, Field(ge=-1)] | None = None
    symmetric: bool = True
    # `group` would reorder columns; no writer makes it any more.
    actorder: Literal["weight", "static", False] | None = None

    @property
    def scheme(self) -> Scheme:
        whole_row = self.strategy == "channel" or self.group_size in (0, -1)
        return Scheme(self.num_bits, None if whole_row else self.group_size, self.symmetric)


class _Group(BaseModel):
    targets: list[Annotated[str, AfterValidator(check_target)]]
    weights: _Weights
    input_activations: None = None
    format: Storage | None = None


class _Sparsity(BaseModel):
    format: Literal["dense"]


class _Config(BaseModel):
    """What reading takes from a `quantization_config`."""

    config_groups: dict[str, _Group]
    format: Storage | Literal["mixed-precision"] = "pack-quantized"
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
