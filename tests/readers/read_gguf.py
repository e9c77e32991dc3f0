"""llama.cpp's view of a file: read_gguf.py MODEL.gguf ASKED.json FOUND.npz

ASKED holds `rows`, lists of token numbers, and `texts`. FOUND gets `logits` in float32 [rows, time,
vocabulary], and for each text its token numbers `tokens0`, .. and the text that comes `after0`, ..
Runs where llama-cpp-python is installed, and knows nothing of grokquant.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

model, asked, found = sys.argv[1:]
with open(asked, encoding="utf-8") as file:
    questions = json.load(file)
length = max(256, *map(len, questions["rows"]))
llama = Llama(model, n_ctx=length, n_batch=length, logits_all=True, verbose=False)
logits, answers = [], {}
for row in questions["rows"]:
    llama.reset()
    llama.eval(row)
    logits.append(np.array(llama.scores[: len(row)], dtype=np.float32))
for number, text in enumerate(questions["texts"]):
    answers[f"tokens{number}"] = llama.tokenize(text.encode(), add_bos=True, special=True)
    llama.reset()
    answer = llama.create_completion(text, max_tokens=8, temperature=0.0)
    answers[f"after{number}"] = answer["choices"][0]["text"]
np.savez(found, logits=np.stack(logits), **answers)
