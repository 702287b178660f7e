"""Kernels and bytes of a loop, counted in the text of a compiled program."""

import jax
import jax.numpy as jnp

from benchmarks.decode_compiled import loop_costs, parse, type_bytes

PROGRAM = """
%rows (table: bf16[1000,64], place: s32[]) -> bf16[1,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = bf16[1,64]{1,0} dynamic-slice(%table, %place, %zero), dynamic_slice_sizes={1,64}
}

%body (carry: (s32[], bf16[1,64], bf16[1000,64])) -> (s32[], bf16[1,64], bf16[1000,64]) {
  %carry = (s32[], bf16[1,64]{1,0}, bf16[1000,64]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%carry), index=0
  %table.1 = bf16[1000,64]{1,0} get-tuple-element(%carry), index=2
  %taken = bf16[1,64]{1,0} fusion(%table.1, %index), kind=kLoop, calls=%rows
  %sum = bf16[1,64]{1,0} add(%taken, %taken)
  ROOT %next = (s32[], bf16[1,64]{1,0}, bf16[1000,64]{1,0}) tuple(%index, %sum, %table.1)
}

%condition (carry.1: (s32[], bf16[1,64], bf16[1000,64])) -> pred[] {
  %carry.1 = (s32[], bf16[1,64]{1,0}, bf16[1000,64]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (start: (s32[], bf16[1,64], bf16[1000,64])) -> (s32[], bf16[1,64], bf16[1000,64]) {
  %start = (s32[], bf16[1,64]{1,0}, bf16[1000,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[1,64]{1,0}, bf16[1000,64]{1,0}) while(%start)\
, condition=%condition, body=%body
}
"""


def test_array_bytes_depend_on_the_dtype():
    assert type_bytes("(f32[2,3]{1,0}, bf16[4], pred[5], s32[])") == 24 + 8 + 5 + 4


def test_a_gather_counts_the_slice_and_not_the_table():
    row = 64 * 2
    # A slice reads a row and its place, and writes a row; the sum reads two and writes one.
    expected = (row + 4 + row) + 3 * row
    assert loop_costs(PROGRAM) == {
        "kernels": 2,
        "bytes": expected,
        "joined": 0,
        "sliced": 1,
    }


def test_output_of_the_installed_compiler_is_parsed():
    def generate(weight, x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ weight), x)

    weight = jnp.ones((64, 64))
    x = jnp.ones((1, 64))
    text = jax.jit(generate).lower(weight, x).compile().as_text()
    assert len(parse(text)) > 2
    found = loop_costs(text)
    assert 0 < found["kernels"] < 10
    assert 64 * 64 * 4 <= found["bytes"] < 2 * 64 * 64 * 4
