"""Compiles the step of a run ahead of time for chips that this machine does not have.

The program is `python -m rwkv7_jax.plan`; docs/cloud.md explains it.
"""

from rwkv7_jax.plan.chips import Target, find_target
from rwkv7_jax.plan.compiler import NoCompiler
from rwkv7_jax.plan.job import Job, make_job

__all__ = ["Job", "NoCompiler", "Target", "find_target", "make_job"]
