"""Command lines of eval.py: each gives an exit code and one sentence, and measures nothing."""

import os
import sys

import jax.numpy as jnp
import pytest
from absl import flags
from random_checkpoints import random_params, random_state
from run_programs import ROOT, load_program

from rwkv7_jax.checkpoints.model_files import model_hash, save_model
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs import comparison, config_flags, held_out_rows

SIZES = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)
OTHER = RWKV7Config(vocab_size=257, num_layers=2, width=32, head_size=16)
CONFIG = f"--config={ROOT / 'configs'}/eval.py"
INIT = "--config.init=m.pth"
DATA = "--config.data.path=t.txt"
LENGTH = "--config.evaluation.length=32"
GOOD = [CONFIG, INIT, DATA, LENGTH]
REMOTE = ["gs://b/x", "s3:b/x", "https://h/x", "hf:a/b", "huggingface.co/a/b"]

FILES = {
    "syntax.py": "def get_config(:\n    pass\n",
    "none.py": "def get_config():\n    return None\n",
    "exit.py": "import sys\n\n\ndef get_config():\n    sys.exit(3)\n",
    "typo.py": "def get_config():\n    return {'evaluaton': 3}\n",
    "t.txt": "The sea is deep. " * 60,
    "short.txt": "sea",
    "x.jsonl": '{"text": "one"}\n' * 60,
    "qa.jsonl": '{"prompt": "1+1=", "answer": "2"}\n',
    "questions.json": '{"prompt": "1+1=", "answer": "2"}\n',
    "bad.jsonl": '{"txt": "one"}\n',
    "t.csv": "a,b\n1,2\n",
    "empty.txt": "",
    "lfs.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "lfs.pth": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "page.pth": "<!DOCTYPE html><html></html>",
    "empty.pth": "",
}

