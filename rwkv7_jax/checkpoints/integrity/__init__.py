"""File integrity: format detection, checksums and digests, and checks for finite values."""
