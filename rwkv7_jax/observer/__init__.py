"""The observer: a small model that reads a prompt and proposes the teacher's start state."""
