"""Steps that ask how fast the op, a training step, decoding and reading a prompt are."""

import dataclasses
import functools
import itertools
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import rwkv7_jax as rwkv
from benchmarks import decode, peers_gpu
from benchmarks.device.sizes import Rows, Sizes, attempt, kernels, op_of
from benchmarks.sequential_gpu import sequential
from pallas_kernels import bench
from pallas_kernels.cases import Case
from pallas_kernels.gpu import segmented_passes


def times(sizes: Sizes) -> Rows:
    """Times all implementations and peers on the same data, with their errors to float64."""
    bandwidth = bench.copy_bandwidth(sizes.repeats)
    for case in sizes.cases:
        data = peers_gpu.make_data(case)
        given = (data, sizes.repeats, bench.truth(data))
        if sizes.interpret:
            op = functools.partial(sequential, interpret=True)
            runs = {"sequential": functools.partial(peers_gpu.measure, op, *given)}
        else:
            runs = peers_gpu.contestants(case, given)
        for name, run in runs.items():
            row = attempt(run)
            shares = peers_gpu.of_copy(case, row | {"status": row["result"]}, bandwidth)
            row |= {f"{passed} of copy": share for passed, share in shares.items()}
            yield {"name": name, "case": dataclasses.astuple(case)} | row


def segments(sizes: Sizes) -> Rows:
    """Times forced numbers of segments next to what the rule chooses."""
    keys, values = sizes.heads_of[0]
    tokens = sizes.cases[0].tokens
    for number in (2,) if sizes.interpret else (16, 32, 64, 96, 128):
        data = peers_gpu.make_data(Case(1, tokens, number, keys, values))
        for count in (None, *sizes.segments):

            def run(data=data, count=count):
                choose = segmented_passes.choose_segments
                forced = choose if count is None else lambda **_: count
                with mock.patch.object(segmented_passes, "choose_segments", forced):
                    op = op_of(kernels(sizes)[0], sizes)
                    return peers_gpu.measure(op, data, sizes.repeats)

            yield {"heads": number, "segments": count} | attempt(run)


def float32(sizes: Sizes) -> Rows:
    """Times float32 tokens."""
    for row in bench.measure(sizes.cases[-1], "float32", repeats=sizes.repeats):
        yield {"case": dataclasses.astuple(sizes.cases[-1])} | row


def training(sizes: Sizes) -> Rows:
    """Times a step of state tuning and of pre-training, by rows, implementation and remat."""
    names = [None] if sizes.interpret else [None, *kernels(sizes)[1:], "chunked"]
    choices = itertools.product(
        reversed(sizes.batches), names, ("state", "weights"), sizes.remats
    )
    for batch, name, trained, remat in choices:
        row = attempt(functools.partial(_time_step, sizes, trained, batch, name, remat))
        yield {
            "trained": trained,
            "rows": batch,
            "implementation": name,
            "remat": remat,
        } | row


@functools.cache
def _weights(sizes: Sizes):
    """Makes random weights in bfloat16."""
    vocabulary, layers, width = sizes.model
    _, params = decode.random_model(layers, width, vocabulary)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _model(sizes: Sizes, **options) -> rwkv.RWKV7:
    vocabulary, layers, width = sizes.model
    config = rwkv.RWKV7Config(
        vocab_size=vocabulary,
        num_layers=layers,
        width=width,
        dtype="bfloat16",
        **options,
    )
    return rwkv.RWKV7(config)


def _time_step(
    sizes: Sizes, trained: str, batch: int, name: str | None, remat: str
) -> dict:
    model = _model(sizes, implementation=name, remat=remat)
    tx = optax.adam(1e-3)
    if trained == "weights":
        loss = rwkv.pretrain_loss(model)
        # A copy: a step takes what it is given.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), _weights(sizes))
        train = rwkv.TrainState.create(wide, tx)
    else:
        loss = rwkv.state_loss(model, _weights(sizes))
        train = rwkv.TrainState.create(rwkv.init_state(model.config), tx)
    rows = {
        "tokens": jnp.ones((batch, sizes.length + 1), jnp.int32),
        "mask": jnp.ones((batch, sizes.length), jnp.float32),
    }
    step = rwkv.make_train_step(loss, tx)
    walls = []
    # The first one compiles.
    for _ in range(1 + sizes.repeats):
        began = time.perf_counter()
        train, metrics = step(train, rows)
        metrics["loss"].block_until_ready()
        walls.append(time.perf_counter() - began)
    least = min(walls[1:])
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "ms": 1e3 * least,
        "tokens/s": batch * sizes.length / least,
        "first call s": walls[0],
        "peak GiB so far": stats.get("peak_bytes_in_use", 0) / 2**30,
    }


def decoding(sizes: Sizes) -> Rows:
    """Measures generated tokens a second, by rows."""
    model = _model(sizes)
    params = _weights(sizes)

    def run(batch):
        out = rwkv.generate(model, params, [[1, 2, 3]] * batch, tokens=0)
        tokens = 4 if sizes.interpret else 128
        rates = decode.tokens_per_second(
            model, params, {batch: out}, tokens=tokens, repeats=sizes.repeats
        )
        return {"tokens/s": rates[batch], "ms a token": 1e3 * batch / rates[batch]}

    for batch in sizes.decoded:
        yield {"rows": batch} | attempt(functools.partial(run, batch))


def prefill(sizes: Sizes) -> Rows:
    """Measures how fast one prompt is read, by its length."""
    model = _model(sizes)
    params = _weights(sizes)
    state = rwkv.init_state(model.config)

    @jax.jit
    def read(params, tokens, state):
        return model.apply({"params": params}, tokens, state, method="hidden")[1]

    def run(length):
        tokens = jnp.ones((1, length), jnp.int32)
        call = functools.partial(read, params, tokens, state)
        wall, _ = bench.least_ms(call, repeats=sizes.repeats)
        return {"ms": wall, "tokens/s": 1e3 * length / wall}

    for length in sizes.prompts:
        yield {"tokens": length} | attempt(functools.partial(run, length))
