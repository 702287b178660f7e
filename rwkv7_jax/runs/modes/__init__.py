"""One module for each training mode."""
