"""The kernels' compile checks, tables and tuning, without compiling anything."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, dispatch, tiles
from pallas_kernels.cases import CASES
from pallas_kernels.compile_checks import __main__ as compile_checks
from pallas_kernels.compile_checks import gpu as gpu_checks
from pallas_kernels.compile_checks import tpu as tpu_checks

JAXLIB = {"tpu": ("0.10",), "gpu": ("0.10", "0.12")}
TPU, GPU = (
    [
        json.loads(compile_checks.table_path(name, jaxlib).read_text())["cases"]
        for jaxlib in JAXLIB[name]
    ]
    for name in ("tpu", "gpu")
)


def test_the_tables_hold_every_chip_size_and_kernel():
    kernels = {
        f"{chip} {kernel} {keys}x{values} {dtype}"
        for chip in tpu_checks.CHIPS
        for kernel, (keys, values, dtype) in tpu_checks.cases(chip)
    }
    assert all(set(table) == kernels for table in TPU)
    kernels = {
        f"{device.kind} {by} {name} {keys}x{values} {dtype}"
        for device in gpu_checks.DEVICES
        for by in ("pallas", "triton")
        for name in ("forward", "state", "gradients")
        for keys, values, dtype in gpu_checks.SIZES
        if max(keys, values) <= max(tiles.rows_for(tiles.PALLAS_GPU, device.capability))
    }
    kernels |= {
        name.replace("forward", gpu_checks.TOKEN_KERNEL)
        for name in kernels
        if "pallas forward" in name
    }
    kernels |= {
        f"{device.kind} pallas packed {name} {gpu_checks.SIZES[0]}"
        for device in gpu_checks.DEVICES
        for name in gpu_checks.PACKED_KERNELS
    }
    assert all(set(table) == kernels for table in GPU)


def test_every_case_of_the_tables_has_every_number():
    """`compare` skips a number that the table lacks, so a gap would switch its check off."""
    for row in (row for table in TPU for row in table.values()):
        assert set(row) == {"bundles", "spills", "temporary"}
    numbers = {"instructions", "registers", "stack", "shared", "warpgroup"}
    for case, row in (row for table in GPU for row in table.items()):
        from_triton = {"turned", "carried"} if " triton " in case else set()
        assert set(row) == numbers | from_triton


def test_no_kernel_has_a_form_that_triton_is_known_to_compile_wrongly():
    for case, row in (row for table in GPU for row in table.items()):
        assert not row.get("turned"), case
        assert not row.get("carried"), case
        # The squares of a chunk of 32 are no operands of a warpgroup's product.
        if "gradients" in case:
            assert row["warpgroup"] == 0, case


TTIR = """
  %loop:2 = scf.for %i = %zero to %n step %one iter_args(%s = %s0, %m = %m0) -> (f32) {
    %scaled = arith.mulf %s, %decay : tensor<64x64xf32>
    %u = tt.dot %a, %b, %cst : tensor<32x64xbf16> * tensor<64x64xbf16> -> tensor<32x64xf32>
    %rounded = arith.truncf %u : tensor<32x64xf32> to tensor<32x64xbf16>
    %masked = arith.select %keep, %rounded, %zeros : tensor<32x64xi1>, tensor<32x64xbf16>
    %turned = tt.trans %masked {order} : tensor<32x64xbf16> -> tensor<64x32xbf16>
    %first = tt.dot %turned, %c, %scaled : tensor<64x32xbf16> -> tensor<64x64xf32>
    %loaded = tt.trans %k {order} : tensor<32x64xbf16> -> tensor<64x32xbf16>
    %second = tt.dot %loaded, %c, %first : tensor<64x32xbf16> -> tensor<64x64xf32>
    %small = tt.trans %masked {order} : tensor<32x64xbf16> -> tensor<32x32xbf16>
    %third = tt.dot %small, %c, %cst : tensor<32x32xbf16> -> tensor<32x64xf32>
"""


def test_dangerous_forms_are_counted_in_a_program():
    assert gpu_checks.count_turned(TTIR) == 1
    assert gpu_checks.count_carried(TTIR) == 1
    # A carried state that is added after the products is safe.
    added = TTIR.replace("%c, %scaled", "%c, %cst")
    assert gpu_checks.count_carried(added) == 0


def test_the_check_names_what_grew_and_what_was_added():
    before = {"bundles": 6.29, "spills": 0.0}
    assert compile_checks.compare({"bundles": 6.5, "spills": 0.0}, before) == []
    grown = compile_checks.compare({"bundles": 6.7, "spills": 0.0}, before)
    assert grown == ["bundles grew from 6.29 to 6.7"]
    grown = compile_checks.compare({"bundles": 6.29, "spills": 0.1}, before)
    assert grown == ["spills grew from 0.0 to 0.1"]
    assert compile_checks.compare({"bundles": 6.29}, None) == ["not in the table"]


def fake_check(monkeypatch, tmp_path, rows, cases):
    """Makes the TPU check find `rows` and read `cases` from its table."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"versions": {"jaxlib": "1"}, "cases": cases}))
    monkeypatch.setattr(compile_checks, "table_path", lambda platform, jaxlib: path)
    monkeypatch.setattr(compile_checks, "versions", lambda platform: {"jaxlib": "1"})
    monkeypatch.setitem(
        compile_checks.ROWS, "tpu", lambda: iter([dict(row) for row in rows])
    )
    return path


def test_the_check_fails_for_a_slower_and_for_a_missing_kernel(monkeypatch, tmp_path):
    rows = [{"case": "a", "bundles": 8.0, "seconds": 1.0}]
    path = fake_check(
        monkeypatch, tmp_path, rows, {"a": {"bundles": 7.0}, "b": {"bundles": 1.0}}
    )
    with pytest.raises(SystemExit) as caught:
        compile_checks.main(["tpu"])
    assert str(caught.value) == "a: bundles grew from 7.0 to 8.0\nb: missing"
    compile_checks.main(["tpu", "--write"])
    assert json.loads(path.read_text())["cases"] == {"a": {"bundles": 8.0}}
    compile_checks.main(["tpu"])


def test_the_check_rejects_the_table_of_another_compiler(monkeypatch, tmp_path):
    fake_check(monkeypatch, tmp_path, [], {})
    monkeypatch.setattr(compile_checks, "versions", lambda platform: {"jaxlib": "2"})
    with pytest.raises(SystemExit, match=r"the table is for .*1.*; got .*2"):
        compile_checks.main(["tpu"])


def test_instructions_are_counted_in_the_longest_loop():
    code = """
        /*0000*/ MOV R1, R2 ;
        /*0010*/ FADD R1, R2, R3 ;
        /*0020*/ NOP ;
        /*0030*/ FMUL R1, R2, R3 ;
        /*0040*/ @P0 BRA 0x10 ;
        /*0050*/ BRA 0x50 ;
    """
    assert gpu_checks.count(code, loops=True) == 3
    assert gpu_checks.count(code, loops=False) == 5


def test_an_override_ends_with_its_context():
    usual = tiles.for_gpu(tiles.TRITON, 64, 64, jnp.bfloat16, 90)
    other = usual._replace(chunk=16)
    with tiles.override(other):
        assert tiles.for_gpu(tiles.TRITON, 64, 64, "bfloat16", 90) == other
    assert tiles.for_gpu(tiles.TRITON, 64, 64, "bfloat16", 90) == usual


def test_float32_uses_tf32_products_on_hopper_and_exact_ones_elsewhere():
    def precision(table, size, capability):
        return tiles.for_gpu(table, size, size, "float32", capability).precision

    assert precision(tiles.PALLAS_GPU, 64, 90) == "TF32_TF32_F32_X3"
    for table, size, capability in (
        (tiles.PALLAS_GPU, 128, 90),
        (tiles.PALLAS_GPU, 64, 80),
        (tiles.PALLAS_GPU, 64, 89),
        (tiles.TRITON, 64, 90),
    ):
        assert precision(table, size, capability) == "highest"


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (64, 128), (128, 128)])
def test_every_gpu_from_ampere_to_hopper_has_tiles(capability, sizes):
    for table in (tiles.PALLAS_GPU, tiles.TRITON):
        for dtype in ("float32", "bfloat16"):
            assert tiles.for_gpu(table, *sizes, dtype, capability).chunk in (16, 32)


