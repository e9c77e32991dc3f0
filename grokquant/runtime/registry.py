"""Registers our formats with transformers without importing it.

`import grokquant` has to be cheap, and `from_pretrained` has to know our outputs whichever of the
two packages is imported first. So we wait for the modules of transformers that hold its tables of
configs, tokenizers and quantizers: as soon as one has run (now, if it already has), our rows join
its tables. They hold stand-ins that import our classes at their first use. To import them at once
would fail: transformers is then still in the middle of its own imports.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from grokquant.version import MARK, OWN

# Quant methods that engines have to see; transformers has loaders of its own for them.
_SHARED = ("compressed-tensors", "gptq")


class _Later:
    """Stands for a class: imports it when it is called or when one of its attributes is read."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__name__":  # copy and pickle ask for those
            raise AttributeError(name)
        return getattr(self._class(), name)

    def _class(self) -> Any:
        return getattr(import_module(self._module), self._name)


_CONFIG = _Later("grokquant.families.grok_model", "Grok1Config")
_TOKENIZER = _Later("grokquant.families.grok_tokenizer", "Grok1Tokenizer")
_PACKED_CONFIG = _Later("grokquant.runtime.quantizer", "PackedConfig")
_PACKED_QUANTIZER = _Later("grokquant.runtime.quantizer", "PackedQuantizer")


def _add_config(auto: Any) -> None:
    """Grok-1's config. AutoModelForCausalLM knows the model as soon as there is a config of it:
    the config's module registers both."""
    if "grok-1" not in auto.CONFIG_MAPPING:
        auto.CONFIG_MAPPING.register("grok-1", _CONFIG)


def _add_tokenizer(auto: Any) -> None:
    """Grok-1's tokenizer by name, for directories that hold nothing else."""
    auto.REGISTERED_TOKENIZER_CLASSES.setdefault("Grok1Tokenizer", _TOKENIZER)


def _add_quantizers(auto: Any) -> None:
    """Our quantizer, and our config where a config of a shared method carries our mark."""
    auto.AUTO_QUANTIZER_MAPPING[OWN] = _PACKED_QUANTIZER
    configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    configs[OWN] = _PACKED_CONFIG
    for method in _SHARED:
        configs[method] = _ours_if_marked(configs[method])


def _ours_if_marked(original: Any) -> type:
    """`original`, except that a config with our mark becomes a PackedConfig."""
    if getattr(original, "looks_for_mark", False):  # registered before
        return original

    class Marked(original):
        looks_for_mark = True

        @classmethod
        def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
            kind = _PACKED_CONFIG if config_dict.get(MARK) == OWN else original
            return kind.from_dict(config_dict, **kwargs)

    return Marked


# Modules of transformers with the function that adds our rows to their tables. One of the first
# and the last is part of every way to a model.
_TABLES: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _add_config,
    "transformers.models.auto.tokenization_auto": _add_tokenizer,
    "transformers.quantizers.auto": _add_quantizers,
}


class _Finder:
    """Finds the modules in `_TABLES` where Python does; our rows are added when they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                _TABLES[name](module)

            spec.loader.exec_module = run_and_add  # type: ignore[assignment]
        return spec


def register() -> None:
    """Makes `from_pretrained` of transformers know our outputs; no remote code is involved.

    Another call changes nothing.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, add_rows in _TABLES.items():
        if name in sys.modules:
            add_rows(import_module(name))  # waits where another thread is still importing it
