"""`rwkv7 serve`: a model and its start states over HTTP, with OpenAI's API."""

import argparse
import importlib
import ipaddress
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from rwkv7_jax.cli.arguments import MOST_TOKENS, STATE_SUFFIXES, integer
from rwkv7_jax.cli.inputs import (
    add_any_base_option,
    add_model_options,
    add_vocabulary_option,
    read_model,
)
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.local_paths import local_path
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.state_files import NAME, StateFiles
from rwkv7_jax.serving.watchdog import Watchdog

# Not an option, because every user of a machine can see the arguments of its processes.
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
        help="a start state that requests may name; the default name is the file name without its "
        "suffix. A folder stands for all states in it, including later ones; repeatable",
    )
    add_any_base_option(parser)
    add_vocabulary_option(parser, "the model's")
    add("--name", help="the name of the model for clients (the name of its file)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add(
        "--port",
        type=integer(0, _HIGHEST_PORT),
        default=8000,
        help="port to listen on; 0 for a free one (%(default)s)",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin, such as https://HOST, read answers in a browser; '*' for "
        "all; repeatable",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="accept the host name HOST, for example behind a proxy; needed only if the server has "
        "no key and listens only on this machine; repeatable",
    )
    add(
        "--log-requests",
        action="store_true",
        help="write a line of JSON per request to stderr, with its X-Request-Id",
    )
    _add_limits(parser)
    parser.set_defaults(run=run_serve, computes=True, waits=False)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options that limit requests, memory and time."""
    add = parser.add_argument
    add(
        "--slots",
        type=integer(1, _MOST_SLOTS),
        default=8,
        help="requests that decode together (%(default)s)",
    )
    add(
        "--queue",
        type=integer(1, MOST_TOKENS),
        default=1024,
        help="requests that may wait; others get status 429 (%(default)s)",
    )
    add(
        "--prompt-tokens",
        type=integer(1, MOST_TOKENS),
        default=65536,
        help="maximum number of prompt tokens (%(default)s)",
    )
    add(
        "--answer-tokens",
        type=integer(1, MOST_TOKENS),
        default=8192,
        help="maximum number of new tokens (%(default)s)",
    )
    add(
        "--cache-mib",
        type=integer(0, 2**20),
        default=256,
        help="memory for cached states after prompts and answers (%(default)s)",
    )
    add(
        "--drain",
        type=integer(0, 3600),
        default=20,
        metavar="SECONDS",
        help="time that open answers get to complete after SIGTERM (%(default)s)",
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
        help="time after which an idle connection is closed; it should exceed that of a load "
        "balancer in front of the server (%(default)s)",
    )


def run_serve(options: argparse.Namespace) -> None:
    """Serves requests until a signal ends the process."""
    files, folders = _state_places(options.state)
    key = _key()
    for origin in options.allow_origin:
        _check_origin(origin)
    for host in options.allow_host:
        _check_host(host)
    name = options.name or Path(options.model).resolve().stem
    _check_name(name, "--name")
    # Import here, because their packages are an extra.
    app: Any = importlib.import_module("rwkv7_jax.serving.app")
    server: Any = importlib.import_module("rwkv7_jax.serving.http_server")
    # Before the model is read, which takes minutes: the port may be in use.
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
    print(f"compiling for {options.slots} concurrent requests", flush=True)
    with report_wait("the compilation"):
        engine.warm_up()
    return engine, states


def _listener(server: Any, host: str, port: int) -> socket.socket:
    """Binds a socket to an address.

    Raises:
        ValueError: the address is in use or does not belong to this machine.
    """
    try:
        return server.bind(host, port)
    # An invalid host name raises UnicodeError.
    except (OSError, UnicodeError) as error:
        raise ValueError(
            "serve: `--host` and `--port` must be an address that this machine can listen on; got "
            f"{host}:{port}: {error}."
        ) from None


def _state_places(words: list[str]) -> tuple[dict[str, Path], list[Path]]:
    """Returns the files of start states by name, and the folders of further states."""
    files: dict[str, Path] = {}
    folders: list[Path] = []
    taken: dict[str, Path] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals:
            file = word
        place = local_path(file, "serve: `--state`")
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
                    f"serve: `--state` must give each state its own name; {name!r} names "
                    f"`{taken[name]}` and `{one}`."
                )
            taken[name] = one
    return files, folders


def _states_in(folder: Path) -> list[Path]:
    """Returns the state files in a folder."""
    return [one for one in sorted(folder.iterdir()) if one.suffix in STATE_SUFFIXES]


def _key() -> str | None:
    """Returns the key that clients must send; None if the environment has none."""
    key = os.environ.get(_KEY)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"serve: the environment variable `{_KEY}` must be a key of printable ASCII without "
            "spaces; unset it to accept every client."
        )
    return key


def _check_origin(origin: str) -> None:
    """Raises for an origin that no browser sends."""
    if not re.fullmatch(r"\*|\w+://[^/\s]+", origin):
        raise ValueError(
            "serve: `--allow-origin` must be '*' or an origin such as https://HOST or "
            f"http://HOST:PORT, without a path; got {origin!r}."
        )


def _check_host(host: str) -> None:
    """Raises for anything but a host name, such as a host with a port."""
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(
            "serve: `--allow-host` must be a name like models.example, without a scheme, a port "
            f"or a path; got {host!r}."
        )


def _allowed_hosts(names: list[str], listener: socket.socket) -> list[str] | None:
    """Returns the host names that the server accepts; None for any.

    A server that also listens on other addresses may have names that only its network knows.
    """
    address = ipaddress.ip_address(listener.getsockname()[0])
    return [name.lower() for name in names] if address.is_loopback else None


def _check_name(name: str, option: str) -> None:
    """Raises for a name that cannot be part of a model name."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"serve: `{option}` must give a name of letters, digits, '.', '_' and '-'; got "
            f"{name!r}."
        )
