"""Records as texts that show what of them is learnt."""

from rwkv7_jax.data.records.record import parse_record


def marked(record):
    """Returns the document's text, with square brackets around what is not in the loss."""
    parts = []
    for segment in parse_record(record).segments:
        text = segment.text.decode()
        parts.append(text if segment.in_loss else f"[{text}]")
    return "".join(parts)
