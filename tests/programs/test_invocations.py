"""Command lines of train.py: each gives an exit code and one sentence, and no traceback."""

import sys
import time

import pytest
from absl import flags
from run_programs import ROOT, load_train

from rwkv7_jax.runs import config_flags

CONFIG = f"--config={ROOT / 'configs'}/pretrain_toy.py"
STATE = f"--config={ROOT / 'configs'}/state_tuning.py"
TEST_TIME = f"--config={ROOT / 'configs'}/test_time.py"
HERE = "--workdir=TMP/run"
FILES = {
    "syntax.py": "def get_config(:\n    pass\n",
    "name.py": "\nx = unknown_name\n",
    "exit.py": "import sys\n\n\ndef get_config():\n    sys.exit(3)\n",
    "exit_text.py": "raise SystemExit('no\\nlines')\n",
    "none.py": "def get_config():\n    return None\n",
    "number.py": "def get_config():\n    return 3\n",
    "nothing.py": "",
    "no_function.py": "get_config = 3\n",
    "import.py": "import a_package_that_is_not_there\n",
    "zero.py": "def get_config():\n    return 1 / 0\n",
    "key.py": "def get_config():\n    return {}['x']\n",
    "nul.py": "x = '\0'\n",
    "indent.py": "def get_config():\nreturn 3\n",
    "deep.py": "def get_config():\n    return get_config()\n",
    "memory.py": "def get_config():\n    return {1: 2}\n",
    "no_argument.py": "def get_config():\n    return {}\n",
    "group.py": "def get_config():\n    return {'data': 3}\n",
    "unknown.py": "def get_config():\n    return {'stepz': 3}\n",
    "lines.py": "def get_config():\n    raise ValueError('one\\ntwo')\n",
    "latin.py": "x = '\u00e9'\n",
}
# File, and what the sentence has to say besides `--config` and the file.
BROKEN = [
    ("syntax.py", "line 1: syntax error"),
    ("name.py", "line 2: NameError: name 'unknown_name'"),
    ("exit.py", "line 5: it exits the program: exit(3)"),
    ("exit_text.py", "line 1: it exits the program"),
    ("none.py", "must return a ConfigDict; got NoneType"),
    ("number.py", "must return a ConfigDict; got int"),
    ("nothing.py", "must define `get_config`"),
    ("no_function.py", "must define `get_config`"),
    ("import.py", "line 1: ModuleNotFoundError"),
    ("zero.py", "line 2: ZeroDivisionError"),
    ("key.py", "line 2: KeyError"),
    ("nul.py", "null byte"),
    ("indent.py", "line 2: syntax error"),
    ("deep.py", "RecursionError"),
    ("lines.py", "line 2: one two."),
    ("no_argument.py:large", "takes 0 positional arguments"),
]
NUMBERS = {
    "steps": ["0", "-1", "nan", "1e400", "9" * 30, "x", "1.5", "None", "()", "True"],
    "seed": ["-1", "4294967296", "1.5", "x"],
    "log_every": ["0", "-3"],
    "keep": ["0", "-1"],
    "keep_every": ["-1", "x"],
    "save_every": ["-5", "2147483648"],
    "stop_after_bad": ["-1"],
    "data.batch_size": ["0", "-8", "9" * 12, "8.0"],
    "data.length": ["0", "-1", "inf"],
    "data.held_out": ["-0.1", "1.1", "nan", "inf", "x"],
    "optimizer.learning_rate": ["nan", "inf", "-inf", "-1", "1e300", "x", "1,5"],
    "optimizer.final_learning_rate": ["nan", "-1e-5"],
    "optimizer.warmup_steps": ["-1", "1.5"],
    "optimizer.weight_decay": ["nan", "-0.1"],
    "optimizer.clip": ["0", "-1", "nan", "inf", "x"],
    "optimizer.b1": ["1", "-0.1", "nan", "2"],
    "optimizer.b2": ["1.0", "nan"],
    "optimizer.eps": ["-1e-8", "nan", "inf"],
    "optimizer.l2wrap": ["nan", "-1"],
    "optimizer.accumulate": ["0", "-1"],
    "tuning.alpha": ["nan", "inf", "-1"],
    "tuning.anchor": ["nan", "-1"],
    "tuning.warn_above": ["nan", "-1"],
    "upscaling.size": ["-1", "x"],
    "upscaling.widths": ["(0,)", "(nan,)", "(-1,)", "('a',)"],
    "upscaling.rows": ["0"],
    "decorrelation.rate": ["nan", "-1"],
    "decorrelation.balance": ["1.5", "-0.5"],
    "decorrelation.average": ["1", "nan"],
    "observer.variance": ["nan", "-1"],
    "observer.most": ["-1"],
    "test_time.prompts": ["0", "-1"],
    "test_time.temperature": ["nan", "-1"],
    "test_time.vote_margin": ["2", "nan"],
    "evaluation.windows": ["0", "-1"],
    "evaluation.length": ["0"],
    "evaluation.patience": ["-1", "nan"],
    "evaluation.every": ["-1"],
    "evaluation.prompt_tokens": ["(-2,)", "(0,)", "(1.5,)", "x"],
    "sample.top_p": ["1.5", "-0.1", "nan"],
    "sample.tokens": ["-1"],
    "model.width": ["0", "-64", "x", "64.0"],
    "model.head_size": ["0"],
    "model.ffn_width": ["-1"],
    "model.norm_eps": ["nan", "0"],
    "observer.model.width": ["0"],
}
NAMES = {
    "mode": "magic",
    "data.packing": "both",
    "data.order": "random",
    "data.on_bad": "maybe",
    "optimizer.kind": "sgd",
    "optimizer.schedule": "step",
    "optimizer.decorrelate": "yes",
    "tuning.leaves": "emb",
    "tuning.decorrelate": "pca",
    "upscaling.dynamics": "none",
    "upscaling.kind": "rbf",
    "upscaling.landmarks": "grid",
    "upscaling.prepare": "pca",
    "test_time.method": "ppo",
    "test_time.keep": "some",
    "allow_nan": "perhaps",
    "profile_steps": "3",
    "mesh": "fsdp=0",
    "data": "3",
    "optimizer": "x",
}
PLACES = [
    "init",
    "data.path",
    "data.evaluation",
    "tuning.anchor_path",
    "test_time.guide",
    "test_time.context",
    "evaluation.retention",
    "state",
    "workdir",
]
REMOTE = ["gs://bucket/x", "s3://b/x", "http://host/x", "https://h/x", "hf://a/b"]


