"""Run folders written by an earlier version go on with today's code and end with the same bits.

Each archive in tests/golden/runs holds a run folder as commit f53928b left it after step 2, and the
record that the same command wrote at step 4. The machine code is pinned to SSE 4.2, so that the
bits do not depend on the processor.
"""

import json
import os
import subprocess
import sys
import tarfile

import pytest
from run_programs import ROOT

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
    ("name", "config", "changes"),
    [
        ("pretrain", "pretrain_toy", PRETRAIN),
        ("upscaled_state", "upscaled_state", UPSCALED_STATE),
    ],
)
def test_a_run_written_before_is_resumed_with_the_same_bits(
    tmp_path, name, config, changes
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
            "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "agg",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    written = json.loads(
        (tmp_path / "checkpoints" / "4" / "record" / "metadata").read_text()
    )
    assert written["leaves"] == expected["leaves"]
    assert written["course"] == expected["course"]
