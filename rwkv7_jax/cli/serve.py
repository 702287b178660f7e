"""`rwkv7 serve`: a model and its start states over HTTP, as OpenAI's clients ask."""

import argparse
import importlib
import ipaddress
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from rwkv7_jax.cli.arguments import MOST_TOKENS, STATE_SUFFIXES, integer, path
from rwkv7_jax.cli.inputs import (
    add_any_base_option,
    add_model_options,
    add_vocabulary_option,
    read_model,
)
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.state_files import NAME, StateFiles
from rwkv7_jax.serving.watchdog import Watchdog

# Not an option: everybody on a machine sees the arguments of its programs.
_KEY = "RWKV7_API_KEY"

_MOST_SLOTS = 4096

_HIGHEST_PORT = 2**16 - 1


def add_serve_command(subparsers) -> None:
    """Adds the parser of `serve` to those of `rwkv7`."""
    parser = subparsers.add_parser("serve", help=COMMANDS["serve"])
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--state",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a start state that requests may name; the name is the file's without its suffix. A "
        "folder stands for the states in it, also those that come later; repeatable",
    )
    add_any_base_option(parser)
    add_vocabulary_option(parser, "the model's")
    add("--name", help="what clients call the model (the name of its file)")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    add(
        "--port",
        type=integer(0, _HIGHEST_PORT),
        default=8000,
        help="0 takes a free one (%(default)s)",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of https://HOST read answers in a browser; '*' is all; repeatable",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="answer to the name HOST, as behind a proxy, where the server listens to this machine "
        "alone and has no key; repeatable",
    )
    add(
        "--log-requests",
        action="store_true",
        help="write a line of JSON to stderr for each request, with its X-Request-Id",
    )
    _add_limits(parser)
    parser.set_defaults(run=run_serve, compiles=True)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options for how much is served at once."""
    add = parser.add_argument
    add(
        "--slots",
        type=integer(1, _MOST_SLOTS),
        default=8,
        help="requests that are answered at once (%(default)s)",
    )
    add(
        "--queue",
        type=integer(1, MOST_TOKENS),
        default=1024,
        help="requests that may wait; further ones get status 429 (%(default)s)",
    )
    add(
        "--prompt-tokens",
        type=integer(1, MOST_TOKENS),
        default=65536,
        help="longest prompt (%(default)s)",
    )
    add(
        "--answer-tokens",
        type=integer(1, MOST_TOKENS),
        default=8192,
        help="longest answer (%(default)s)",
    )
    add(
        "--cache-mib",
        type=integer(0, 2**20),
        default=256,
        help="memory for the states after prompts that were read before (%(default)s)",
    )
    add(
        "--drain",
        type=integer(0, 3600),
        default=20,
        metavar="SECONDS",
        help="time that SIGTERM leaves to answers which have begun (%(default)s)",
    )
    add(
        "--watchdog",
        type=integer(1, 86400),
        default=120,
        metavar="SECONDS",
        help="time after which a device that does not answer makes the server unhealthy; more than "
        "it takes to read 256 tokens for each slot (%(default)s)",
    )
    add(
        "--keep-alive",
        type=integer(1, 86400),
        default=75,
        metavar="SECONDS",
        help="time after which a connection without a request is closed; more than that of a load "
        "balancer before it (%(default)s)",
    )


def run_serve(options: argparse.Namespace) -> None:
    """Answers requests until a signal ends it."""
    files, folders = _state_places(options.state)
    key = _key()
    for origin in options.allow_origin:
        _check_origin(origin)
    for host in options.allow_host:
        _check_host(host)
    name = options.name or Path(options.model).resolve().stem
    _check_name(name, "--name")
    # Their packages are an extra.
    app: Any = importlib.import_module("rwkv7_jax.serving.app")
    server: Any = importlib.import_module("rwkv7_jax.serving.http_server")
    # Before the model is read: a port that is in use should not cost minutes.
    listener = _listener(server, options.host, options.port)
    with listener:
        with server.starting(listener, keep_alive=options.keep_alive):
            engine, states = _engine(options, files, folders)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        application = app.make_app(
            engine,
            name=name,
            key=key,
            origins=options.allow_origin,
            hosts=_allowed_hosts(options.allow_host, listener),
            refresh=lambda: states.refresh(engine),
            request_log=sys.stderr if options.log_requests else None,
        )

        def say_ready() -> None:
            names = ", ".join(engine.state_names) or "none"
            print(f"{name} at http://{host}:{port}/v1; states: {names}", flush=True)

        server.serve(
            application,
            engine,
            listener,
            on_ready=say_ready,
            drain=options.drain,
            keep_alive=options.keep_alive,
        )


def _engine(
    options: argparse.Namespace, files: dict[str, Path], folders: list[Path]
) -> tuple[Engine, StateFiles]:
    """Reads the model and its start states, and compiles what requests need."""
    model = read_model(options.model, weights=options.weights, dtype=options.dtype)
    states = StateFiles(
        files,
        folders,
        suffixes=STATE_SUFFIXES,
        load=lambda file: model.load_state(str(file), any_base=options.any_base),
    )
    engine = Engine(
        model.module,
        model.params,
        model.tokenizer(options.vocabulary),
        states.read(),
        slots=options.slots,
        queue=options.queue,
        longest_prompt=options.prompt_tokens,
        longest_answer=options.answer_tokens,
        cache_bytes=options.cache_mib * 2**20,
        watchdog=Watchdog(options.watchdog),
    )
    print(f"compiling for {options.slots} requests at once", flush=True)
    engine.warm_up()
    return engine, states


def _listener(server: Any, host: str, port: int) -> socket.socket:
    """Takes an address.

    Raises:
        ValueError: it is in use, or none of this machine.
    """
    try:
        return server.bind(host, port)
    # A name that no host can have is a UnicodeError.
    except (OSError, UnicodeError) as error:
        raise ValueError(
            "serve: `--host` and `--port` must be an address to listen at; "
            f"{host}:{port} is none: {error}."
        ) from None


def _state_places(words: list[str]) -> tuple[dict[str, Path], list[Path]]:
    """Finds the files of start states by name, and the folders of others."""
    files: dict[str, Path] = {}
    folders: list[Path] = []
    taken: dict[str, Path] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals:
            file = word
        place = Path(path(file))
        if place.is_dir() and not equals:
            folders.append(place)
            found = {one.stem: one for one in _states_in(place)}
        else:
            found = {name if equals else place.stem: place}
            files |= found
        for name, one in found.items():
            _check_name(name, "--state")
            if name in taken:
                raise ValueError(
                    f"serve: `--state` must give each state a name of its own; {name!r} is of "
                    f"`{taken[name]}` and `{one}`."
                )
            taken[name] = one
    return files, folders


def _states_in(folder: Path) -> list[Path]:
    """Lists the files of states in a folder."""
    return [one for one in sorted(folder.iterdir()) if one.suffix in STATE_SUFFIXES]


def _key() -> str | None:
    """Reads the key that clients must send; None without one."""
    key = os.environ.get(_KEY)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"serve: the environment's `{_KEY}` must be a key of printable ASCII without blanks; "
            "unset it to answer everybody."
        )
    return key


def _check_origin(origin: str) -> None:
    """Refuses what no browser sends as the origin of a page."""
    if not re.fullmatch(r"\*|\w+://[^/\s]+", origin):
        raise ValueError(
            "serve: `--allow-origin` must be '*' or like https://HOST or http://HOST:PORT, "
            f"without a path; got {origin!r}."
        )


def _check_host(host: str) -> None:
    """Refuses anything but a host name, such as an address with a port."""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(
            "serve: `--allow-host` must be a name like models.example, without a scheme, a port "
            f"or a path; got {host!r}."
        )


def _allowed_hosts(names: list[str], listener: socket.socket) -> list[str] | None:
    """Returns the names that clients may call the server by; None is any.

    What listens on other addresses, too, has names that only its network knows.
    """
    address = ipaddress.ip_address(listener.getsockname()[0])
    return [name.lower() for name in names] if address.is_loopback else None


def _check_name(name: str, option: str) -> None:
    """Refuses a name that could not be a part of a model's name."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"serve: `{option}` must name with letters, digits, '.', '_' and '-'; got {name!r}."
        )
