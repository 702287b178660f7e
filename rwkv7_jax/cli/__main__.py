"""Runs the `rwkv7` command as `python -m rwkv7_jax.cli`."""

import sys

from rwkv7_jax.cli import main

sys.exit(main())
