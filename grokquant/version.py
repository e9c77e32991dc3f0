"""The version of the package and the marks of its outputs. Imports nothing."""

__version__ = "0.1.0"

# The quant_method of outputs that no other loader may touch; their `format` says which it is.
OWN = "grokquant"
# The key that signs every `quantization_config` of ours, whatever its quant_method.
MARK = "quantized_by"
