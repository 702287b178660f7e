"""`python -m rwkv7_jax.plan`: command line, exit codes and the compiling process."""

import importlib.util
import json
import sys
import time
import types

import pytest
from run_programs import ROOT, program

from rwkv7_jax.plan import child, compiler
from rwkv7_jax.plan.chips import find_target
from rwkv7_jax.plan.compiler import CompilerFailure, NoCompiler, compile_elsewhere
from rwkv7_jax.plan.job import Job, make_job
from rwkv7_jax.plan.table import describe, describe_entry
from rwkv7_jax.runs import waiting
from rwkv7_jax.runs.exit_codes import OutOfMemory, exit_code
from rwkv7_jax.runs.settings import read_settings

TINY = """
def get_config():
    return {
        "mode": "state",
        "model": {"vocab_size": 512, "num_layers": 2, "width": 128, "dtype": "bfloat16"},
        "data": {"batch_size": 2, "length": 64},
    }
"""
PLAN = {
    "topology": "v5e-1",
    "chips": 1,
    "mode": "state",
    "batch": 2,
    "length": 64,
    "limit_gib": 15.75,
    "devices": 1,
    "hosts": 1,
    "device_kind": "TPU v5 lite",
    "estimated_gib": None,
    "argument_gib": 1.0,
    "temporary_gib": 1.0,
    "peak_gib": 2.0,
    "fits": True,
    "buffers": [{"gib": 1.0, "shape": "f32[9]", "count": 2, "what": "argument w"}],
    "collectives": [
        {"kind": "all-gather", "group": 8, "count": 2, "gb": 1.0, "wire_gb": 0.9}
    ],
    "wire_gb": 0.9,
    "expected_wire_gb": 0.8,
    "mesh": {"data": 1, "fsdp": 8},
    "compile_seconds": 3.0,
    "versions": {"jax": "0.10.2"},
}
SIZES = {"vocab_size": 512, "num_layers": 2, "width": 128}
STATE = {"mode": "state", "model": SIZES}


def plan(*words: str):
    """Run the program."""
    return program("-m", "rwkv7_jax.plan", *words)


@pytest.mark.parametrize(
    ("values", "preset", "topology", "sentence"),
    [
        (STATE, None, "v9:2x2", "`--topology` must be a TPU of"),
        (STATE | {"mesh": "fsdp=3x"}, None, "v5e:2x4", "`config.mesh` must be auto"),
        (STATE, "8b", "v5e-1", "`name` must be one of 0.1b"),
        ({"mode": "state"}, None, "v5e-1", "`--preset` must name a published size"),
        (STATE | {"mode": "test"}, None, "v5e-1", "`config.mode` must be pretrain"),
        (STATE | {"stepz": 3}, None, "v5e-1", "nearest is `config.steps`"),
        ({"mode": "state", "init": "no.pth"}, None, "v5e-1", "no.pth"),
    ],
)
def test_invalid_plans_are_rejected_before_compiling(
    values, preset, topology, sentence
):
    with pytest.raises(ValueError) as caught:
        make_job(topology, values, preset)
    assert sentence in str(caught.value)


def test_a_preset_uses_the_dtype_of_published_files():
    job = make_job("v5e-1", {"mode": "state", "model": {"remat": "none"}}, "1.5b")
    assert (job.config.dtype, job.config.remat, job.dtype) == (
        "bfloat16",
        "none",
        "bfloat16",
    )


def test_dtype_auto_is_bfloat16():
    job = make_job("v5e-1", {"mode": "state", "model": {"dtype": "auto"}}, "1.5b")
    assert job.config.dtype == job.settings.model["dtype"] == "bfloat16"


def test_sizes_and_dtype_of_a_checkpoint_are_read_without_weights():
    values = {"mode": "state", "init": str(ROOT / "assets/tiny.pth")}
    job = make_job("v5e-1", values, None)
    assert (job.config.num_layers, job.dtype) == (4, "bfloat16")


def test_a_bad_command_line_has_exit_code_2_and_one_line(tmp_path):
    done = plan("--preset=7.2b")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("plan: `--topology` must name the chips")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here"
)
def test_without_a_compiler_the_exit_code_is_4():
    done = plan("--preset=0.1b", "--topology=v5e-1")
    assert done.returncode == 4 and done.stdout == ""
    assert "libtpu, is not installed" in done.stderr and "rwkv7_jax[tpu]" in done.stderr


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Replace the compiling process by a few lines of Python."""
    monkeypatch.setattr(compiler, "_require_installed", lambda target: None)
    monkeypatch.setattr(compiler, "_WAIT", 0.1)

    def put(text: str) -> None:
        file = tmp_path / "child.py"
        file.write_text(text)
        monkeypatch.setattr(compiler, "_CHILD", (str(file),))

    return put


def test_a_busy_compiler_is_retried(fake, tmp_path):
    fake(
        f"""
