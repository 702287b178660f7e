"""Plans: the step of a run, compiled ahead of time for chips that are not here.

`python -m rwkv7_jax.plan` is the program; docs/cloud.md explains it.
"""

from rwkv7_jax.plan.chips import Target, find_target
from rwkv7_jax.plan.compiler import NoCompiler
from rwkv7_jax.plan.job import Job, make_job

__all__ = ["Job", "NoCompiler", "Target", "find_target", "make_job"]
