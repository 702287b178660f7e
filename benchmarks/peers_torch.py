"""State tuning as a user would write it in PyTorch: published formulas, fla's chunked recurrence.

Weights are frozen; the loss is cross entropy; Adam tunes one state per layer and head. Source of
the formulas: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_demo.py:260-372.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

# Tokens of a chunk; of 16, 32 and 64 the fastest on a CPU.
_CHUNK = 16

Weights = dict[str, torch.Tensor]


def _chunked_recurrence() -> Callable:
    with warnings.catch_warnings():
        # It says that there is no GPU.
        warnings.simplefilter("ignore")
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise
    return dplr_chunkwise


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 1, -1))


def _norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], eps=1e-5)


def _time_mix(recurrence, weights: Weights, block: str, x, state, v_first):
    """Runs the time mix of one block.

    Args:
        recurrence: of fla.
        weights: by official name.
        block: how this block's names begin.
        x: [B T D].
        state: [H Nv Nk], tuned.
        v_first: values of block 0; None in block 0.
    """

    def w(name):
        tensor = weights[f"{block}.att.{name}"]
        return tensor.reshape(-1) if tensor.ndim == 3 else tensor

    batch, length, width = x.shape
    heads, size = weights[f"{block}.att.r_k"].shape
    mixed = {c: x + (_shifted(x) - x) * w(f"x_{c}") for c in "rwkvag"}
    r = mixed["r"] @ w("receptance.weight").T
    k = mixed["k"] @ w("key.weight").T
    v = mixed["v"] @ w("value.weight").T
    z = w("w0") + torch.tanh(mixed["w"] @ w("w1")) @ w("w2")
    log_w = -math.exp(-0.5) * torch.sigmoid(z)
    a = torch.sigmoid(w("a0") + mixed["a"] @ w("a1") @ w("a2"))
    gate = torch.sigmoid(mixed["g"] @ w("g1")) @ w("g2")
    if v_first is None:
        v_first = v
    else:
        nu = torch.sigmoid(w("v0") + mixed["v"] @ w("v1") @ w("v2"))
        v = v + (v_first - v) * nu

    def by_head(u):
        return u.view(batch, length, heads, size).transpose(1, 2)

    kk = F.normalize(by_head(k * w("k_k")), dim=-1)
    k = k * (1 + (a - 1) * w("k_a"))
    r, log_w, k, v, a = (by_head(u) for u in (r, log_w, k, v, a))
    # Its states have keys as rows, and it scales its queries.
    start = state.mT.expand(batch, heads, size, size)
    y, _ = recurrence(
        r * size**0.5, k, v, -kk, kk * a, log_w, start, True, chunk_size=_CHUNK
    )
    bonus = (r * k * w("r_k")[:, None]).sum(-1, keepdim=True) * v
    flat = y.transpose(1, 2).reshape(-1, width)
    normed = F.group_norm(flat, heads, w("ln_x.weight"), w("ln_x.bias"), eps=64e-5)
    read = normed.view(batch, length, width)
    read = read + bonus.transpose(1, 2).reshape(batch, length, width)
    return (read * gate) @ w("output.weight").T, v_first


def tuning_step(
    named: dict[str, np.ndarray], tokens: np.ndarray
) -> Callable[[], float]:
    """Makes a step that tunes zero states on one batch; it returns the loss before the step.

    Args:
        named: the model by official name, float32.
        tokens: ids [B T+1].
    """
    recurrence = _chunked_recurrence()
    weights = {name: torch.tensor(array) for name, array in named.items()}
    ids = torch.tensor(tokens, dtype=torch.long)
    layers = sum(name.endswith(".ln1.weight") for name in weights)
    heads, size = weights["blocks.0.att.r_k"].shape
    states = torch.zeros(layers, heads, size, size, requires_grad=True)
    adam = torch.optim.Adam([states], lr=1e-3)

    def step() -> float:
        x = F.embedding(ids[:, :-1], weights["emb.weight"])
        x = _norm(x, weights, "blocks.0.ln0")
        v_first = None
        for layer in range(layers):
            block = f"blocks.{layer}"
            normed = _norm(x, weights, f"{block}.ln1")
            out, v_first = _time_mix(
                recurrence, weights, block, normed, states[layer], v_first
            )
            x = x + out
            normed = _norm(x, weights, f"{block}.ln2")
            lerp = weights[f"{block}.ffn.x_k"].reshape(-1)
            mixed = normed + (_shifted(normed) - normed) * lerp
            hidden = torch.relu(mixed @ weights[f"{block}.ffn.key.weight"].T) ** 2
            x = x + hidden @ weights[f"{block}.ffn.value.weight"].T
        logits = _norm(x, weights, "ln_out") @ weights["head.weight"].T
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(loss)

    return step
