"""Repacks a finished result into another format: with the same codes and scales, or not at all."""

from pathlib import Path

from grokquant.checkpoint import open_checkpoint
from grokquant.errors import InputError
from grokquant.formats import FORMATS
from grokquant.job.shards import is_result
from grokquant.recipe import Recipe, parse_recipe
from grokquant.recipe.of_output import settings_of


def conversion_recipe(
    result: str | Path, output_format: str, output: str | Path, tokenizer: str = "source"
) -> Recipe:
    """The recipe that carries over every matrix of `result` as it is stored.

    Running it repacks codes and scales bit for bit, and fails if `output_format` cannot hold them;
    `bf16` dequantizes them. `tokenizer` is the recipe's `output.tokenizer`. Raises InputError if
    `result` is not a quantized checkpoint.
    """
    units = dict(open_checkpoint(result).units())
    kept = [name for name, ref in units.items() if ref.scheme is None]
    if len(kept) == len(units):
        raise InputError(
            f"{result}: has no quantized matrices to convert; "
            f"grokquant quantize {result} --format {output_format} quantizes it"
        )
    rules = [{"match": name, "method": "unquantized"} for name in kept]
    known = FORMATS.get(output_format)  # parsing the recipe rejects others
    dense = known is not None and not known.holds_quantized
    rules.append({"match": "*", "method": "unquantized" if dense else "copy"})
    return parse_recipe(
        {
            "model": {"path": str(result)},
            "quantize": rules,
            "output": {"path": str(output), "format": output_format, "tokenizer": tokenizer},
            "eval": _eval_settings(Path(result)),
        }
    )


def _eval_settings(result: Path) -> dict:
    """The eval section of the recipe that made `result`."""
    return settings_of(result).model_dump() if is_result(result) else {}
