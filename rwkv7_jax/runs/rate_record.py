"""The record of a run's learning rates: found by a search, printed, written and read again.

The search itself is a run of mode `RateStackMode` in a folder of its own inside the run's folder,
with checkpoints: one that was killed goes on as any other run does. What it found is written next
to the run's other files, and counts from then on.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.checks import check_number
from rwkv7_jax.json_files import parse_json, write_json
from rwkv7_jax.runs.exit_codes import DiskError
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.rate_stack import BASE, RateStackMode, subjects_of
from rwkv7_jax.runs.modes.stack import if_named
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.run_identity import Identity, require_same_identity
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.tuning.rate_search import choose_rate

# What the search found, in the run's folder.
RECORD = "rate_search.json"


def find_rates(
    mode: TrainingMode,
    folder: RunDirectory,
    identity: Identity,
    search: Callable[[RateStackMode], Any],
) -> bool:
    """Gives a mode its learning rates; returns whether there is one that is worth a run.

    Args:
        mode: of the run.
        folder: of the run, where an earlier process may have left what it found.
        identity: of the run.
        search: runs the search to its end and returns the parameters; called only where nothing is
            found yet.

    Raises:
        ValueError: what was found is of another run.
        DiskError: what was found cannot be written.
    """
    path = folder.path / RECORD
    group = group_of_run()
    names = [_name(subject) for subject in subjects_of(mode)]
    record = group.from_process_0(lambda: _read_record(path, names, identity))
    if record is None:
        made = RateStackMode(mode)
        _announce(made)
        params = search(made)
        if not made.results:
            # An earlier process evaluated the last step.
            made.evaluate(params)
        found = {
            "plan": made.plan._asdict(),
            "states": {_name(one): _choose(made, one) for one in made.subjects},
            "identity": {name: dict(fields) for name, fields in identity.items()},
        }
        record = group.from_process_0(lambda: _write_record(path, found))
    return _use(mode, record["states"])


def _read_record(
    path: Path, names: Collection[str], identity: Identity
) -> dict[str, Any] | None:
    """Reads what an earlier process found for states of these names; None if there is nothing."""
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_bytes())
        was = {group: dict(fields) for group, fields in record["identity"].items()}
        for name in names:
            _check_found(record["states"][name])
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        raise ValueError(
            f"`{path}` must be the record of a search of learning rates; it is damaged. Delete it "
            "to search again."
        ) from None
    require_same_identity(path.parent, was, identity)
    return record


def _check_found(found: Mapping[str, Any]) -> None:
    """Raises an error of whatever kind where a record of a state is not what `_choose` returns."""
    if found["rate"] is not None:
        check_number(found["rate"], 0, math.inf, "`rate`")
    # It reads all other entries.
    _sentence(found, None)


def _write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the record and returns it."""
    try:
        write_json(path, record)
    except (OSError, ValueError) as error:
        raise DiskError(f"`{path}` cannot be written: {error}.") from None
    return record


def _name(subject: str) -> str:
    """Returns the name of a state, without what divides it from a rate; "" of a run's only one."""
    return subject.removesuffix("/")


def _announce(search: RateStackMode) -> None:
    rates = search.settings.tuning.rates
    plan = search.plan
    wanted = search.settings.tuning.search_share
    print(
        f"rate      {len(rates)} learning rates from {min(rates):g} to {max(rates):g} are tried, "
        f"{plan.steps} steps of {plan.rows} rows each: about {plan.share:.0%} of the run's "
        "arithmetic (--config.optimizer.learning_rate names one instead)"
    )
    if plan.share > 1.05 * wanted:
        print(
            f"rate      that is more than `config.tuning.search_share` ({wanted:g}), with which "
            "the rates could not be told from each other"
        )


def _choose(search: RateStackMode, subject: str) -> dict[str, Any]:
    """Chooses the rate of one state by its loss on held-out data.

    Returns:
        What the record holds of it, fit for JSON.
    """
    base = search.results[subject][BASE]
    # The others are of what must not be forgotten. All are losses: lower is better.
    decides, *others = base
    losses: dict[float, float] = {}
    forgetting: dict[float, float] = {}
    curve = []
    for rate in search.settings.tuning.rates:
        measured = search.results[subject][f"{rate:g}"]
        values = {name: one.value for name, one in measured.items()}
        curve.append({"rate": rate, **values})
        losses[rate] = values[decides]
        if others:
            forgetting[rate] = sum(values[name] for name in others)
    guess = search.guess(subject)
    choice = choose_rate(
        base[decides].value, losses, forgetting=forgetting or None, guess=guess
    )
    return {
        "rate": choice.rate,
        "edge": choice.edge,
        "near": list(choice.near),
        "why": choice.why,
        "guess": guess,
        "measure": decides,
        "base": {name: one.value for name, one in base.items()},
        "curve": curve,
    }


def _use(mode: TrainingMode, found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Gives each state the rate that was found for it, and says so."""
    for subject, state in subjects_of(mode).items():
        one = found[_name(subject)]
        state.found_rate = one["rate"]
        name = _name(subject)
        sentence = _sentence(one, mode.settings.start)
        print(f"rate      {if_named('{}: ', name)}{sentence}", flush=True)
    return any(one["rate"] is not None for one in found.values())


def _sentence(found: Mapping[str, Any], start: str | None) -> str:
    """Says what was chosen for a state, and why."""
    measure = found["measure"]
    base = found["base"][measure]
    curve = ", ".join(f"{one['rate']:g}: {one[measure]:.4f}" for one in found["curve"])
    text = f"{measure} {base:.4f} untuned; {curve}. "
    rate = found["rate"]
    if rate is None:
        untuned = "the model without a state"
        if start is not None:
            untuned = "the state of `config.start`"
        return f"{text}No rate is better than {untuned}: nothing is tuned, and no state is saved"
    text += f"{rate:g} is taken, from step 0 on, as if it had been named"
    # Records of earlier versions have neither.
    why = found.get("why", "")
    near = found.get("near", ())
    if why:
        text += f": {why}"
    if len(near) > 1:
        listed = ", ".join(f"{one:g}" for one in near)
        text += f"; nearly equal are {listed}: so short a search cannot tell them apart"
    if found["edge"]:
        text += f"; it is the {found['edge']} of `config.tuning.rates`: one beyond it may be better"
    return text
