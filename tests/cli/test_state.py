"""`rwkv7 state info | convert | mix | scale | doctor`, as a user types them."""

import foreign_layouts as layouts
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import lively

from rwkv7_jax.checkpoints import load_state, read_sidecar, save_state
from rwkv7_jax.checkpoints.model_files import model_hash, save_model
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.kernel_features import Features
from rwkv7_jax.model.state import init_state
from rwkv7_jax.tuning.upscaling import empty_memory

# One layer compiles fastest; 257 ids are single bytes.
CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=64, head_size=32, decay_rank=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two states of it, one of another model, and some text."""
    folder = tmp_path_factory.mktemp("states")
    params = lively(CONFIG)
    save_model(folder / "base.pth", params, CONFIG)
    base = model_hash(params, CONFIG)
    for name, seed, info in (
        ("a", 1, {"base_model": base, "alpha": 0.5}),
        ("b", 2, {"base_model": base}),
        ("other", 3, {"base_model": "another"}),
        ("unnamed", 4, {}),
    ):
        save_state(folder / f"{name}.pth", state(seed), info=info)
    save_state(folder / "wide.safetensors", wide(), info={"base_model": base})
    draws = np.random.default_rng(0).integers(97, 123, 600)
    (folder / "text.txt").write_bytes(bytes(draws.tolist()))
    return folder


def state(seed):
    draws = np.random.default_rng(seed).normal(size=init_state(CONFIG).wkv.shape)
    return init_state(CONFIG).replace(wkv=jnp.asarray(draws, jnp.float32))


def wide():
    """An upscaled state with something in its memory."""
    draws = np.random.default_rng(5).normal(size=(1, 1, 2, 24, 32))
    ones = jnp.ones((1, 1, 2, 24))
    features = Features(
        landmarks=jnp.asarray(draws, jnp.float32),
        widths=ones,
        mean=0 * ones,
        map=None,
    )
    upscaled = empty_memory(features)
    return init_state(CONFIG).replace(
        upscaled=upscaled.replace(memory=upscaled.memory + 0.1)
    )


def run(capsys, *words):
    assert main(["state", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_info_shows_sizes_norms_ranks_and_capacity(folder, capsys):
    printed = run(capsys, "info", folder / "a.pth")
    assert "1 layers, 2 heads of 32 x 32, without shift states, float32" in printed
    assert "alpha: 0.5" in printed and "trained numbers: 2,048 (WKV)" in printed
    assert "about 58 to 102 facts of 5 bits (toy tasks, 300 to 1000 steps)" in printed
    norm = np.linalg.norm(state(1).wkv[0, 0, 1])
    row = next(line for line in printed.splitlines() if line.split()[:2] == ["0", "1"])
    assert row.split()[2] == f"{norm:.3g}" and len(row.split()) == 5


def test_info_of_an_upscaled_state_shows_its_memory(folder, capsys):
    printed = run(capsys, "info", folder / "wide.safetensors")
    assert "upscaled memory: static, 24 gaussian features per head" in printed
    assert "upscaled rank" in printed


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ("memory", "1,536 (upscaled; the WKV state's 2,048 are zero)"),
        ("wkv", "2,048 (WKV; the upscaled memory's 1,536 are zero)"),
        ("wkv memory", "3,584 (WKV 2,048 and upscaled 1,536)"),
        ("", "1,536 (upscaled; the WKV state's 2,048 are zero)"),
    ],
)
def test_info_counts_the_trained_parameters_by_parts_that_add_up(
    tmp_path, capsys, parts, line
):
    some = wide()
    if "wkv" in parts:
        some = some.replace(wkv=state(1).wkv)
    if "memory" not in parts:
        some = some.replace(upscaled=empty_memory(some.upscaled.features))
    save_state(tmp_path / "s.safetensors", some)
    printed = run(capsys, "info", tmp_path / "s.safetensors")
    assert f"trained numbers: {line}\n" in printed


@pytest.mark.parametrize("words", [["inspect"], ["convert", "--dtype", "float32"]])
def test_an_upscaled_state_given_as_a_model_is_reported_as_a_state(
    folder, tmp_path, capsys, words
):
    command, *options = words
    target = [str(tmp_path / "m.pth")] if command == "convert" else []
    assert main([command, str(folder / "wide.safetensors"), *target, *options]) == 2
    assert (
        "is a start state, not a model: read it with load_state"
        in capsys.readouterr().err
    )


def test_info_shows_whether_the_model_is_the_one_of_the_state(folder, capsys):
    model = folder / "base.pth"
    assert f"{model} matches" in run(capsys, "info", folder / "a.pth", "--model", model)
    assert "the sizes fit" in run(
        capsys, "info", folder / "unnamed.pth", "--model", model
    )
    assert f"{model} does not match" in run(
        capsys, "info", folder / "other.pth", "--model", model
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "st", "state"])
def test_a_state_and_its_metadata_round_trip_through_convert(
    folder, tmp_path, capsys, suffix
):
    target = tmp_path / f"x.{suffix}"
    printed = run(capsys, "convert", folder / "a.pth", target, "--dtype", "float32")
    assert printed.startswith(f"{target}: 1 layers, 2 heads of 32 x 32")
    run(capsys, "convert", target, tmp_path / "back.pth")
    before = load_state(folder / "a.pth")
    np.testing.assert_array_equal(before.wkv, load_state(target).wkv)
    assert (tmp_path / "back.pth").read_bytes() == (folder / "a.pth").read_bytes()
    assert read_sidecar(tmp_path / "back.pth") == read_sidecar(folder / "a.pth")


@pytest.mark.parametrize(
    ("suffix", "words", "dtype"),
    [
        ("st", [], "float32"),
        ("state", [], "float16"),
        ("st", ["--dtype", "float16"], "float16"),
        ("pth", ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_a_converted_state_has_the_dtype_that_its_readers_need(
    folder, tmp_path, capsys, suffix, words, dtype
):
    target = tmp_path / f"x.{suffix}"
    assert (
        run(capsys, "convert", folder / "a.pth", target, *words).strip().endswith(dtype)
    )
    tensors = read_tensors(target).values()
    assert {str(tensor.dtype) for tensor in tensors} == {dtype}


@pytest.fixture(params=["session.pth", "hf", "merged.pth", "merged.safetensors"])
def foreign(request, folder, tmp_path):
    """The state of `a.pth` as other programs store it: as a session's list, or in a model."""
    path = tmp_path / request.param
    wkv = [np.asarray(heads[0]) for heads in state(1).wkv]
    if path.name == "session.pth":
        torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
        parts = []
        for heads in wkv:
            parts += [torch.zeros(64), torch.tensor(heads), torch.zeros(64)]
        torch.save(parts, path)
        return path
    arrays = layouts.official(lively(CONFIG), CONFIG)
    for layer, heads in enumerate(wkv):
        arrays[f"blocks.{layer}.att.time_state"] = heads
    if path.name == "hf":
        arrays = layouts.of_base_model(arrays, "model.")
        layouts.write_folder(path, arrays, config={"model_type": "rwkv7"}, shards=2)
    elif path.suffix == ".pth":
        write_pth(path, arrays.items())
    else:
        layouts.write_plain_safetensors(path, arrays)
    return path


