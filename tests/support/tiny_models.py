"""Small models whose weights are all alive, and the model restated in numpy.

A new model's output matrices are zero: it would pass tests that a broken one should fail.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

CONFIG = RWKV7Config(
    vocab_size=29,
    num_layers=3,
    width=64,
    head_size=32,
    decay_rank=8,
    icl_rank=6,
    value_rank=5,
)
# Tracing and compiling are most of what a test costs, and least of it with the scan. That all
# implementations agree is the law of kernels/test_wkv7_laws.py.
SCANNED = dataclasses.replace(CONFIG, implementation="scan")
# The cheapest one with two layers, for programs that generate and train in loops.
TINIEST = RWKV7Config(
    vocab_size=13,
    num_layers=2,
    width=32,
    head_size=16,
    decay_rank=8,
    icl_rank=6,
    value_rank=5,
    implementation="scan",
)
# Without layers to scan over a model compiles in half the time, and its gradient in a third.
SHALLOW = dataclasses.replace(CONFIG, num_layers=1)
# What a test takes whose law is neither about depth nor about the op.
QUICK = dataclasses.replace(SCANNED, num_layers=1)
# The same for programs that generate and train in loops.
SMALLEST = dataclasses.replace(TINIEST, num_layers=1)


def lively(config=CONFIG, seed=0, noise=0.2):
    """Weights drawn as new ones are, plus noise on every leaf.

    They are made once, whatever implementation reads them in whatever dtype, and whatever its
    backward pass keeps. Drawing takes seconds: in a test or a fixture, not while a module is
    imported, for every process of a run imports all modules.
    """
    same = {"implementation": "scan", "dtype": "float32", "remat": "none"}
    return _lively(dataclasses.replace(config, **same), seed, noise)


@functools.cache
def _lively(config, seed, noise):
    state = init_state(config)
    key = jax.random.key(seed)
    draw = jax.jit(
        lambda key: RWKV7(config).init(key, jnp.zeros((1, 1), int), state)["params"]
    )
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, draw(key)))
    draws = np.random.default_rng(seed)
    moved = [x + noise * draws.normal(size=x.shape) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in moved])


def random_state(config=CONFIG, batch=1, seed=0):
    """A state that no symmetry hides in."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(noise.normal(size=x.shape), x.dtype),
        init_state(config, batch),
    )


def tokens(batch, length, config=CONFIG, seed=0):
    """Random ids."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    return jnp.asarray(ids, jnp.int32)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def _time_mix(p, x, before, wkv, v_first, config):
    """One token of one sequence; also what `trace` calls its parts."""
    shape = (config.num_heads, config.head_size)
    mixed = {c: x + (before - x) * p[f"x_{c}"] for c in "rwkvag"}
    low = {"w": np.tanh, "a": lambda u: u, "g": _sigmoid, "v": lambda u: u}
    low = {
        c: f(mixed[c] @ p[f"{c}1"]) @ p[f"{c}2"] for c, f in low.items() if f"{c}1" in p
    }
    r, k, v = (p[n]["weight"] @ mixed[n[0]] for n in ("receptance", "key", "value"))
    log_w = -np.exp(-0.5) * _sigmoid(p["w0"] + low["w"])
    rate = _sigmoid(p["a0"] + low["a"])
    gate = low["g"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * _sigmoid(p["v0"] + low["v"])
    kk = (k * p["k_k"]).reshape(shape)
    kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
    k = k * (1 + (rate - 1) * p["k_a"])
    r, log_w, k, v, rate = (u.reshape(shape) for u in (r, log_w, k, v, rate))
    a = -kk
    b = kk * rate
    removed = np.einsum("hij,hj->hi", wkv, a)
    wkv = (
        wkv * np.exp(log_w)[:, None]
        + removed[..., None] * b[:, None]
        + v[..., None] * k[:, None]
    )
    y = np.einsum("hij,hj->hi", wkv, r)
    weight, bias = (p["ln_x"][n].reshape(shape) for n in ("weight", "bias"))
    out = _norm(y, weight, bias, config.group_norm_eps)
    out = out + (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    read = out.reshape(-1) * gate
    trace = {
        "r": r,
        "log_w": log_w,
        "k": k,
        "v": v,
        "a": a,
        "b": b,
        "y": y,
        "gate": gate,
    }
    trace |= {"icl_rate": rate, "output_input": read}
    trace |= {f"{n}_input": mixed[n[0]] for n in ("receptance", "key", "value")}
    return p["output"]["weight"] @ read, wkv, v_first, trace


def _block(p, x, memory, v_first, config):
    """One block on one token: the new residual, memory, first values and trace."""
    att_shift, wkv, ffn_shift = memory
    normed = _norm(x, p["ln1"]["weight"], p["ln1"]["bias"], config.norm_eps)
    att, wkv, v_first, trace = _time_mix(
        p["att"], normed, att_shift, wkv, v_first, config
    )
    ffn_input = _norm(x + att, p["ln2"]["weight"], p["ln2"]["bias"], config.norm_eps)
    mixed = ffn_input + (ffn_shift - ffn_input) * p["ffn"]["x_k"]
    hidden = np.maximum(p["ffn"]["key"]["weight"] @ mixed, 0) ** 2
    trace |= {
        "residual": x,
        "ffn_input": ffn_input,
        "ffn_key_input": mixed,
        "ffn_hidden": hidden,
    }
    x = x + att + p["ffn"]["value"]["weight"] @ hidden
    return x, (normed, wkv, ffn_input), v_first, trace


def restated(params, ids, state, config=CONFIG):
    """Logits [T V], the state after them and the trace [L T ...] of one sequence, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers = [params["layer_0"]] + [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(config.num_layers - 1)
    ]
    names = ("att_shift", "wkv", "ffn_shift")
    state = [np.asarray(getattr(state, name), np.float64)[:, 0] for name in names]
    memory = list(zip(*state, strict=True))
    logits = []
    traces = []
    for token in np.asarray(ids):
        ln0 = params["ln0"]
        ln_out = params["ln_out"]
        v_first = None
        trace = []
        x = _norm(
            params["emb"]["weight"][token], ln0["weight"], ln0["bias"], config.norm_eps
        )
        for i, layer in enumerate(layers):
            x, memory[i], v_first, parts = _block(layer, x, memory[i], v_first, config)
            trace.append(parts)
        x = _norm(x, ln_out["weight"], ln_out["bias"], config.norm_eps)
        logits.append(params["head"]["weight"] @ x)
        traces.append(jax.tree.map(lambda *leaves: np.stack(leaves), *trace))
    end = RWKV7State(
        **dict(zip(names, map(np.stack, zip(*memory, strict=True)), strict=True))
    )
    return (
        np.stack(logits),
        end,
        jax.tree.map(lambda *leaves: np.stack(leaves, 1), *traces),
    )
