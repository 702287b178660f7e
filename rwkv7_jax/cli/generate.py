"""`rwkv7 generate`: text from a checkpoint, streamed to the terminal."""

import argparse
import json
import os
import sys

import jax

from rwkv7_jax.generation.generate import Generation, generate
from rwkv7_jax.generation.sampling import exempt_ids
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.text.detokenizer import Vocabulary

_CHAT_STOP = "\n\nUser:"


def add_generate_command(subparsers) -> argparse.ArgumentParser:
    """The parser of `generate`, added to those of `rwkv7`; it runs `run_generate`."""
    parser = subparsers.add_parser("generate", help="continue a text or answer a message")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint: .pth, .safetensors or a folder")
    add("--state", help="tuned state to start from")
    add("--prompt", required=True, help="text to continue; - reads standard input")
    add("--chat", action="store_true", help="the prompt is a user's message to answer")
    add("--tokens", type=int, default=256, help="longest answer, in tokens (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=0.9, help="probability mass to keep (%(default)s)")
    add("--top-k", type=int, default=0, help="tokens to keep; 0 keeps all (%(default)s)")
    add("--presence-penalty", type=float, default=0.0, help="on tokens used (%(default)s)")
    add("--frequency-penalty", type=float, default=0.0, help="on each use (%(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--json", action="store_true", help="one JSON object at the end instead of a stream")
    parser.set_defaults(run=run_generate, compiles=True)
    return parser


def run_generate(args: argparse.Namespace) -> int:
    """The exit code, after the text was written; a reader that has gone away is no error."""
    try:
        _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    return 0


def _run(args: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.model_files import load_model, model_hash
    from rwkv7_jax.checkpoints.state_files import load_state
    from rwkv7_jax.text.tokenizer import Tokenizer

    prompt = _prompt(args)
    params, config = load_model(args.model)
    tokenizer = Tokenizer.for_vocabulary(config.vocab_size)
    state = None
    if args.state:
        own = model_hash(params, config)
        state = load_state(args.state, config=config, base_model=own)
    out = generate(
        RWKV7(config),
        params,
        tokenizer.encode(prompt) or [0],
        state,
        tokens=args.tokens,
        key=jax.random.key(args.seed),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        penalty_exempt=exempt_ids(tokenizer),
        stop_strings=[*args.stop, *([_CHAT_STOP] if args.chat else [])],
        tokenizer=tokenizer,
        on_text=None if args.json else _write,
    )
    print(_as_json(out, prompt, tokenizer) if args.json else "")


def _prompt(args: argparse.Namespace) -> bytes:
    """The prompt's bytes as they were given, whether or not they are UTF-8."""
    given = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    return b"User: " + given.strip() + b"\n\nAssistant:" if args.chat else given


def _write(piece: str, row: int) -> None:
    del row
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # A terminal of another encoding shows a question mark rather than ending the run.
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _as_json(out: Generation, prompt: bytes, tokenizer: Vocabulary) -> str:
    fields = {
        "prompt": prompt.decode(errors="replace"),
        "text": out.texts[0],
        "prompt_tokens": len(tokenizer.encode(prompt) or [0]),
        "tokens": out.tokens[0],
        "finished": out.finished[0],
    }
    return json.dumps(fields)


def discard_output() -> None:
    """What is still buffered goes nowhere: the interpreter's last flush is quiet as well."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
