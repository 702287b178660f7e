"""WKV-7 on NVIDIA GPUs: calls of the Triton kernels."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.gpu.segmented_passes import KernelSet, Probes, Spans
from pallas_kernels.gpu.triton_launcher import launch
from pallas_kernels.platforms import output_like
from pallas_kernels.reference import State, WKVInputs


def _fold_vmap_into_batch(function: Callable) -> Callable:
    """Gives a function of arrays [B ...] a `jax.vmap` rule: one call with a larger batch.

    A kernel launch has no batching rule.
    """
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _(size: int, batched: list, *arrays: Array):
        folded = []
        for x, is_batched in zip(arrays, batched, strict=True):
            full = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            # [size B ...] to [size*B ...]: exact, because rows of a batch are independent.
            folded.append(full.reshape(-1, *full.shape[2:]))
        outputs = [x.reshape(size, -1, *x.shape[1:]) for x in run(*folded)]
        return outputs, [True] * len(outputs)

    return run


def _walk(
    kernel: str,
    arrays: Sequence[Array],
    describe_outputs: Callable,
    choice: tiles.GPU,
    tile: tiles.Tile,
    probes: Probes | None,
    **constants: bool,
) -> Sequence[Array]:
    """Launches a kernel that loops over the chunks, with a program per head and value block."""
    keys = arrays[0].shape[3]
    values = arrays[-1].shape[2]
    # Must divide the number of values, which with probes is Nv + Nk, such as 320.
    block = tile.values
    while values % block:
        block //= 2

    def run(*arrays):
        # Read from the arguments: under `vmap` the batch is larger.
        batch, _, heads, _ = arrays[0].shape
        return launch(
            kernel,
            arrays,
            describe_outputs(*arrays),
            # Only the grid's first axis may have more than 65,535 programs.
            (batch * heads, values // block),
            tile,
            **constants,
            CHUNK=choice.chunk,
            KEYS=keys,
            VALUES=values,
            BLOCK=block,
            # 0 segments mean no probes.
            SEGMENTS=probes.segments if probes else 0,
            PROBED=probes.values if probes else 0,
        )

    return _fold_vmap_into_batch(run)(*arrays)


def _chunk_states(
    state: State, v: Array, choice: tiles.GPU, save: bool
) -> jax.ShapeDtypeStruct:
    """Describes one state for each chunk, in the tokens' dtype; without `save` a placeholder."""
    batch, heads, values, keys = state.shape
    # A Triton kernel's arguments are fixed: an unused output has one number per row.
    shape = (
        (batch, heads, v.shape[1] // choice.chunk, keys, values) if save else (batch,)
    )
    return output_like(shape, v.dtype, state, v)


class TritonKernels(KernelSet):
    """The Triton kernels; `KernelSet` describes their results."""

    table = tiles.TRITON

    def forward_kernel(
        self,
        inputs: WKVInputs,
        state: State,
        choice: tiles.GPU,
        save: bool,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Launches the forward kernel."""

        def describe_outputs(r, log_w, k, v, a, b, state):
            y_shape = v.shape if probes is None else v.shape[:1]
            end = output_like(state.shape, jnp.float32, state, v)
            y = output_like(y_shape, v.dtype, state, v)
            return [end, y, _chunk_states(state, v, choice, save)]

        end, y, starts = _walk(
            "forward",
            (*inputs, state),
            describe_outputs,
            choice,
            choice.forward,
            probes,
            READ=probes is None,
            SAVE=save,
        )
        if probes is not None:
            return [end]
        return [end, y, starts] if save else [end, y]

    def state_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        dend: State,
        choice: tiles.GPU,
        probes: Probes | None,
        spans: Spans | None,
        interpret: bool,
    ) -> Sequence[Array]:
        """Launches the kernel of the state gradients."""
        save = probes is None

        def describe_outputs(r, log_w, a, b, dy, dend):
            dstart = output_like(dend.shape, jnp.float32, dend, dy)
            return [dstart, _chunk_states(dend, dy, choice, save)]

        arrays = (inputs.r, inputs.log_w, inputs.a, inputs.b, dy, dend)
        dstart, ends = _walk(
            "state_gradient",
            arrays,
            describe_outputs,
            choice,
            choice.state,
            probes,
            SAVE=save,
        )
        return [dstart, ends] if save else [dstart]

    def gradients_kernel(
        self,
        inputs: WKVInputs,
        dy: Array,
        starts: Array,
        ends: Array,
        choice: tiles.GPU,
        interpret: bool,
    ) -> Sequence[Array]:
        """Launches the kernel of the input gradients."""

        def run(*arrays):
            inputs = WKVInputs(*arrays[:6])
            dy = arrays[6]
            batch, tokens, heads, keys = inputs.r.shape
            return launch(
                "gradients",
                arrays,
                [output_like(x.shape, x.dtype, x, dy) for x in inputs],
                (batch * heads, tokens // choice.chunk),
                choice.gradients,
                CHUNK=choice.chunk,
                KEYS=keys,
                VALUES=dy.shape[3],
            )

        return _fold_vmap_into_batch(run)(*inputs, dy, starts, ends)


KERNELS = TritonKernels()
