"""Losses, the train step, and what a step costs.

A loss is a function of trainable parameters and a batch; a step is a pure function of a TrainState.
"""
