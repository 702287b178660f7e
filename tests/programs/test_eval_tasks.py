"""eval.py on a task of lm-evaluation-harness, as a program of its own."""

import json

import jax
import pytest
from local_questions import write_questions
from run_programs import ROOT, program

from rwkv7_jax.checkpoints.model_files import load_model, model_hash
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.model.state import init_state

pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv7_jax[harness]")


# The harness reads the descriptions of all its tasks.
@pytest.mark.slow
def test_base_and_state_answer_local_questions_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_questions(tmp_path / "train.jsonl", 10, 3)
    write_questions(tmp_path / "test.jsonl", 20, 3)
    params, config = load_model(ROOT / "assets" / "tiny.pth")
    state = init_state(config)
    noise = jax.random.normal(jax.random.key(0), state.wkv.shape)
    info = {"base_model": model_hash(params, config)}
    save_state(tmp_path / "a.pth", state.replace(wkv=0.5 * noise), info=info)
    words = [
        "--config=configs/eval.py",
        "--config.init=assets/tiny.pth",
        f"--config.state={tmp_path / 'a.pth'}",
        "--config.tasks=gsm8k",
        f"--config.task_data.gsm8k={tmp_path / 'train.jsonl'},{tmp_path / 'test.jsonl'}",
        "--config.shots=1",
        "--config.limit=2",
        f"--config.workdir={tmp_path / 'out'}",
    ]
    ended = program("eval.py", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "between a state and a context: nothing" in ended.stdout
    assert "gsm8k (2)" in ended.stdout
    report = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert (report["shots"], report["limit"], report["bos"]) == (1, 2, [])
    base, tuned = report["tasks"]["gsm8k"].values()
    bits = tuned["bits_per_byte"]
    assert bits["difference"] == pytest.approx(
        bits["value"] - base["bits_per_byte"]["value"], abs=1e-9
    )
    assert bits["difference_error"] > 0
    assert bits["questions"] == 2
