"""The life of one run of train.py: settings, modes, resuming, logging, signals, processes.

The only room with side effects on the process, and all of those are in `process`.
"""
