"""Optax transformations. Knows trees and paths, nothing of RWKV but its parameter groups."""
