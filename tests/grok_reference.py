"""Grok-1's equations, transcribed literally in float64 numpy. Reads a dict of [in, out] matrices.

Independent of the package: names are the release's own, nothing is transposed, fused or cached.
"""

import numpy as np


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def rope(x, base=10000.0):  # (time, heads, head_dim)
    time, _, dim = x.shape
    angle = np.arange(time)[:, None] / base ** (np.arange(0, dim, 2) / dim)  # (time, dim/2)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, w, config):
    time, heads, kv = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    q = rope((x @ w["query"]).reshape(time, heads, -1))
    k = rope((x @ w["key"]).reshape(time, kv, -1))
    v = (x @ w["value"]).reshape(time, kv, -1)
    out = np.zeros_like(q)
    for head in range(heads):
        group = head // (heads // kv)
        logits = q[:, head] @ k[:, group].T * config["attn_output_multiplier"]
        logits = 30 * np.tanh(logits / 30)
        logits[np.triu_indices(time, 1)] = -1e30
        out[:, head] = softmax(logits) @ v[:, group]
    return out.reshape(time, -1) @ w["linear"]


def moe(x, w, config):
    gates = softmax(x @ w["router"])  # (time, experts)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e in np.argsort(-gates[t], kind="stable")[: config["num_experts_per_tok"]]:
            inner = gelu(x[t] @ w["moe/linear"][e]) * (x[t] @ w["moe/linear_v"][e])
            out[t] += gates[t, e] * (inner @ w["moe/linear_1"][e])
    return out


def logits(tokens, weights, config):
    """Next-token logits [time, vocabulary] of a list of token ids."""
    embedding = weights["embeddings"]
    h = embedding[tokens] * config["embedding_multiplier_scale"]
    for w in weights["layers"]:
        a = attention(rms_norm(h, w["rms_norm"]), w, config)
        h = h + rms_norm(a, w["rms_norm_1"])
        m = moe(rms_norm(h, w["rms_norm_2"]), w, config)
        h = h + rms_norm(m, w["rms_norm_3"])
    return rms_norm(h, weights["rms_norm"]) @ embedding.T * config["output_multiplier_scale"]