import json, pathlib, sys
tried = pathlib.Path({str(tmp_path / "tried")!r})
if not tried.exists():
    tried.write_text("")
    sys.exit("ABORTED: libtpu multi-process lockfile")
print(json.dumps(json.load(sys.stdin) | {{"fits": True}}))
"""
    )
    found = compile_elsewhere(find_target("v5e-1"), {"a": 1}, timeout=60)
    assert found == {"a": 1, "fits": True}


def test_a_compiler_that_stays_busy_raises(fake, monkeypatch):
    fake("import sys\nsys.exit('libtpu multi-process lockfile')\n")
    monkeypatch.setattr(compiler, "_WAIT", 100.0)
    with pytest.raises(NoCompiler, match="held libtpu for 90 seconds"):
        compile_elsewhere(find_target("v5e-1"), {}, timeout=90)


def test_a_hanging_compiler_is_killed_at_the_timeout(fake):
    # As libtpu does, it takes no notice of SIGTERM.
    fake("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)\n")
    began = time.monotonic()
    with pytest.raises(NoCompiler, match="libtpu gave no answer within 2 seconds"):
        compile_elsewhere(find_target("v5e-1"), {}, timeout=2)
    assert time.monotonic() - began < 30


def test_an_internal_error_keeps_its_traceback(fake):
    fake("def step():\n    raise KeyError('no such axis')\n\nstep()\n")
    with pytest.raises(RuntimeError) as caught:
        compile_elsewhere(find_target("v5e-1"), {}, timeout=60)
    said = str(caught.value)
    assert said.startswith("compiling failed: KeyError: 'no such axis'\n")
    assert "in step" in said


def test_words_in_a_users_path_are_not_taken_for_compiler_errors(fake):
    for name in ("out_of_memory", "lockfile"):
        fake(f"open('/nowhere/{name}/model.pth')\n")
        with pytest.raises(RuntimeError) as caught:
            compile_elsewhere(find_target("v5e-1"), {}, timeout=60)
        assert str(caught.value).startswith("compiling failed: FileNotFoundError: ")


REFUSED = """
import jax
raise jax.errors.JaxRuntimeError("INTERNAL: no table\\n" + 500 * "of pages of HLO\\n")
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (REFUSED, "INTERNAL: no table"),
        (
            "import os, sys\nsys.stderr.write('F0 Check failed\\n'); os.abort()",
            "F0 Check",
        ),
    ],
)
def test_a_compiler_error_is_quoted_in_one_sentence(fake, text, reason):
    fake(text)
    with pytest.raises(CompilerFailure) as caught:
        compile_elsewhere(find_target("v5e:8x8"), {}, timeout=60)
    said = str(caught.value)
    assert said.startswith(
        "libtpu failed to compile the step for v5e:8x8, for a reason other"
    )
    assert f"({reason}" in said and said.count("\n") == 0


def test_a_compiler_error_has_exit_code_8_and_one_line(tmp_path, monkeypatch):
    package = tmp_path / "libtpu" / "__init__.py"
    package.parent.mkdir()
    package.write_text("def get_library_path():\n    return '/nowhere/libtpu.so'\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    done = plan("--preset=0.1b", "--topology=v5e-4")
    assert done.returncode == 8 and done.stdout == ""
    assert done.stderr.startswith("plan: libtpu failed") and "/nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_without_a_message_is_named_by_its_type():
    step = types.SimpleNamespace(arguments=())
    assert child._refused(RuntimeError(), step)["reason"] == "RuntimeError"


def test_settings_that_do_not_fit_the_chips_raise_value_error(fake):
    fake("raise ValueError('`config.mesh` must have at most as many devices')\n")
    with pytest.raises(ValueError) as caught:
        compile_elsewhere(find_target("v5e-1"), {}, timeout=60)
    assert str(caught.value) == "`config.mesh` must have at most as many devices"


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("sys.exit('many\\nlines\\nstd::bad_alloc')", "std::bad_alloc"),
        ("raise MemoryError('Unable to allocate 4 TiB')", "Unable to allocate 4 TiB"),
        ("raise MemoryError()", "MemoryError"),
        ("sys.stderr.write('LLVM ERROR: out of memory'); os.abort()", "LLVM ERROR"),
        ("os.kill(os.getpid(), 9)", "killed by the system"),
    ],
)
def test_a_compiler_out_of_memory_blames_the_host(fake, ending, reason):
    fake(f"import os, sys\n{ending}\n")
    with pytest.raises(OutOfMemory) as caught:
        compile_elsewhere(find_target("v5e:2x4"), {}, timeout=60)
    said = str(caught.value)
    assert said.startswith("this machine, not the chip, has too little memory")
    assert said.count("\n") == 0 and reason in said and "batch_size" not in said
    assert exit_code(caught.value) == 7


