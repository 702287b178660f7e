"""The training modes, which define what a run of train.py trains, and from which batches.

A mode is a subclass of `TrainingMode`, the only interface that the loop in train.py uses.
"""
