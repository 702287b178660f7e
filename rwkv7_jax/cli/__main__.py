"""`python -m rwkv7_jax.cli`: the `rwkv7` command."""

from rwkv7_jax.cli.main import main

main()
