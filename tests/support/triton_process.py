"""The Triton kernels in Triton's interpreter, as a process apart: it has to be chosen first.

`python tests/support/triton_process.py IN.npz OUT.npz CHUNK DTYPE CAPABILITY`, the five words as
often as there are runs: y, the end state and the seven gradients for `inputs.0` to `inputs.5`,
`state`, `dy` and `dend`.
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
from pallas_kernels.gpu import triton_calls as triton_op
from pallas_kernels.gpu import triton_kernels
from pallas_kernels.reference import WKVInputs

BITS = np.dtype(np.uint16)


def _widen(bits):
    """The float32 numbers that 16-bit patterns of bfloat16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _convert(x, source, target, rounding):
    """Between float32 and bfloat16 as a GPU does it: the interpreter cuts digits off."""
    if target.primitive_bitwidth == 16:
        return x.astype(ml_dtypes.bfloat16).view(BITS)
    return _widen(x)


def _product(self, a, b, d, precision, imprecise):
    """A product in float32: the interpreter multiplies the patterns of bfloat16 as integers."""
    left, right = (_widen(x.data) if x.data.dtype == BITS else x.data for x in (a, b))
    return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)


interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _product


def _to_torch(x):
    """A copy, in the array's dtype."""
    tensor = torch.from_numpy(np.array(x, np.float32))
    return tensor.bfloat16() if x.dtype == jnp.bfloat16 else tensor


def _launch(kernel, arrays, outputs, grid, tile, **constants):
    """In `triton_op.launch`'s place; outputs start as NaN, so that a gap shows."""

    def run(*arrays):
        found = [_to_torch(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
        sizes = arrays[0].shape[1:3]
        getattr(triton_kernels, kernel)[grid](*map(_to_torch, arrays), *sizes, *found, **constants)
        pairs = zip(found, outputs, strict=True)
        return [x.float().numpy().astype(like.dtype) for x, like in pairs]

    return jax.pure_callback(run, outputs, *arrays)


def main(given: str, found: str, chunk: str, dtype: str, capability: str) -> None:
    """Run both passes and write what they gave."""
    triton_op.launch, tiles.capability = _launch, lambda: int(capability)
    chunk, arrays, passes = int(chunk), np.load(given), triton_op.KERNELS
    inputs = [jnp.asarray(arrays[f"inputs.{i}"]) for i in range(6)]
    inputs = WKVInputs(*(x if i == 1 else x.astype(dtype) for i, x in enumerate(inputs)))
    state, dy, dend = (jnp.asarray(arrays[name]) for name in ("state", "dy", "dend"))
    y, end, starts = passes.forward_saving(inputs, state, chunk=chunk)
    alone = passes.forward(inputs, state, chunk=chunk)
    assert all(map(np.array_equal, alone, (y, end)))
    grads, dstate = passes.backward(inputs, starts, dy, dend, chunk=chunk)
    outputs = jax.tree.map(lambda x: np.asarray(x, np.float32), (y, end, *grads, dstate))
    np.savez(found, *outputs)


if __name__ == "__main__":
    for run in zip(*[iter(sys.argv[1:])] * 5, strict=True):
        main(*run)
