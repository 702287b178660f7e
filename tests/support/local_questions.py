"""Questions in the format of GSM8K's files, made up here."""

import json
from pathlib import Path


def write_questions(path: Path, first: int, count: int) -> None:
    """Writes questions about sums, with the annotations and the ending of real answers."""
    lines = []
    for number in range(first, first + count):
        total = 2 * number + 3
        question = f"Ada has {number} pears and buys {number + 3}. How many has she?"
        answer = (
            f"She has {number}+{number + 3}=<<{number}+{number + 3}={total}>>{total} "
            f"pears.\n#### {total}"
        )
        lines.append(json.dumps({"question": question, "answer": answer}))
    path.write_text("\n".join(lines) + "\n")