OTHERS = [
    ([HERE], ["`--config` must name a file"]),
    ([], ["`--workdir`"]),
    ([CONFIG], ["`--workdir` must name"]),
    ([CONFIG, "--workdir="], ["`--workdir` must name"]),
    ([CONFIG, "--workdir"], ["`--workdir` must have a value"]),
    (["--workdir", CONFIG], ["`--workdir` must have a value"]),
    ([HERE, "--config"], ["`--config` must have a value"]),
    (["--config", HERE], ["`--config` must have a value"]),
    (["--config=", HERE], ["`--config` must name"]),
    (["--config=TMP", HERE], ["`--config` must name a file"]),
    (["--config=TMP/missing.py", HERE], ["`--config` must name a file"]),
    ([HERE, "--config.steps=3"], ["`--config` must name a file"]),
    ([CONFIG, "--config.data.path", HERE], ["must have a value", "next word"]),
    ([CONFIG, HERE, "--config.steps"], ["must have a value", "last word"]),
    ([CONFIG, HERE, "--config.optimizer.clip", "--config.steps=3"], ["must have a"]),
    ([CONFIG, HERE, "stray"], ["unknown argument 'stray'"]),
    ([CONFIG, HERE, "--unknown=3"], ["unknown"]),
    ([CONFIG, "--workdri=x"], ["workdri"]),
    ([CONFIG, HERE, "--processes=x"], ["processes"]),
    ([CONFIG, HERE, "--processes=2"], ["`--coordinator`"]),
    ([CONFIG, HERE, "--stopped_code=7"], ["`--stopped_code` must be 0 or", "got 7"]),
    ([CONFIG, HERE, "--config.stepz=3"], ["nearest is `config.steps`"]),
    ([CONFIG, HERE, "--config.data.pth=x"], ["nearest is `config.data.path`"]),
    ([CONFIG, HERE, "--config.model.widht=8"], ["nearest is `config.model.width`"]),
    ([CONFIG, HERE, "--config.steps.x=3"], ["`steps` is a setting"]),
    ([CONFIG, HERE, "--config.sample.tokens=3", "--config.sample=5"], ["a group"]),
    (
        [CONFIG, HERE, "--config.sample=5", "--config.sample.tokens=3"],
        ["is a setting, not a group"],
    ),
    ([CONFIG, HERE, "--config.optimizer.accumulate=3"], ["must be a multiple"]),
    ([f"{CONFIG}:huge", HERE], ["the size must be one of", "pretrain_toy.py, line"]),
    (["--config=TMP/group.py", HERE], ["`config.data` must be a group"]),
    (["--config=TMP/unknown.py", HERE], ["nearest is `config.steps`"]),
    (["--config=TMP/memory.py", HERE], ["`config.1` is not a setting"]),
    ([STATE, HERE], ["`config.init` must name"]),
    ([STATE, HERE, "--config.init=TMP/no.pth"], ["no.pth"]),
    ([STATE, HERE, "--config.init=TMP"], ["TMP"]),
    ([STATE, HERE, "--config.init=TMP/name.py"], ["name.py"]),
    ([TEST_TIME, HERE], ["`config.init` must name"]),
    ([CONFIG, HERE, "--config.trackers=nobody"], ["`config.trackers` must", "nobody"]),
    ([CONFIG, HERE, "--config.trackers=wandb,tensorboard"], ["`config.trackers` must"]),
    ([CONFIG, HERE, "--config.bos=(1, 4)"], ["`config.bos` must be left out"]),
    ([CONFIG, HERE, "--config.tasks=gsm8k"], ["`config.tasks` must be left out"]),
    ([CONFIG, HERE, "--config.model.head_size=48"], ["`head_size`"]),
]


