"""Analysis of compiled programs: bytes, loops, and the pitfalls of counting collectives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rwkv7_jax.plan import hlo
from rwkv7_jax.plan.buffers import largest_arrays
from rwkv7_jax.plan.collectives import find_collectives, wire_bytes

# A program that a TPU's compiler might make; each of its instructions is one of the traps.
LOOP = Path(__file__).with_name("loop.hlo").read_text()


def found() -> dict:
    collectives = find_collectives(hlo.parse(LOOP), devices=8)
    return {(one.kind, one.group): one for one in collectives}


def test_loops_multiply_collectives_and_chains_count_once():
    gathers = found()["all-gather", 8]
    # 24 turns of two gathers of 16 KiB and, in a chain of the same number, one of 8 KiB; and the
    # one that runs in the background.
    assert (gathers.count, gathers.bytes) == (73, 24 * 5 * 8192 + 128)
    assert gathers.wire_bytes == gathers.bytes * 7 / 8


def test_replica_groups_are_parsed_in_all_three_formats():
    all_found = found()
    assert set(all_found) == {
        ("all-gather", 8),
        ("all-reduce", 4),
        ("reduce-scatter", 4),
        ("reduce-scatter", 2),
        ("collective-permute", 8),
    }
    assert all_found["all-reduce", 4].bytes == 8 + 8
    assert all_found["all-reduce", 4].wire_bytes == 2 * 16 * 3 / 4
    assert all_found["reduce-scatter", 4].wire_bytes == 64 * 3
    assert all_found["collective-permute", 8].wire_bytes == 32


def test_a_fused_tpu_reduce_scatter_is_not_an_all_reduce():
    scattered = found()["reduce-scatter", 2]
    assert scattered.bytes == 32 * 256 * 2 // 2
    assert scattered.wire_bytes == scattered.bytes


def test_one_device_sends_nothing():
    assert wire_bytes("all-reduce", 1, 100) == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("bf16[3]", 6),
        ("pred[8]", 8),
        ("s4[8]", 4),
        ("f8e4m3fn[8]", 8),
        ("(f32[2], (s32[], bf16[4]{0:T(8)S(1)}))", 20),
        ("token[]", 0),
        # A dynamic size counts with its upper bound.
        ("f32[<=8,4]", 128),
        ("u4[7,2]", 7),
        ("c64[2]", 16),
        ("f4e2m1fn[8]", 4),
    ],
)
def test_the_bytes_of_a_tuple_shape_are_summed(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_the_largest_arrays_are_new_buffers_in_main_memory():
    rows = {row["shape"]: row for row in largest_arrays(hlo.parse(LOOP))}
    # Not the copy in fast memory, not what is written in place.
    assert next(iter(rows)) == "f32[1024,1024]"
    assert rows["f32[1024,1024]"]["what"] == "jvp(f)/mul"
    assert (rows["f32[1024,1024]"]["count"], rows["bf16[32,256]"]["count"]) == (1, 3)
    assert "f32[4096,1024]" not in rows and "f32[2048,1024]" not in rows
    assert rows["f32[2,512]"]["what"] == "argument train.params['w']"


ASYNC = """HloModule jit_step

%wrapped (a: f32[16]) -> f32[128] {
  %a = f32[16]{0} parameter(0)
  ROOT %g = f32[128]{0} all-gather(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}

%outlined (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  ROOT %g.1 = f32[64]{0} all-gather(%a), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}

%one (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%a), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%sum
}

%other (a: f32[16]) -> f32[16] {
  ROOT %a = f32[16]{0} parameter(0)
}

ENTRY %main (x: f32[16], p: pred[]) -> f32[128] {
  %x = f32[16]{0} parameter(0)
  %p = pred[] parameter(1)
  %s = ((f32[16]{0}), f32[128]{0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[16]{0}), f32[128]{0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[128]{0} async-done(%u), calls=%wrapped
  %s.1 = ((f32[16]{0}), f32[64]{0}) call-start(%x), to_apply=%outlined
  %d.1 = f32[64]{0} call-done(%s.1)
  %s.2 = (f32[16]{0}, f32[256]{0}) all-gather-start(%x), channel_id=4, replica_groups=[1,8]<=[8]
  %d.2 = f32[256]{0} all-gather-done(%s.2)
  %c = f32[16]{0} conditional(%p, %x, %x), true_computation=%one, false_computation=%other
  %k = (u8[5], u8[3], u8[2]) custom-call(), output_to_operand_aliasing={{0}: (1, {}), {2}: (2, {})}
  %k.1 = f32[2048]{0} custom-call(%x, %y), output_to_operand_aliasing={{}: (1, {})}
  ROOT %t = f32[128]{0} add(%d, %d)
}
"""


def test_an_asynchronous_operation_runs_once():
    found = find_collectives(hlo.parse(ASYNC), devices=8)
    gathers = {one.group: one for one in found if one.kind == "all-gather"}
    assert (gathers[8].count, gathers[8].bytes) == (2, 4 * (128 + 256))
    assert (gathers[4].count, gathers[4].bytes) == (1, 4 * 64)


def test_both_branches_of_a_truth_value_are_visited():
    found = find_collectives(hlo.parse(ASYNC), devices=8)
    (reduced,) = [one for one in found if one.kind == "all-reduce"]
    assert (reduced.group, reduced.bytes) == (2, 4 * 16)


def test_results_of_asynchronous_operations_are_one_array_each():
    counts = {row["shape"]: row["count"] for row in largest_arrays(hlo.parse(ASYNC))}
    # Two of 128: that of the gather, and the sum.
    assert counts["f32[128]"] == 2 and counts["f32[256]"] == 1


def test_results_that_reuse_an_operand_are_no_new_arrays():
    shapes = {row["shape"] for row in largest_arrays(hlo.parse(ASYNC))}
    assert "u8[3]" in shapes
    assert not {"u8[5]", "u8[2]", "f32[2048]"} & shapes


def test_text_without_an_entry_computation_is_rejected():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule empty\n")


def test_the_trip_count_of_a_compiled_scan_is_its_length():
    def square(x, _):
        return jnp.tanh(x @ x), None

    def run(x, _):
        return jax.lax.scan(square, x, length=5)[0], None

    def run_all(x):
        return jax.lax.scan(run, x, length=17)[0]

    text = jax.jit(run_all).lower(jnp.ones((64, 64))).compile().as_text()
    times = {visit.times for visit in hlo.walk(hlo.parse(text))}
    assert times == {1, 17, 17 * 5}
