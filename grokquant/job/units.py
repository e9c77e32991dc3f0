"""Which rule decides each matrix, and the unit that follows: its grid, method and settings."""

from dataclasses import replace
from math import gcd

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.formats import FORMATS, Format
from grokquant.grids import GRIDS, Scheme
from grokquant.methods import METHODS
from grokquant.methods.copy import can_copy
from grokquant.recipe import Recipe, Rule
from grokquant.types import Matrix, TensorRef, Unit


def planned_units(recipe: Recipe, checkpoint: Checkpoint, output_format: Format) -> dict[str, Unit]:
    """The matrices to quantize, by name. Raises InputError for rules that cannot be carried out."""
    units: dict[str, Unit] = {}
    decided = _rules_of(recipe, checkpoint)
    for matrix in checkpoint.matrices():
        index = decided[matrix.name]
        if index is not None and METHODS[recipe.quantize[index].method].quantizes:
            ref = checkpoint.source.tensors[matrix.tensor]
            rule = recipe.quantize[index]
            units[matrix.name] = unit_of(matrix, ref, rule, index, output_format)
    return units


def _rules_of(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, int | None]:
    """The index of the rule that decides each matrix, by name; None where no rule matches.

    Raises InputError for a rule that decides nothing: otherwise it would be ignored silently.
    """
    names = [matrix.name for matrix in checkpoint.matrices()]
    decided = {name: recipe.rule_index(name) for name in names}
    taken = set(decided.values())
    for index, rule in enumerate(recipe.quantize):
        key = f"recipe: quantize[{index}].match: {rule.match!r}"
        if not any(rule.matches(name) for name in names):
            raise InputError(
                f"{key} matches no matrix of {recipe.model.path} "
                f"(names look like {names[0]} or {names[-1]})"
            )
        if index not in taken:
            raise InputError(f"{key} never applies: earlier rules cover every matrix it matches")
    return decided


def unit_of(matrix: Matrix, ref: TensorRef, rule: Rule, index: int, output_format: Format) -> Unit:
    """A matrix as `rule`, number `index`, stores it. Raises InputError where that cannot be."""
    name = matrix.name
    rows, columns = ref.shape
    lossless = METHODS[rule.method].lossless
    scheme = _copied(name, ref, rule, output_format) if lossless else _chosen(rule, output_format)
    if scheme.group_size == columns and rule.grid == "integer" and scheme.is_integer:
        scheme = replace(scheme, group_size=None)
    if columns % (scheme.group_size or 1):
        raise InputError(
            f"{name}: {columns} input features are not divisible by group {scheme.group_size}"
        )
    if lossless and not (ref.scheme and can_copy(ref.scheme, scheme, columns)):
        raise InputError(f"{name}: copy to {scheme} is not lossless: the source has {ref.scheme}")
    if reason := output_format.refusal(scheme, (rows, columns)):
        way_out = _way_out(rule, scheme, (rows, columns), output_format)
        raise InputError(f"{name}: {output_format.name} cannot hold it: {reason}{way_out}")
    return Unit(
        **vars(matrix),
        shape=(rows, columns),
        scheme=scheme,
        method=rule.method,
        settings=rule.settings,
        rule=index,
    )


def _way_out(rule: Rule, scheme: Scheme, shape: tuple[int, int], refusing: Format) -> str:
    """What to change where a format refuses a grid: the grid, or the format."""
    ways = []
    if refusing.name == "gguf" and not METHODS[rule.method].lossless:
        ways.append("name another grid in the rule, such as grid: q4_k or iq4_nl")
    holding = []
    for other in FORMATS.values():
        own = replace(scheme, scale_dtype=other.scale_dtype) if scheme.is_integer else scheme
        if other.holds_quantized and other.refusal(own, shape) is None:
            holding.append(other.name)
    if holding and refusing.name not in holding:
        ways.append(f"output.format: {' or '.join(holding)} can")
    return f"; {'; '.join(ways)}" if ways else ""


def _chosen(rule: Rule, output_format: Format) -> Scheme:
    """The grid that a rule asks for."""
    group = rule.group if isinstance(rule.group, int) else None
    if rule.grid != "integer":
        named = GRIDS[rule.grid].scheme
        return replace(named, group_size=group) if rule.group else named
    scale_dtype = rule.scale_dtype or output_format.scale_dtype
    return Scheme(rule.bits or 8, group, rule.symmetric, scale_dtype)


def _copied(name: str, ref: TensorRef, rule: Rule, output_format: Format) -> Scheme:
    """The stored grid in groups as large as rule, source and format allow; scales are repeated,
    and keep their dtype where the format has it."""
    rows, columns = ref.shape
    if ref.scheme is None:
        raise InputError(
            f"{name}: method copy needs a quantized source, but it has {ref.stored_as}; "
            "use unquantized or rtn"
        )
    if not ref.scheme.is_integer:
        return ref.scheme
    stored = ref.scheme.group_size or columns
    group = rule.group
    most = gcd(stored, group) if isinstance(group, int) else stored
    groups = [most, *(smaller for smaller in (128, 64, 32) if most % smaller == 0)]
    if group == "channel":
        groups = [columns]
    dtypes = [ref.scheme.scale_dtype, output_format.scale_dtype]
    if rule.scale_dtype:
        dtypes = [rule.scale_dtype]
    schemes = [
        replace(ref.scheme, group_size=None if size == columns else size, scale_dtype=dtype)
        for size in groups
        for dtype in dtypes
    ]
    return next((s for s in schemes if not output_format.refusal(s, (rows, columns))), schemes[0])