# What is added to a good command line, and what the sentence must have.
ADDED = [
    (["stray"], "unknown argument 'stray'"),
    (["--unknown=3"], "unknown"),
    (["--config.stat=a.pth"], "nearest is `config.state`"),
    (["--config.evaluation.retenton=t.txt"], "`config.evaluation.retention`"),
    (["--config.data.path"], "`--config.data.path` must have a value"),
    (["--config.state", "--config.seed=3"], "must have a value"),
    # Models
    (
        ["--config.questions=./questions.json", "--config.workdir=."],
        "`config.questions` must not be `questions.json`, which the result would replace",
    ),
    (
        ["--config.evaluation.retention=t.txt,eval.json", "--config.workdir=folder/.."],
        "`config.evaluation.retention` must not be `eval.json`",
    ),
    (["--config.init=none.pth"], "`none.pth` does not exist"),
    (["--config.init="], "`config.init` must name a checkpoint"),
    (["--config.data.path=short.txt"], "`short.txt` has no document"),
    (["--config.data.path=./t.txt,t.txt"], "must name each file once"),
    (["--config.state=./a.pth, a.pth"], "must name each file once"),
    (["--config.state=a.pth,b.pth,a.pth"], "must name each file once"),
    (["--config.init=o/m"], "hf download o/m"),
    (["--config.init=t.txt"], "t.txt"),
    (["--config.init=lfs.pth"], "Git LFS pointer"),
    (["--config.init=page.pth"], "web page"),
    (["--config.init=empty.pth"], "empty"),
    (["--config.init=cut.pth"], "cut.pth"),
    (["--config.init=a.pth"], "is a start state"),
    (["--config.init=folder"], "folder"),
    (["--config.init=nan.pth"], "NaN"),
    # States
    (["--config.state=none.pth"], "`none.pth` does not exist"),
    (["--config.state=o/s"], "hf download o/s"),
    (["--config.state=a.pth,"], "entry 2"),
    (["--config.state=,a.pth"], "entry 1"),
    (["--config.state=a.pth,,b.pth"], "entry 2"),
    (["--config.state=a.pth,folder/../a.pth"], "are the same file"),
    (["--config.state=link.pth,a.pth"], "are the same file"),
    (["--config.state=large.pth"], "large.pth"),
    (["--config.state=m.pth"], "m.pth"),
    (["--config.state=t.txt"], "t.txt"),
    (["--config.state=lfs.pth"], "Git LFS pointer"),
    (["--config.state=empty.pth"], "empty"),
    (["--config.state=changed.pth"], "changed.pth.json"),
    (["--config.state=3"], "3"),
    # Data
    (["--config.data.path="], "`config.data.path`"),
    (["--config.data.path=none.txt"], "`none.txt` must be a file"),
    (["--config.data.path=o/d"], "--repo-type dataset o/d"),
    (["--config.data.path=t.txt,"], "entry 2"),
    (["--config.data.path=t.txt,folder/../t.txt"], "must name each file once"),
    (["--config.data.path=t.csv"], 'its keys are "a", "b"'),
    (["--config.data.path=empty.txt"], "is an empty file"),
    (["--config.data.path=lfs.txt"], "Git LFS pointer"),
    (["--config.data.path=bad.jsonl"], "bad.jsonl:1"),
    (["--config.data.path=task:fly"], "fly"),
    (["--config.data.path=c.bin"], "c.bin` does not exist"),
    (["--config.data.evaluation=none.txt"], "`none.txt` must be a file"),
    (["--config.data.evaluation=t.txt,folder/../t.txt"], "must name each file once"),
    (["--config.data.encoding=klingon"], "text encoding"),
    (["--config.data.held_out=2"], "`config.data.held_out` must be at most 1"),
    # Retention and prompts
    (["--config.evaluation.retention=none.txt"], "`none.txt` must be a file"),
    (["--config.evaluation.retention=t.txt,"], "entry 2"),
    (
        ["--config.evaluation.retention=t.txt,folder/../t.txt"],
        "must name each file once",
    ),
    (["--config.evaluation.retention=task:fly"], "fly"),
    (["--config.evaluation.prompt_tokens=(0,)"], "at least 1, or -1"),
    (["--config.evaluation.prompt_tokens=(-2,)"], "prompt_tokens` must"),
    (["--config.evaluation.prompt_tokens=x"], "prompt_tokens` must"),
    (["--config.evaluation.windows=0"], "`config.evaluation.windows` must"),
    (["--config.evaluation.windows=nan"], "`config.evaluation.windows` must"),
    (["--config.evaluation.length=0"], "`config.evaluation.length` must"),
    (["--config.evaluation.length=5000"], "config.evaluation.length"),
    (["--config.seed=-1"], "`config.seed` must"),
    (["--config.seed=x"], "`config.seed` must"),
    # Tasks of the harness
    (["--config.tasks=gsm8k,"], "`config.tasks` must have a name between commas"),
    (["--config.task_data.gsm8k=t.txt"], "must belong to a task in `config.tasks`"),
    (["--config.task_data.gsm8k="], "`config.task_data.gsm8k` must be train.jsonl"),
    (["--config.task_data.gsm8k=t.txt,"], "entry 2"),
    (["--config.task_data=t.txt"], "`config.task_data` must be"),
    (["--config.shots=-2"], "`config.shots` must be at least 0"),
    (["--config.limit=-1"], "`config.limit` must be at least 0"),
    (["--config.limit=x"], "`config.limit` must be"),
    (["--config.bos=-1"], "`config.bos` must be at least 0"),
    (["--config.bos=x"], "`config.bos` must be"),
    # Questions of files
    (["--config.questions=none.jsonl"], "none.jsonl"),
    (["--config.questions=bad.jsonl"], "bad.jsonl:1: "),
    (["--config.questions=qa.jsonl,"], "entry 2"),
    (["--config.test_time.verifier=letter"], "must be left out in mode"),
    (
        ["--config.questions=qa.jsonl", "--config.test_time.verifier=lettr"],
        "`config.test_time.verifier` must be one of",
    ),
    (
        ["--config.questions=qa.jsonl", "--config.data.path=qa.jsonl"],
        "`config.questions` must hold a question that no state was tuned on",
    ),
    # Places
    (["--config.workdir=t.txt"], "in a folder; `t.txt` is a file"),
    (["--config.workdir=t.txt/run"], "in a folder; `t.txt` is a file"),
]

