"""Start states from rewards or from a teacher.

Every method is a source of batches for one tuning loop.
"""
