"""Prompts and a reward of the smallest task that a state can be tuned on by rewards."""


def prompts_at(step):
    """Two prompts of two and three ids, others at each step."""
    return [[1 + step % 12, 2], [1 + (5 * step) % 12, 3, 2]]


def sevens(prompt, completion):
    """How much of a completion is the id 7."""
    return completion.count(7) / len(completion)