def refusals():
    """Returns the words of each rejected command line, and what its message must contain."""
    for file, sentence in BROKEN:
        yield (
            [f"--config=TMP/{file}", HERE],
            ["`--config`", file.split(":")[0], sentence],
        )
    for name, values in NUMBERS.items():
        for value in values:
            yield [CONFIG, HERE, f"--config.{name}={value}"], [f"`config.{name}` must"]
    for name, value in NAMES.items():
        yield [CONFIG, HERE, f"--config.{name}={value}"], [f"`config.{name}` must"]
    for name in PLACES:
        for place in REMOTE:
            words = [CONFIG, HERE, f"--config.{name}={place}"]
            yield words, [f"`config.{name}` must", "on this machine", place]
    for place in REMOTE:
        yield [CONFIG, f"--workdir={place}"], ["`--workdir` must", place]
        yield [f"--config={place}", HERE], ["`--config` must", place]
    yield from OTHERS


# What the config of a pre-training run needs to tune a state.
TUNED = ["--config.mode=state", "--config.optimizer={}"]
ACCEPTED = [
    [],
    ["--config.optimizer.clip=None"],
    ["--config.optimizer.clip=0.5"],
    ["--config.optimizer.clip", "2"],
    ["--config.steps", "7"],
    ["--config.sample.prompts=('one', 'two')"],
    ["--config.sample.prompts=()"],
    ["--config.sample.prompts=one"],
    ["--config.allow_nan"],
    ["--config.allow_nan=true"],
    ["--noconfig.allow_nan"],
    [*TUNED, "--config.tuning.rates=(0.1, 1)"],
    [*TUNED, "--config.tuning.rates=(0.1,)"],
    [*TUNED, "--config.tuning.rates=0.1"],
    ["--config.evaluation.enough", "-3.5"],
    ["--config.model.remat=block", "--config.model.implementation=None"],
    ["--config.model={'vocab_size': 257, 'num_layers': 1, 'width': 64}"],
    ["--config.save_every=0", "--config.evaluation.every=0"],
    ["--config.init=", "--config.data.evaluation="],
]