def test_the_search_doubles_rows_and_returns_the_largest_that_fit(monkeypatch):
    def compile_it(job, *, timeout):
        rows = job.settings.data.batch_size
        return PLAN | {"batch": rows, "peak_gib": rows / 2, "fits": rows < 30}

    monkeypatch.setattr(Job, "compile", compile_it)
    job = make_job("v5e-1", STATE | {"data": {"batch_size": 4}}, None)
    found = job.search(timeout=1)
    assert found["batch"] == 16 and found["fits"]
    assert [one["batch"] for one in found["search"]] == [4, 8, 16, 32]
    text = describe(found)
    assert "search      32 rows: 16.00 GiB, does not fit" in text
    none = make_job("v5e-1", STATE | {"data": {"batch_size": 64}}, None)
    assert not none.search(timeout=1)["fits"]


@pytest.mark.parametrize("method", ["grpo", "expert", "distil"])
def test_the_search_doubles_the_rows_that_a_step_of_test_time_has(monkeypatch, method):
    compiled = []

    def compile_elsewhere(target, request, *, timeout):
        settings = read_settings(request["settings"])
        compiled.append(settings.rows)
        # Without an end, the search would go on for good.
        return {"peak_gib": 1.0, "fits": len(compiled) < 3}

    monkeypatch.setattr("rwkv7_jax.plan.job.compile_elsewhere", compile_elsewhere)
    test_time = {"method": method}
    values = {"mode": "test_time", "model": SIZES, "test_time": test_time}
    if method == "distil":
        values |= {"data": {"batch_size": 24}}
        test_time["guide"] = "traces.jsonl"
    else:
        test_time |= {"prompts": 3, "group": 8}
    found = make_job("v5e-1", values, None).search(timeout=1)
    assert compiled == [24, 48, 96] and found["batch"] == 48


def test_an_invalid_limit_is_rejected_before_compiling(monkeypatch):
    def compile_elsewhere(target, request, *, timeout):
        raise AssertionError("compiled")

    monkeypatch.setattr("rwkv7_jax.plan.job.compile_elsewhere", compile_elsewhere)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    job = make_job("h100", STATE, None)
    with pytest.raises(ValueError, match="`XLA_CLIENT_MEM_FRACTION` must be a number"):
        job.compile(timeout=1)


def test_each_compilation_is_reported_while_it_runs_and_as_soon_as_it_ends(monkeypatch):
    waits = []

    def compile_elsewhere(target, request, *, timeout):
        waits.append(waiting._waits[-1].what)
        return {"peak_gib": 2.0, "fits": len(waits) < 2}

    monkeypatch.setattr("rwkv7_jax.plan.job.compile_elsewhere", compile_elsewhere)
    entries = []
    job = make_job("v5e-1", STATE | {"data": {"batch_size": 4}}, None)
    job.search(timeout=1, on_plan=lambda entry: entries.append(describe_entry(entry)))
    assert waits == [f"the compilation of a step of {rows} rows" for rows in (4, 8)]
    assert entries == ["4 rows: 2.00 GiB, fits", "8 rows: 2.00 GiB, does not fit"]


@pytest.mark.parametrize("failure", [NoCompiler, CompilerFailure, OutOfMemory])
def test_a_search_keeps_its_plans_if_a_later_compilation_fails(monkeypatch, failure):
    def compile_it(job, *, timeout):
        rows = job.settings.data.batch_size
        if rows > 8:
            raise failure("no answer after 1 s")
        return PLAN | {"batch": rows, "peak_gib": rows / 2, "fits": True}

    monkeypatch.setattr(Job, "compile", compile_it)
    found = make_job("v5e-1", STATE | {"data": {"batch_size": 4}}, None).search(
        timeout=1
    )
    assert found["batch"] == 8 and found["fits"]
    assert "search      8 rows: 4.00 GiB, fits" in describe(found)
    assert "search      16 rows: no answer after 1 s" in describe(found)
    first = make_job("v5e-1", STATE | {"data": {"batch_size": 16}}, None)
    with pytest.raises(failure):
        first.search(timeout=1)


def test_the_text_of_a_plan_shows_fit_largest_arrays_and_traffic():
    text = describe(PLAN)
    assert "fits: peak 2.00 of 15.75 GiB" in text
    assert "f32[9]" in text and "argument w" in text
    assert "all-gather" in text and "0.90 GB per step" in text and "jax 0.10.2" in text
    assert "0.80 by the layout" in text and "data 1, fsdp 8" in text
    assert "by the layout" not in describe(PLAN | {"expected_wire_gb": None})


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize(("batch", "code"), [(2, 0), (8192, 3)])
def test_the_tpu_compiler_reports_whether_a_step_fits(tmp_path, batch, code):
    (tmp_path / "tiny.py").write_text(TINY)
    done = plan(
        f"--config={tmp_path / 'tiny.py'}",
        "--topology=v5e-1",
        f"--batch={batch}",
        *(("--length=4096",) if code else ()),
        "--json",
    )
    assert done.returncode == code, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] == (code == 0) and found["chips"] == 1
    assert found["peak_gib"] > (15.75 if code else 0)
    assert sys.version.split()[0] == found["versions"]["python"]
