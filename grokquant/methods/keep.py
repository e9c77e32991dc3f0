"""Not a rounding method, but a row of the same table: the matrix is not quantized."""

from grokquant.methods.method import Method


class Keep(Method):
    name = "keep"
    text = "stores the matrix unquantized, in bfloat16"
    quantizes = False


KEEP = Keep()
