"""Numbers about a model and a state, and what to do about them. Never trains."""
