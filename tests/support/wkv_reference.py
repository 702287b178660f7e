"""The WKV-7 recurrence and its gradients in NumPy and float64, token by token.

It is written from the equations and uses none of the package's code. `eps` selects the algorithm
of several published kernels, in float32: earlier states are rebuilt by dividing by the decay.
"""

import numpy as np


def _outer(rows, columns):
    return rows[..., :, None] * columns[..., None, :]


def forward(inputs, state):
    """Returns y [B T H Nv], the states S_0 .. S_T and what each token removes."""
    states = [state]
    removed = []
    y = []
    for t in range(inputs[0].shape[1]):
        r, log_w, k, v, a, b = (x[:, t] for x in inputs)
        out = np.einsum("bhvk,bhk->bhv", state, a)
        state = state * np.exp(log_w)[..., None, :] + _outer(out, b) + _outer(v, k)
        removed.append(out)
        states.append(state)
        y.append(np.einsum("bhvk,bhk->bhv", state, r))
    # Without tokens y has the shape of v, which is empty.
    return np.stack(y, 1) if y else inputs[3], states, removed


def backward(inputs, states, removed, dy, dend, *, eps=None, restart=16):
    """Computes the gradients of r, log_w, k, v, a, b and of the start state.

    Args:
        inputs: r, log_w, k, v, a, b.
        states: from `forward`.
        removed: from `forward`.
        dy: gradient of y.
        dend: gradient of the last state.
        eps: None reads the stored states; a number rebuilds them by dividing by w + eps.
        restart: tokens between two stored states that rebuilding starts from.
    """
    grads = [np.zeros_like(x) for x in inputs]
    dstate = dend.copy()
    after = states[-1]
    for t in reversed(range(inputs[0].shape[1])):
        r, log_w, k, v, a, b = (x[:, t] for x in inputs)
        w = np.exp(log_w)
        if eps is None or (t + 1) % restart == 0:
            after = states[t + 1]
        before = states[t]
        if eps is not None:
            written = _outer(v, k) + _outer(removed[t], b)
            before = (after - written) / (w + w.dtype.type(eps))[..., None, :]
        dr = np.einsum("bhvk,bhv->bhk", after, dy[:, t])
        dstate = dstate + _outer(dy[:, t], r)
        dw = np.einsum("bhvk,bhvk->bhk", dstate, before)
        dk = np.einsum("bhvk,bhv->bhk", dstate, v)
        dv = np.einsum("bhvk,bhk->bhv", dstate, k)
        db = np.einsum("bhvk,bhv->bhk", dstate, removed[t])
        dremoved = np.einsum("bhvk,bhk->bhv", dstate, b)
        da = np.einsum("bhvk,bhv->bhk", before, dremoved)
        for grad, value in zip(grads, (dr, dw * w, dk, dv, da, db), strict=True):
            grad[:, t] = value
        dstate = dstate * w[..., None, :] + _outer(dremoved, a)
        after = before
    return (*grads, dstate)


def both(inputs, state, dy, dend, *, dtype=np.float64, eps=None):
    """Returns y, the last state and the seven gradients."""
    arrays = [np.asarray(x).astype(dtype) for x in (*inputs, state, dy, dend)]
    *inputs, state, dy, dend = arrays
    y, states, removed = forward(inputs, state)
    return y, states[-1], backward(inputs, states, removed, dy, dend, eps=eps)