OTHERS = [
    ([], "`--config` must name a file"),
    (["--config"], "`--config` must have a value"),
    (["--config="], "`--config` must name"),
    (["--config=missing.py"], "`--config` must name a file"),
    (["--config=hf:a/b"], "`--config` must be on this machine"),
    (["--config=syntax.py"], "line 1: syntax error"),
    (["--config=none.py", INIT, DATA], "must return a ConfigDict"),
    (["--config=exit.py"], "it exits the program: exit(3)"),
    (["--config=typo.py"], "nearest is `config.evaluation`"),
    ([INIT, DATA], "`--config` must name a file"),
]


def refusals():
    """Returns the words of each command line, and what its message must contain."""
    for words, sentence in ADDED:
        yield [*GOOD, *words], sentence
    for name in (
        "init",
        "state",
        "questions",
        "data.path",
        "data.evaluation",
        "workdir",
    ):
        for place in REMOTE:
            yield [*GOOD, f"--config.{name}={place}"], "on this machine"
    for place in REMOTE:
        yield [*GOOD, f"--config.evaluation.retention={place}"], "on this machine"
        yield [*GOOD, f"--config.task_data.gsm8k={place}"], "on this machine"
    yield from OTHERS


REFUSED = list(refusals())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, states, texts, and files whose content does not match their names."""
    folder = tmp_path_factory.mktemp("eval")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    params = random_params(SIZES, dtype=jnp.float32, scale=0.3)
    save_model(folder / "m.pth", params, SIZES)
    (folder / "cut.pth").write_bytes((folder / "m.pth").read_bytes()[:2000])
    broken = {**params, "head": {"weight": params["head"]["weight"] + jnp.nan}}
    save_model(folder / "nan.pth", broken, SIZES, allow_nan=True)
    info = {"base_model": model_hash(params, SIZES)}
    for seed, name in enumerate(("a.pth", "b.pth", "changed.pth")):
        save_state(folder / name, random_state(SIZES, seed=seed), info=info)
    save_state(folder / "large.pth", random_state(OTHER))
    sidecar = folder / "changed.pth.json"
    sidecar.write_text((folder / "a.pth.json").read_text())
    (folder / "link.pth").symlink_to("a.pth")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def invoke(files, monkeypatch, capfd):
    """Runs eval.py's `main` in this process; nothing may be measured."""
    program = load_program("eval.py")
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        raise ValueError("measured")

    for name in ("score", "score_answers"):
        monkeypatch.setattr(held_out_rows, name, measure)
    monkeypatch.setattr(comparison, "prefill_state", measure)
    for name in ("stdin", "stdout", "stderr", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(flags, "FLAGS", flags.FLAGS)
    monkeypatch.chdir(files)

    def invoke(words):
        flags.FLAGS.unparse_flags()
        code = 0
        try:
            rest = config_flags._parse("eval.py", ["eval.py", *words])
            program["main"](rest)
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr(), measured

    return invoke


def test_there_are_enough_cases_and_no_duplicates():
    assert len({tuple(words) for words, _ in REFUSED}) == len(REFUSED) >= 90


def test_a_valid_command_line_reaches_the_measurement(invoke):
    code, _, said, measured = invoke([*GOOD, "--config.state=a.pth,b.pth"])
    assert (code, said) == (2, "eval.py: measured\n")
    assert len(measured) == 1


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_a_wrong_command_line_ends_in_one_sentence(invoke, files, words, sentence):
    before = sorted(os.listdir(files))
    code, shown, said, measured = invoke(words)
    assert code == 2, said
    assert measured == []
    assert shown == ""
    assert said.startswith("eval.py: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert sentence in said
    assert sorted(os.listdir(files)) == before


def test_tasks_without_their_package_end_in_one_sentence(invoke, monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("harness", "harness_tasks"):
        module = f"rwkv7_jax.evaluation.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
    code, _, said, measured = invoke([*GOOD, "--config.tasks=gsm8k"])
    assert (code, measured) == (2, [])
    assert said.count("\n") == 1
    assert "pip install 'rwkv7_jax[harness]'" in said
