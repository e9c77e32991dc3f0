"""Another form for a finished result: its codes and scales as they are, or a refusal."""

from pathlib import Path

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats import FORMATS
from grokquant.job.shards import REPORT_NAME
from grokquant.recipe import Recipe, parse_recipe
from grokquant.recipe.of_output import settings_of


def conversion_recipe(result: str | Path, output_format: str, output: str | Path) -> Recipe:
    """The recipe that takes every matrix of `result` over as it is stored.

    Running it repacks codes and scales bit by bit, and refuses where `output_format` cannot hold
    them; `bf16` multiplies them out. Raises InputError where `result` is no quantized checkpoint.
    """
    units = dict(open_checkpoint(result).units())
    kept = [name for name, ref in units.items() if ref.scheme is None]
    if len(kept) == len(units):
        raise InputError(f"{result}: holds no quantized matrix to convert")
    rules = [{"match": name, "method": "keep"} for name in kept]
    known = FORMATS.get(output_format)  # parsing the recipe refuses others
    dense = known is not None and not known.holds_quantized
    rules.append({"match": "*", "method": "keep" if dense else "copy"})
    return parse_recipe(
        {
            "model": {"path": str(result)},
            "quantize": rules,
            "output": {"path": str(output), "format": output_format},
            "eval": _eval_settings(Path(result)),
        }
    )


def _eval_settings(result: Path) -> dict:
    """What the recipe of `result` says of evaluation."""
    return settings_of(result).model_dump() if (result / REPORT_NAME).is_file() else {}
