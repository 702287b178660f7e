"""From the tensors of a file to arrays on devices, replicated or in shards."""
