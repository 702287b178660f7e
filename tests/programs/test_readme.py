"""The code blocks of README and guide run as written; the gate runs the quickstart."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from run_programs import ROOT

PAGES = ("README.md", "docs/guide.md")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language, without the quickstart."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(page: str) -> list[str]:
    """The commands of a page, without those that install."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if not line.startswith("pip ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a fresh clone, where the blocks may write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "assets",
        "configs",
        "pallas_kernels",
        "rwkv7_jax",
        "train.py",
        "eval.py",
    ):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    # The data of the task that the guide's command answers, in GSM8K's format.
    for name in ("train", "test"):
        lines = []
        for number in range(2, 6):
            answer = f"{number} + {number} = {2 * number}\n#### {2 * number}"
            question = {"question": f"Twice {number}?", "answer": answer}
            lines.append(json.dumps(question) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def run(clone, *words: str) -> str:
    """The output of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        words,
        # What is said in a chat.
        input="Hello.\n",
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_a_quickstart_and_each_job_has_a_block():
    assert (ROOT / "README.md").read_text().count("```bash quickstart\n") == 1
    assert len(blocks("README.md", "python")) == 1
    assert len(blocks("docs/guide.md", "python")) >= 4
    assert len(commands("docs/guide.md")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_run_one_after_the_other(clone, page):
    (clone / "runs" / "charmaps.pth").unlink(missing_ok=True)
    assert run(clone, sys.executable, "-c", "\n".join(blocks(page, "python"))).strip()
    assert (clone / "runs" / "charmaps.pth").stat().st_size > 0


@pytest.mark.slow
def test_the_recipes_run_one_after_the_other(clone):
    recipes = "\n".join(blocks("docs/extending.md", "python"))
    assert run(clone, sys.executable, "-c", recipes).strip()


@pytest.mark.slow
def test_the_commands_of_the_guide_run_one_after_the_other(clone):
    for command in commands("docs/guide.md"):
        if "--config.tasks" in command and not importlib.util.find_spec("lm_eval"):
            continue
        words = shlex.split(command)
        assert words[0] in ("python", "rwkv7"), command
        start = (
            [sys.executable, "-m", "rwkv7_jax.cli"]
            if words[0] == "rwkv7"
            else [sys.executable]
        )
        assert run(clone, *start, *words[1:]), command
