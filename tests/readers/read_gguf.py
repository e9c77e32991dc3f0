"""llama.cpp's logits: read_gguf.py MODEL.gguf TOKENS.npy LOGITS.npy

TOKENS are [rows, time], LOGITS become [rows, time, vocabulary] in float32. Runs where
llama-cpp-python is installed, and knows nothing of grokquant.
"""

import sys

import numpy as np
from llama_cpp import Llama

model, tokens, logits = sys.argv[1:]
rows = np.load(tokens)
llama = Llama(model, n_ctx=rows.shape[1], n_batch=rows.shape[1], logits_all=True, verbose=False)
found = []
for row in rows.tolist():
    llama.reset()
    llama.eval(row)
    found.append(np.array(llama.scores[: len(row)], dtype=np.float32))
np.save(logits, np.stack(found))
