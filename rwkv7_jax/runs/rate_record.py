"""The learning rates that a search finds for a run, and the record that stores them.

The search itself is a run of mode `RateStackMode` in its own folder within the run directory. It
has checkpoints, so a killed search resumes as any run does. The record of its result lies next to
the run's other files, and applies from then on.
"""

import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rwkv7_jax.checks import check_number
from rwkv7_jax.json_files import parse_json, read_object, write_json
from rwkv7_jax.runs.exit_codes import DiskError
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.runs.modes.rate_stack import (
    BASE,
    SEARCH_FOLDER,
    RateStackMode,
    subjects_of,
)
from rwkv7_jax.runs.modes.stack import if_named
from rwkv7_jax.runs.process_group import group_of_run
from rwkv7_jax.runs.resume.backup import STEPS
from rwkv7_jax.runs.resume.object_store import ObjectStore
from rwkv7_jax.runs.resume.run_identity import Identity, require_same_identity
from rwkv7_jax.runs.run_directory import RunDirectory
from rwkv7_jax.runs.run_folder import SETTINGS
from rwkv7_jax.tuning.rate_search import SearchPlan, choose_rate

# Errors from a record whose entries do not have the expected types.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)

# The file name of the record in the run directory.
RECORD = "rate_search.json"


def find_rates(
    mode: TrainingMode,
    folder: RunDirectory,
    identity: Identity,
    search: Callable[[RateStackMode], Any],
) -> bool:
    """Sets the learning rates of a mode; returns whether any state has a rate to train with.

    Args:
        mode: of the run.
        folder: of the run, where an earlier process may have left a record.
        identity: of the run.
        search: runs the search to its end and returns the parameters; called only if there is no
            record.

    Raises:
        ValueError: the record is damaged or belongs to another run.
        DiskError: the record cannot be written, or the search's copy in a store cannot be read.
    """
    path = folder.path / RECORD
    group = group_of_run()
    names = [_name(subject) for subject in subjects_of(mode)]
    record = group.from_process_0(lambda: _read_record(path, names, identity))
    if record is None:
        stack = RateStackMode(mode)
        _announce(stack)
        place = folder.path / SEARCH_FOLDER
        store = None
        if stack.settings.backup:
            store = ObjectStore(stack.settings.backup)
        group.from_process_0(lambda: _discard_other_plan(place, stack.plan, store))
        params = search(stack)
        if not stack.results:
            # An earlier process evaluated the last step; this one lacks the results.
            stack.evaluate(params)
        found = {
            "plan": stack.plan._asdict(),
            "states": {_name(one): _choose(stack, one) for one in stack.subjects},
            "identity": {name: dict(fields) for name, fields in identity.items()},
        }
        record = group.from_process_0(lambda: _write_record(path, found))
    return _use(mode, record["states"])


def _discard_other_plan(
    place: Path, plan: SearchPlan, store: ObjectStore | None = None
) -> None:
    """Deletes an interrupted search of another size, because it cannot be resumed.

    The size follows from settings of the run, such as its steps, which may have changed since.

    Args:
        place: the folder of the search.
        plan: of the search that begins or resumes.
        store: the copy of the folder, if the search has one.
    """
    settings = read_object(place / SETTINGS) or {}
    if store is not None and not settings:
        settings = _stored_settings(store)
    data = settings.get("data")
    rows = data.get("batch_size") if isinstance(data, Mapping) else None
    steps = settings.get("steps")
    if None in (rows, steps) or (steps, rows) == (plan.steps, plan.rows):
        return
    print(
        f"rate      the search begins anew, because it was interrupted with {steps} steps of "
        f"{rows} rows each"
    )
    # First the checkpoints: if this is killed, the settings still tell that the rest must go.
    shutil.rmtree(place / STEPS, ignore_errors=True)
    if store is not None:
        store.delete_folder(f"{STEPS}/")
        store.delete_folder("")
    if place.exists():
        shutil.rmtree(place)


def _stored_settings(store: ObjectStore) -> dict[str, Any]:
    """Returns the settings of the search in a store; empty if there is none."""
    content, _ = store.read(SETTINGS)
    try:
        settings = parse_json(content)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _read_record(
    path: Path, names: Collection[str], identity: Identity
) -> dict[str, Any] | None:
    """Reads the record that an earlier process wrote for these states; None if there is none."""
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_bytes())
        was = {group: dict(fields) for group, fields in record["identity"].items()}
    except _DAMAGE:
        raise _damaged(path) from None
    # First: with other texts, a run may have states that the record lacks.
    require_same_identity(path.parent, was, identity)
    try:
        for name in names:
            _check_found(record["states"][name])
    except _DAMAGE:
        raise _damaged(path) from None
    return record


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"`{path}` must be the record of a learning-rate search; it is damaged. Delete it to "
        "search again."
    )


def _check_found(found: Mapping[str, Any]) -> None:
    """Raises an error of any class if the record of a state is not what `_choose` returns."""
    if found["rate"] is not None:
        check_number(found["rate"], 0, math.inf, "`rate`")
    # `_sentence` reads all other entries.
    _sentence(found, None)


def _write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the record and returns it."""
    try:
        write_json(path, record)
    except (OSError, ValueError) as error:
        raise DiskError(f"`{path}` cannot be written: {error}.") from None
    return record


def _name(subject: str) -> str:
    """Returns the name of a state without its trailing "/"; "" for a run's only state."""
    return subject.removesuffix("/")


def _announce(search: RateStackMode) -> None:
    rates = search.settings.tuning.rates
    plan = search.plan
    wanted = search.settings.tuning.search_share
    print(
        f"rate      searches {len(rates)} learning rates from {min(rates):g} to {max(rates):g}, "
        f"{plan.steps} steps of {plan.rows} rows each: about {plan.share:.0%} of the run's "
        "arithmetic (set --config.optimizer.learning_rate to skip the search)"
    )
    if plan.share > 1.05 * wanted:
        print(
            f"rate      that is more than `config.tuning.search_share` ({wanted:g}), which is too "
            "little to tell the rates apart"
        )


def _choose(search: RateStackMode, subject: str) -> dict[str, Any]:
    """Chooses the rate of one state by its held-out loss.

    Returns:
        The state's part of the record, JSON-serialisable.
    """
    base = search.results[subject][BASE]
    # The other losses measure forgetting. Lower is better for all.
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
    """Sets the rate of each state and prints it; returns whether any state has one."""
    for subject, state in subjects_of(mode).items():
        one = found[_name(subject)]
        state.found_rate = one["rate"]
        name = _name(subject)
        sentence = _sentence(one, mode.settings.start)
        print(f"rate      {if_named('{}: ', name)}{sentence}", flush=True)
    return any(one["rate"] is not None for one in found.values())


def _sentence(found: Mapping[str, Any], start: str | None) -> str:
    """Describes the rate that was chosen for a state, and why."""
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
    text += f"Rate {rate:g} is used from step 0 on"
    # Records of earlier versions lack these two.
    why = found.get("why", "")
    near = found.get("near", ())
    if why:
        text += f": {why}"
    if len(near) > 1:
        listed = ", ".join(f"{one:g}" for one in near)
        text += (
            f"; {listed} are nearly equal: a search this short cannot tell them apart"
        )
    if found["edge"]:
        text += f"; it is the {found['edge']} of `config.tuning.rates`: one beyond it may be better"
    return text
