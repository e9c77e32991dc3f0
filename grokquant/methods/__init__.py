"""Methods that round a matrix onto a grid. A new one is a module here and a row in `METHODS`."""

from grokquant.methods.copy import COPY
from grokquant.methods.gptq import GPTQ
from grokquant.methods.method import Method
from grokquant.methods.rtn import RTN
from grokquant.methods.two_sided import TWO_SIDED
from grokquant.methods.unquantized import UNQUANTIZED

METHODS: dict[str, Method] = {
    method.name: method for method in (UNQUANTIZED, COPY, RTN, GPTQ, TWO_SIDED)
}
