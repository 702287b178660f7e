"""`rwkv7 convert | inspect | doctor`, as a user types them."""

import os
import subprocess
import sys

import pytest
from random_checkpoints import CONFIG, differing, random_params, random_state

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.cli import commands
from rwkv7_jax.cli.commands import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pth"
    save_model(path, random_params(), CONFIG)
    return path


def test_convert_writes_the_other_format_and_names_the_source_format(
    model, tmp_path, capsys
):
    assert main(["convert", str(model), str(tmp_path / "m.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "reading 100%" in printed and "writing 100%" in printed
    assert "3 layers, width 64, 2 heads of 32, vocabulary 75" in printed
    one = load_model(model)[0]
    two = load_model(tmp_path / "m.safetensors")[0]
    assert differing(one, two) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["full"], "`{}/full` holds other files, such as thesis.txt"),
        (["full", "--format", "hf"], "`{}/full` holds other files"),
        (["file.txt", "--format", "transformers"], "`{}/file.txt` is a file"),
        (["folder.pth"], "must name a file for .pth; `{}/folder.pth` is a folder"),
        (["new", "--vocabulary", "nope"], "`--vocabulary` must be world, bytes"),
    ],
)
def test_an_unwritable_target_is_rejected_before_the_source_is_read(
    tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.setattr(commands, "load_model", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file.txt").write_text("a")
    target, *options = words
    assert main(["convert", "m.pth", str(tmp_path / target), *options]) == 2
    assert sentence.format(tmp_path) in capsys.readouterr().err


def test_convert_changes_the_dtype_when_asked(model, tmp_path):
    assert (
        main(["convert", str(model), str(tmp_path / "m.pth"), "--dtype", "float32"])
        == 0
    )
    assert load_model(tmp_path / "m.pth")[0]["emb"]["weight"].dtype == "float32"


def test_inspect_shows_every_tensor_with_its_size_and_dtype(model, capsys):
    assert main(["inspect", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "blocks.2.att.receptance.weight" in printed and "bfloat16" in printed
    assert "group_norm_eps=0.00064" in printed


def test_inspect_shows_a_state_head_by_head(tmp_path, capsys):
    save_state(tmp_path / "s.pth", random_state())
    assert main(["inspect", "--state", str(tmp_path / "s.pth")]) == 0
    assert "layer 2 head 1" in capsys.readouterr().out


def test_doctor_names_versions_devices_and_implementations(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("jaxlib", "orbax", "device", "wkv7 scan", "runs here")
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["convert", "none.pth", "out"], "load_model: `none.pth` does not exist."),
        (["inspect", "none.pth"], "load_model: `none.pth` does not exist."),
        (["inspect", "--state", "none.pth"], "load_state: `none.pth` does not exist."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, sentence, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == f"rwkv7: {sentence}\n"


def test_the_module_returns_its_exit_code_to_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "rwkv7_jax.cli", "inspect", "none.pth"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "rwkv7: load_model: `none.pth` does not exist.\n"


def test_a_closed_pipe_is_quiet(model):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "rwkv7_jax.cli", "inspect", str(model)],
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("rwkv7_jax ")


def test_an_interrupt_is_quiet_and_has_the_shells_exit_code(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rwkv7_jax.cli.commands._doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


def test_a_report_of_a_folder_without_a_run_is_rejected_and_nothing_is_written(
    tmp_path, capsys
):
    assert main(["report", str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_expanded(model, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(model.parent))
    assert main(["inspect", "~/m.pth"]) == 0
    assert main(["convert", "~/m.pth", "~/copy.safetensors"]) == 0
    assert (model.parent / "copy.safetensors").exists()


def test_the_help_lists_the_commands_without_loading_them(capsys):
    lines = (
        "import sys",
        "from rwkv7_jax import cli",
        "sys.argv = ['rwkv7', '--help']",
        "assert cli.main() == 0",
        "loaded = {'jax', 'numpy', 'rwkv7_jax.cli.commands'} & set(sys.modules)",
        "assert not loaded, loaded",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    with pytest.raises(SystemExit):
        main(["--help"])
    assert done.stdout == capsys.readouterr().out


def test_help_into_a_closed_pipe_ends_silently():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rwkv7_jax.cli", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
