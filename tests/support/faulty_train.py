"""train.py with a fault in it: `FAULT` names which; the command line is train.py's own.

nan:3,4     the losses of these steps are not finite (nan: is all of them from the first)
slow:30     every save but the first takes 30 seconds longer
size:20000  no file may grow beyond 20,000 bytes
shards:9    the second process cannot write; the first waits 9 seconds for it
silent      no process sends arrays to the others
other       the second process makes another first state than the first one
torn        the second process cannot read its data
"""

import os
import resource
import runpy
import sys
import time

import jax
import jax.numpy as jnp

from rwkv7_jax.runs.datasets import TrainingData
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.process_group import AllProcesses
from rwkv7_jax.runs.resume import checkpointer, step_directories
from rwkv7_jax.training import gradients

NAME, _, NUMBERS = os.environ["FAULT"].partition(":")


# A mask of this value marks a batch whose loss becomes NaN. NaN in the mask itself would be
# refused before the first step.
SPOILT = 2.0


def poisoned(batches):
    """Marks the batches of the named steps."""
    steps = {int(number) - 1 for number in NUMBERS.split(",") if number}

    def poisoned_batches(data, *, start_step=0, **choices):
        clean = batches(data, start_step=start_step, **choices)
        for step, batch in enumerate(clean, start_step):
            bad = step in steps or not steps
            yield batch.replace(mask=batch.mask * SPOILT) if bad else batch

    return poisoned_batches


def spoilt(loss_weights):
    """Makes the shares of the targets, and with them the loss, NaN in a marked batch."""

    def shares(batch):
        marked = jnp.max(batch["mask"]) == SPOILT
        return jnp.where(marked, jnp.nan, loss_weights(batch))

    return shares


def slowed(write):
    """Delays all calls but the first."""
    times = iter(range(1000))

    def slow(*arguments):
        if next(times):
            time.sleep(float(NUMBERS))
        write(*arguments)

    return slow


def changed(train_state):
    """Makes other parameters than those that were asked for."""

    def other_state(mode, params, tx):
        return train_state(mode, jax.tree.map(lambda leaf: leaf + 1, params), tx)

    return other_state


def unreadable(data, settings, tokenizer):
    """Rejects the data, as where a line of it is damaged."""
    del data, tokenizer
    raise ValueError(f"`{settings.data.path}` is torn.")


if NAME == "nan":
    TrainingData.batches = poisoned(TrainingData.batches)
    gradients.loss_weights = spoilt(gradients.loss_weights)
elif NAME == "slow":
    step_directories.write_manifest = slowed(step_directories.write_manifest)
elif NAME == "size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(NUMBERS), resource.RLIM_INFINITY))
elif NAME == "shards":
    checkpointer.SAVE_SECONDS = int(NUMBERS)
    if "--process=1" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
elif NAME == "silent":
    AllProcesses.broadcast_arrays = None
elif NAME == "other" and "--process=1" in sys.argv:
    TrainingMode.train_state = changed(TrainingMode.train_state)
elif NAME == "torn" and "--process=1" in sys.argv:
    TrainingData.__init__ = unreadable
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
