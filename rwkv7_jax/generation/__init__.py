"""Token ids in, token ids and a state out.

The compiled decode loop runs on the device; text and stop strings are handled on the host.
"""
