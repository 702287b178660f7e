"""Small vocabularies of every kind: files in World's format, and files of `tokenizers`."""

import json
from pathlib import Path

# The vocabulary of the model that writes numbers backwards: the digits are 0 to 9.
DIGITS = "".join(f"{i} {c!r} 1\n" for i, c in enumerate("0123456789,#"))

# Entries of several bytes, of parts of a character, and ids without one.
WORDS = """1 'a' 1
2 'b' 1
3 'ab' 2
4 'abba' 4
7 ' ' 1
9 b'\\xe2\\x82' 2
10 b'\\xac' 1
20 '\\n' 1
"""

TEXT = (
    "the cat sat on the mat. Where is the cat? 12 caf\u00e9s, \u4f60\u597d \U0001f600\n"
    * 20
)


def byte_level_bpe(folder: Path, *, vocab_size: int = 300) -> Path:
    """Writes a `tokenizer.json` as GPT-2's kind is: byte level, `<|endoftext|>` as id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    # As files of published models may have it; ids must not be cut all the same.
    tokenizer.enable_truncation(5)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentence_pieces(folder: Path, *, prefix: bool) -> Path:
    """Writes a `tokenizer.json` as SentencePiece's kind is: low lines for blanks, byte fallback.

    Args:
        folder: where it goes.
        prefix: whether a blank is put before every text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Replace(" ", "\u2581")]
    if prefix:
        steps.insert(0, normalizers.Prepend("\u2581"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT.replace("\U0001f600", "")], trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for token in fallback:
        vocabulary[token] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"
