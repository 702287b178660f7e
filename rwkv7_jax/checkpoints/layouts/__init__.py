"""The layouts of models in files: tensor names, and the orientation of the low-rank matrices.

Only names and shapes determine the layout, never a file's suffix or a folder's config.json.
"""
