"""Not a method of rounding, but a row like theirs: the matrix stays as it is."""

from grokquant.methods.method import Method


class Keep(Method):
    name = "keep"
    text = "leaves units in bfloat16"
    quantizes = False


KEEP = Keep()
