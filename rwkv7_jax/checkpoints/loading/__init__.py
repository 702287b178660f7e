"""From the tensors of a file to arrays on devices, whole or in shards."""
