"""Loading of a file's tensors into arrays on devices, replicated or sharded."""
