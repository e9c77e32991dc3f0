"""Not a rounding method, but a row of the same table: the matrix is stored as floats."""

from grokquant.methods.method import Method


class Unquantized(Method):
    name = "unquantized"
    text = "stores floats in the source's dtype, and dequantizes what the source stores quantized"
    quantizes = False


UNQUANTIZED = Unquantized()
