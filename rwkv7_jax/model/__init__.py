"""The network. Pure functions and a thin Linen shell; the state goes in and comes back.

Imports kernels, checks and sharding. Knows no file, no loss, no loop.
"""
