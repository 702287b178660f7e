"""The Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported.

`python tests/support/triton_process.py IN.npz OUT.npz CHUNK DTYPE CAPABILITY`, with the five words
repeated for each run. IN has `inputs.0` to `inputs.5`, `state`, `dy` and `dend`; OUT gets y, the
end state and the seven gradients.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from triton.runtime import interpreter

from pallas_kernels import tiles
from pallas_kernels.gpu import triton_calls, triton_kernels
from pallas_kernels.reference import NAMES, WKVInputs

BITS = np.dtype(np.uint16)


def _widen(bits):
    """Converts 16-bit patterns of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _convert(x, source, target, rounding):
    """Converts between float32 and bfloat16 as a GPU does; the interpreter would truncate."""
    if target.primitive_bitwidth == 16:
        return x.astype(ml_dtypes.bfloat16).view(BITS)
    return _widen(x)


def _product(self, a, b, d, precision, imprecise):
    """Multiplies in float32; the interpreter would multiply bfloat16 patterns as integers."""
    left = _widen(a.data) if a.data.dtype == BITS else a.data
    right = _widen(b.data) if b.data.dtype == BITS else b.data
    return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)


interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _product


def _to_torch(x):
    """Copies an array, in its dtype."""
    tensor = torch.from_numpy(np.array(x, np.float32))
    return tensor.bfloat16() if x.dtype == jnp.bfloat16 else tensor


def _launch(kernel, arrays, outputs, grid, tile, **constants):
    """Replaces `triton_calls.launch`; outputs start as NaN, so that a gap shows."""

    def run(*arrays):
        written = [_to_torch(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
        tokens, heads = arrays[0].shape[1:3]
        read = [_to_torch(x) for x in arrays]
        getattr(triton_kernels, kernel)[grid](
            *read, tokens, heads, *written, **constants
        )
        results = []
        for x, output in zip(written, outputs, strict=True):
            results.append(x.float().numpy().astype(output.dtype))
        return results

    return jax.pure_callback(run, outputs, *arrays)


def main(given: str, found: str, chunk: str, dtype: str, capability: str) -> None:
    """Runs both passes and writes their results."""
    triton_calls.launch = _launch
    tiles.capability = lambda: int(capability)
    kernels = triton_calls.KERNELS
    arrays = np.load(given)
    inputs = []
    for i, name in enumerate(NAMES):
        x = jnp.asarray(arrays[f"inputs.{i}"])
        inputs.append(x if name == "log_w" else x.astype(dtype))
    inputs = WKVInputs(*inputs)
    state, dy, dend = (jnp.asarray(arrays[name]) for name in ("state", "dy", "dend"))
    y, end, starts = kernels.forward_saving(inputs, state, chunk=int(chunk))
    alone = kernels.forward(inputs, state, chunk=int(chunk))
    assert all(map(np.array_equal, alone, (y, end)))
    grads, dstate = kernels.backward(inputs, starts, dy, dend, chunk=int(chunk))
    outputs = jax.tree.map(
        lambda x: np.asarray(x, np.float32), (y, end, *grads, dstate)
    )
    np.savez(found, *outputs)


if __name__ == "__main__":
    for run in zip(*[iter(sys.argv[1:])] * 5, strict=True):
        main(*run)
