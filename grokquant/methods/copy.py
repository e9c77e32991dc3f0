"""Lossless: the integers and scales of the source are taken as they are, never derived again."""

from grokquant.types import QTensor, Scheme


def copy_quantized(stored: QTensor, scheme: Scheme) -> QTensor:
    """The stored codes under `scheme`, whose groups must divide the stored ones.

    Smaller groups repeat the stored scale, so that every weight keeps its value bit for bit.
    """
    columns = stored.codes.shape[1]
    repeats, rest = divmod(scheme.groups(columns), stored.scales.shape[1])
    assert rest == 0 and repeats >= 1, "plan admits only groups that divide the stored ones"
    return QTensor(stored.codes, stored.scales.repeat_interleave(repeats, dim=1), scheme)


def can_copy(stored: Scheme, scheme: Scheme, in_features: int) -> bool:
    """Whether `scheme` can hold a tensor stored as `stored` without any change of value."""
    same_grid = (stored.bits, stored.symmetric, stored.scale_dtype) == (
        scheme.bits,
        scheme.symmetric,
        scheme.scale_dtype,
    )
    groups, stored_groups = scheme.groups(in_features), stored.groups(in_features)
    return same_grid and groups % stored_groups == 0