@pytest.mark.parametrize("capability", [None, 70, 75, 100, 103, 120])
def test_older_newer_and_unknown_gpus_have_no_tiles(capability):
    for table in (tiles.PALLAS_GPU, tiles.TRITON):
        assert tiles.rows_for(table, capability) == {}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", 90),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA H20-3e", 90),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A3000", None),
        ("NVIDIA B200", None),
        ("NVIDIA GeForce RTX 5090", None),
    ],
)
def test_a_device_description_has_the_capability_of_its_kind(kind, expected):
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert tiles.capability() == expected


def test_the_benchmark_counts_bytes_and_lists_the_available_implementations():
    found = bench.least_bytes(CASES["h200"], "bfloat16")
    assert found == {"fwd": 1024, "fwd saving": 1280, "bwd": 2176, "fwd+bwd": 3456}
    assert [name for name in bench.implementations(CASES["tiny"])] == [
        "(best)",
        *dispatch.available(),
        "definition",
    ]


def test_the_benchmark_says_on_stderr_what_it_measures(monkeypatch, capsys):
    def op(*_):
        raise ValueError("traced")

    monkeypatch.setattr(bench, "truth", lambda arguments: (None, None, None))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda repeats: 1.0)
    monkeypatch.setattr(bench, "implementations", lambda case: {"scan": op})
    with pytest.raises(ValueError, match="traced"):
        bench.main(["tiny"])
    out, said = capsys.readouterr()
    assert said == "measuring scan\n"
    assert out.startswith("tiny: ")
