"""The speed of encoding, next to the official trie and the Rust tokenizer (extra `oracle`).

Run from the repository's root: `python -m benchmarks.tokenizer_speed [--json FILE]`. The text is
the source of the standard library. Where the Rust tokenizer is installed, ours uses it for texts of
this length (extra `fast-world`), so ours is also measured without it. Seconds are process time, the
minimum of several runs.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks import record
from benchmarks.timing import time_call
from rwkv7_jax.data.readers import documents
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabulary_file import parse_vocabulary

Encode = Callable[[str], Any]


def encoders() -> dict[str, Encode]:
    """Finds the tokenizers that are installed, by name."""
    world = Tokenizer.world()
    # World's entries from a file: the Rust tokenizer encodes only the built-in vocabulary.
    entries = parse_vocabulary(world.file_text())
    plain = Tokenizer(entries, vocab_size=65536, name="world", kind="file")
    found: dict[str, Encode] = {"rwkv7_jax": plain.encode}
    if importlib.util.find_spec("rwkv"):
        import rwkv
        from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

        trie = TRIE_TOKENIZER(f"{rwkv.__path__[0]}/rwkv_vocab_v20230424.txt")
        found["rwkv (trie)"] = trie.encode
    if importlib.util.find_spec("pyrwkv_tokenizer"):
        import pyrwkv_tokenizer

        found["rwkv7_jax (fast-world)"] = world.encode
        found["pyrwkv-tokenizer (Rust)"] = pyrwkv_tokenizer.RWKVTokenizer().encode
    return found


def least_seconds(encode: Encode, text: str, repeats: int) -> float:
    """Measures the fastest of several runs."""
    return min(time_call(lambda: encode(text)).processor for _ in range(repeats))


def main() -> None:
    """Prints a table; with `--json`, writes it with device, versions, date and command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    sources = b"\n".join(document.text() for document in documents("stdlib"))
    text = sources.decode(errors="replace")[: int(args.megabytes * 1e6)]
    size = len(text.encode())
    rows = []
    first_ids = None
    for name, encode in encoders().items():
        ids = list(encode(text))
        # Ours comes first; the others are compared with it.
        first_ids = first_ids or ids
        same = ids == first_ids
        speed = size / least_seconds(encode, text, args.repeats) / 1e6
        rows.append({"what": name, "MB/s": speed, "same_ids": same})
        print(f"{name:<26}{speed:>8.2f} MB/s   {'same ids' if same else 'OTHER IDS'}")
    if args.json:
        record.write(
            args.json,
            "benchmarks.tokenizer_speed",
            packages=(),
            bytes=size,
            rows=rows,
        )


if __name__ == "__main__":
    main()
