"""New weights, two steps of state tuning and one generation, printed; run in its own process."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import trainable_mask

CONFIG = rwkv.RWKV7Config(vocab_size=257, num_layers=2, width=32, head_size=16)


def make_new_weights(model: rwkv.RWKV7):
    """Makes the weights of a new model."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    start = rwkv.init_state(model.config)
    return model.init(jax.random.key(0), tokens, start)["params"]


def draw_weights(shapes):
    """Draws weights none of which are zero: new ones would hide the recurrence."""
    noise = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.2 * noise.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


def main() -> None:
    """Prints the sum of new weights, two losses, and the ids that follow a prompt."""
    model = rwkv.RWKV7(CONFIG)
    new = make_new_weights(model)
    # Draws differ where float64 is allowed; what follows from the layer alone does not.
    fixed = [new["layers"]["att"][name] for name in ("w0", "k_k", "a0")]
    start = sum(float(jnp.sum(jnp.abs(leaf))) for leaf in fixed)
    params = draw_weights(new)
    # Few tokens: where nothing is compiled, every operation on each is a call of its own.
    ids = np.random.default_rng(1).integers(0, 257, (2, 5))
    batch = rwkv.data.Batch(tokens=ids, mask=np.ones((2, 4), np.float32))

    tx = optax.masked(
        rwkv.decorrelate(optax.adam(0.1)),
        trainable_mask(rwkv.init_state(CONFIG), ("wkv",)),
    )
    loss = rwkv.state_loss(model, params, l2wrap=1e-4)
    step = rwkv.make_train_step(loss, tx, statistics=state_statistics(model, params))
    train = rwkv.TrainState.create(rwkv.init_state(CONFIG), tx)
    losses = []
    for _ in range(2):
        train, metrics = step(train, batch)
        losses.append(float(metrics["loss_nats"]))

    out = rwkv.generate(
        model,
        params,
        [1, 2, 3],
        train.params,
        tokens=4,
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.5,
        key=jax.random.key(1),
    )
    # Nothing becomes float64 on the way, where that is allowed.
    wide = rwkv.upscale(model, params, ids, dynamics="delta", size=8)
    for leaf in jax.tree.leaves((new, train.params, out.state, out.logits, wide)):
        assert leaf.dtype == jnp.float32, leaf.dtype
    print(start, *losses, *out.tokens[0])


if __name__ == "__main__":
    main()
