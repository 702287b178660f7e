"""Serving: many requests at once, each from the start state that it names."""
