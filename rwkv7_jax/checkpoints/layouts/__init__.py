"""The layouts of models in files: which tensor is which, and which way its numbers lie.

Only names and shapes decide, never a file's suffix or a folder's config.json.
"""