@pytest.mark.filterwarnings("ignore:.*holds a tuned state as well")
def test_every_command_accepts_every_loadable_state(folder, foreign, tmp_path, capsys):
    printed = run(capsys, "info", foreign)
    assert "1 layers, 2 heads of 32 x 32, without shift states, float32" in printed
    run(capsys, "scale", foreign, "--alpha", "2", tmp_path / "twice.pth")
    words = ["mix", foreign, folder / "a.pth", "--weights", "1,1"]
    run(capsys, *words, tmp_path / "sum.pth")
    for file in ("twice.pth", "sum.pth"):
        np.testing.assert_array_equal(load_state(tmp_path / file).wkv, 2 * state(1).wkv)
    for option in ("--state", "--verify"):
        assert main(["inspect", option, str(foreign)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("order", ["a b -- o", "a b o --", "-- a b o"])
def test_mix_writes_the_weighted_sum_and_its_sources(folder, tmp_path, capsys, order):
    words = {
        "a": [folder / "a.pth"],
        "b": [folder / "b.pth"],
        "o": [tmp_path / "out.pth"],
        "--": ["--weights", "0.25,0.75"],
    }
    line = []
    for part in order.split():
        line += words[part]
    run(capsys, "mix", *line)
    mixed = load_state(tmp_path / "out.pth")
    card = read_sidecar(tmp_path / "out.pth")
    np.testing.assert_allclose(
        mixed.wkv, 0.25 * state(1).wkv + 0.75 * state(2).wkv, rtol=1e-6
    )
    assert card["base_model"] == read_sidecar(folder / "a.pth")["base_model"]
    assert card["made_of"] == "0.25 x a.pth + 0.75 x b.pth"


def test_scale_writes_the_product_and_the_alpha_of_both(folder, tmp_path, capsys):
    run(
        capsys,
        "scale",
        folder / "a.pth",
        "--alpha",
        "0.5",
        tmp_path / "half.safetensors",
    )
    half = load_state(tmp_path / "half.safetensors")
    card = read_sidecar(tmp_path / "half.safetensors")
    np.testing.assert_array_equal(half.wkv, 0.5 * state(1).wkv)
    assert (card["alpha"], card["made_of"]) == (0.25, "0.5 x a.pth")
    assert card["base_model"] == read_sidecar(folder / "a.pth")["base_model"]


def test_an_upscaled_state_is_scaled_and_stays_readable(folder, tmp_path, capsys):
    target = tmp_path / "half.safetensors"
    run(capsys, "scale", folder / "wide.safetensors", "--alpha", "0.5", target)
    np.testing.assert_allclose(load_state(target).upscaled.memory, 0.05, rtol=1e-6)


def doctor(folder, *words, name="a.pth"):
    sizes = ("--length", "24", "--windows", "4")
    return ("doctor", folder / name, "--model", folder / "base.pth", *sizes, *words)


def test_doctor_prints_losses_heads_positions_and_advice(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    picture = tmp_path / "state.png"
    words = (
        "--data",
        folder / "text.txt",
        "--generic",
        "task:mapping",
        "--picture",
        picture,
    )
    printed = run(capsys, *doctor(folder, *words))
    for word in (
        "base nats",
        "tuned nats",
        "KL",
        "task:mapping",
        "typical norm",
        "read rank",
    ):
        assert word in printed
    assert "WKV state, 32 channels per head" in printed and "16-23" in printed
    assert "wkv: below 10 % of the first read" in printed
    assert "\n- " in printed or "No advice." in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("info none.pth", "load_state: `none.pth` does not exist."),
        (
            "mix {a} {other} {out} --weights 1,1",
            "states must be of one base model; `{a}` was",
        ),
        (
            "mix {a} {b} {out} --weights 1,x",
            "`--weights` must be comma-separated numbers",
        ),
        (
            "mix {a} {b} {out} --weights 1",
            "state mix: `--weights` must have one weight for each of 2 states; got 1",
        ),
        (
            "mix {out} --weights 1",
            "state mix: `STATE` and `OUT` must name at least one state",
        ),
        (
            "mix {a} {wide} {out} --weights 1,1",
            "weighted_sum: `states[1]` must have an upscaled memory if",
        ),
        (
            "scale {wide} --alpha 1 {out}",
            "of an upscaled state must end in .safetensors",
        ),
        (
            "scale {a} --alpha nan {out}",
            "state scale: `--alpha` must be finite; got nan.",
        ),
        ("doctor {a} --model {base} --data task:none", "`name` must be one of copy"),
        (
            "doctor {a} --model {base} --data nowhere.txt",
            "`nowhere.txt` must be a file, a folder",
        ),
        (
            "doctor {a} --model {base} --data {text} --windows 0",
            "`--windows` must be at least 1",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder, tmp_path, capsys, words, sentence
):
    files = {name: folder / f"{name}.pth" for name in ("a", "b", "other", "base")}
    files |= {"text": folder / "text.txt", "wide": folder / "wide.safetensors"}
    files["out"] = tmp_path / "out.pth"
    assert main(["state", *words.format(**files).split()]) == 2
    printed = capsys.readouterr().err
    assert sentence.format(**files) in printed and printed.count("\n") == 1
    assert not files["out"].exists()


def test_a_picture_without_matplotlib_is_rejected_before_the_work(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr("rwkv7_jax.reports.plots.available", lambda: False)
    words = doctor(folder, "--data", folder / "text.txt", "--picture", "out.png")
    assert main(["state", *map(str, words)]) == 2
    assert "`--picture` needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["-1,2", "-.5,1.5", "2,-1", "-1e0,2"])
def test_weights_may_be_negative(folder, tmp_path, capsys, weights):
    files = [str(folder / "a.pth"), str(folder / "b.pth")]
    out = str(tmp_path / "out.pth")
    assert main(["state", "mix", *files, "--weights", weights, out]) == 0
    one, two = (float(part) for part in weights.split(","))
    expected = one * load_state(files[0]).wkv + two * load_state(files[1]).wkv
    np.testing.assert_allclose(load_state(out).wkv, expected, rtol=1e-5, atol=1e-6)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "total"), [("1,-1", "0"), ("0.5,0.4", "0.9"), ("1,1", "2")]
)
def test_weights_that_do_not_sum_to_one_are_reported(
    folder, tmp_path, capsys, weights, total
):
    files = [str(folder / "a.pth"), str(folder / "b.pth")]
    assert (
        main(["state", "mix", *files, "--weights", weights, str(tmp_path / "o.pth")])
        == 0
    )
    assert f"the weights sum to {total}, not 1" in capsys.readouterr().out
