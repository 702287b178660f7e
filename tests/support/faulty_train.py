"""train.py with a fault in it: `FAULT` names which; the command line is train.py's own.

nan:3,4     the losses of these steps are not finite (nan: is all of them from the first)
slow:30     every save but the first takes so many seconds longer
size:20000  no file may grow beyond so many bytes
"""

import dataclasses
import math
import os
import resource
import runpy
import sys
import time

from rwkv7_jax.runs.modes.registry import make_job
from rwkv7_jax.runs.resume import step_directories as step_folders

NAME, _, NUMBERS = os.environ["FAULT"].partition(":")


def poisoned(make):
    """The same job, with a mask of NaN in the batches of the named steps."""
    steps = {int(number) - 1 for number in NUMBERS.split(",") if number}

    def make_job(*arguments):
        job = make(*arguments)

        def prepared(batch, step):
            bad = step in steps or not steps
            return batch.replace(mask=batch.mask * math.nan) if bad else batch

        return dataclasses.replace(job, prepared=prepared)

    return make_job


def slowed(seal):
    """The same, seconds later from the second time on."""
    times = iter(range(1000))

    def slow(folder):
        if next(times):
            time.sleep(float(NUMBERS))
        seal(folder)

    return slow


if NAME == "nan":
    make_job = poisoned(make_job)
elif NAME == "slow":
    step_folders.write_manifest = slowed(step_folders.write_manifest)
elif NAME == "size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(NUMBERS), resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
