"""A damaged Orbax folder raises one error and prints nothing else to stderr."""

import json
import os
import subprocess
import sys
import time

import pytest
from random_checkpoints import CONFIG, random_params
from run_programs import ROOT

from rwkv7_jax.checkpoints import orbax_import
from rwkv7_jax.checkpoints.model_files import load_model, save_model

READ = """
import pathlib
import shutil
import sys

from rwkv7_jax import load_model

good, bad = map(pathlib.Path, sys.argv[1:])
count = 0
for file in sorted(good.rglob("*")):
    if not file.is_file():
        continue
    data = file.read_bytes()
    for changed in (bytes(len(data)), data[::-1], data[: len(data) // 2], b"{}" + data[2:]):
        shutil.copytree(good, bad)
        (bad / file.relative_to(good)).write_bytes(changed)
        try:
            load_model(bad)
        except ValueError as error:
            assert str(bad) in str(error), error
            count += 1
        shutil.rmtree(bad)
print(count)
"""


@pytest.mark.slow
def test_damaged_folders_print_nothing_besides_the_error(tmp_path):
    save_model(tmp_path / "good", random_params(), CONFIG)
    ended = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "good", tmp_path / "bad"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert int(ended.stdout) >= 10


def test_an_absurd_number_of_layers_is_rejected_quickly(tmp_path):
    """Building the table of names once took minutes and gigabytes."""
    save_model(tmp_path / "m", random_params(), CONFIG)
    card = tmp_path / "m" / "rwkv7_jax.json"
    table = json.loads(card.read_text())
    table["config"]["num_layers"] = 30_000
    card.write_text(json.dumps(table))
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"layers/\S+ of shape \(29999, "):
        load_model(tmp_path / "m")
    assert time.process_time() - begun < 3


def test_the_hook_hides_only_abandoned_reads(monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    for _ in range(3):
        orbax_import.hide_abandoned_reads()

    class Complaint:
        object = None

        def __init__(self, error):
            self.exc_value = error

    sys.unraisablehook(Complaint(RuntimeError("Event loop is closed")))
    assert found == []
    other = Complaint(ValueError("of a user's own"))
    sys.unraisablehook(other)
    assert found == [other]
