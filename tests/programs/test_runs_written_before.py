"""Run directories of an earlier version resume with today's code and end with the same numbers.

Each archive in tests/golden/runs holds a run directory as commit f53928b left it after step 2, and
the record that the same command wrote at step 4. The arrays of that step are in the file next to
it. They were compared bit-exactly until the loss computed its gradients in the forward pass, which
sums in another order. The machine code is pinned to SSE 4.2, so that numbers do not depend on the
processor.
"""

import json
import os
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from run_programs import ROOT, devices
from tolerances import assert_close

from rwkv7_jax.checkpoints import import_orbax
from rwkv7_jax.sharding.layout import path_name

pytestmark = pytest.mark.slow

COMMON = {
    "data.path": "task:mapping",
    "data.length": 24,
    "data.batch_size": 2,
    "evaluation.windows": 2,
    "evaluation.length": 24,
    "optimizer.schedule": "constant",
    "log_every": 1,
    "save_every": 2,
    "steps": 4,
}
PRETRAIN = {
    "model.vocab_size": 257,
    "model.num_layers": 2,
    "model.width": 16,
    "model.head_size": 16,
    "model.ffn_width": 16,
    "model.decay_rank": 2,
    "model.icl_rank": 2,
    "model.value_rank": 2,
    "model.gate_rank": 2,
}
UPSCALED_STATE = {
    "init": "assets/toy-small.pth",
    "tuning.decorrelate": "dbp",
    "upscaling.rows": 4,
    "upscaling.size": 16,
}


@pytest.mark.parametrize(
    ("name", "config", "changes", "bar"),
    [
        ("pretrain", "pretrain_toy", PRETRAIN, 1e-5),
        # Of 16-bit activations, from nearly right predictions and turned by DBP.
        ("upscaled_state", "upscaled_state", UPSCALED_STATE, 1e-2),
    ],
)
def test_a_run_of_an_earlier_version_resumes_with_the_same_numbers(
    tmp_path, name, config, changes, bar
):
    with tarfile.open(ROOT / "tests" / "golden" / "runs" / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((tmp_path / "expected_record_of_step_4.json").read_text())
    flags = [f"--config.{key}={value}" for key, value in (COMMON | changes).items()]
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            f"--config=configs/{config}.py",
            f"--workdir={tmp_path}",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{devices(1)['XLA_FLAGS']} --xla_cpu_max_isa=SSE4_2",
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "agg",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    written = json.loads(
        (tmp_path / "checkpoints" / "4" / "record" / "metadata").read_text()
    )
    described = {leaf: found[:2] for leaf, found in written["leaves"].items()}
    assert described == {leaf: known[:2] for leaf, known in expected["leaves"].items()}
    numbers = (
        import_orbax()
        .StandardCheckpointer()
        .restore(tmp_path / "checkpoints" / "4" / "train")
    )
    golden = np.load(ROOT / "tests" / "golden" / "runs" / f"{name}_step_4.npz")
    for path, leaf in jax.tree.leaves_with_path(numbers):
        assert_close(leaf, golden[path_name(path)], bar, path_name(path))
    # What the record did not have yet may stand there now.
    course = {name: written["course"][name] for name in expected["course"]}
    assert course == expected["course"]