REFUSED = list(refusals())


@pytest.fixture
def invoke(tmp_path, monkeypatch, capfd):
    """Runs train.py's `main` in this process, up to the end of its setup."""
    program = load_train()
    inside = program["main"].__globals__
    for name, text in FILES.items():
        encoding = "latin-1" if name == "latin.py" else "utf-8"
        (tmp_path / name).write_text(text, encoding=encoding)
    for name in ("stdin", "stdout", "stderr", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(flags, "FLAGS", flags.FLAGS)

    def invoke(words, *, accepted=False):
        taken = []

        def train(folder, stop):
            taken.append(folder.settings)
            if not accepted:
                inside["set_up"](folder)

        monkeypatch.setitem(inside, "train", train)
        flags.FLAGS.unparse_flags()
        for name in ("workdir", "coordinator", "processes", "process", "stopped_code"):
            flags.FLAGS[name].unparse()
        words = [word.replace("TMP", str(tmp_path)) for word in words]
        code = 0
        try:
            rest = config_flags._parse("train.py", ["train.py", *words])
            program["main"](rest)
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().err, taken

    return invoke


def test_there_are_many_rows():
    print(f"{len(REFUSED)} refused, {len(ACCEPTED)} accepted")
    assert len(REFUSED) + len(ACCEPTED) >= 150


@pytest.mark.parametrize(("words", "parts"), REFUSED)
def test_a_wrong_command_line_ends_in_one_sentence(invoke, tmp_path, words, parts):
    began = time.monotonic()
    code, said, _ = invoke(words)
    assert code == 2, said
    assert "Traceback" not in said
    assert said.startswith("train.py: ") and said.count("\n") == 1, said
    for part in parts:
        assert part.replace("TMP", str(tmp_path)).lower() in said.lower(), said
    assert not list(ROOT.glob("*:")), "a folder was made of an address"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("words", ACCEPTED)
def test_a_valid_command_line_reaches_the_training(invoke, words):
    code, said, taken = invoke([CONFIG, HERE, *words], accepted=True)
    assert (code, said) == (0, "")
    assert len(taken) == 1


def test_a_home_folder_is_expanded_wherever_a_path_is_typed(
    invoke, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "good.py").write_text("def get_config():\n    return {}\n")
    words = ["--config=~/good.py", "--workdir=~/run", "--config.init=~/m.pth"]
    words += ["--config.data.path=~/a.txt,~/b.txt", "--config.data.evaluation=~/c.txt"]
    code, said, (settings,) = invoke(words, accepted=True)
    assert (code, said) == (0, "")
    assert (tmp_path / "run" / "settings.json").exists()
    assert settings.init == f"{tmp_path}/m.pth"
    assert settings.data.path == f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    assert settings.data.evaluation == f"{tmp_path}/c.txt"


@pytest.mark.parametrize("word", ["--help", "-h", "-help"])
def test_help_lists_the_flags_and_every_setting(invoke, capfd, word):
    with pytest.raises(SystemExit) as ended:
        config_flags._parse("train.py", ["train.py", "--junk", word])
    assert ended.value.code == 0
    said = capfd.readouterr().out
    assert "--config=FILE" in said
    for part in ("config.optimizer.clip=1.0", "config.data.path=''", "config.steps"):
        assert part in said
