"""Chip names of JAX, Google and GPUs."""

import pytest

from rwkv7_jax.plan.chips import find_target

KNOWN = [
    # Name, kind, shape, chips, host.
    ("v5e:2x4", "v5e", "2x4", 8, None),
    ("v5e:2x4,host=2x4", "v5e", "2x4", 8, (2, 4)),
    ("v6e:2x4,slices=2", "v6e", "2x4", 16, None),
    ("v5p:4x4x4,slices=2,host=2x2x1", "v5p", "4x4x4", 128, (2, 2, 1)),
    ("V5E:1x1", "v5e", "1x1", 1, (1,)),
    ("v5e-1", "v5e", "1x1", 1, (1, 1)),
    ("v5e-8", "v5e", "2x4", 8, (2, 4)),
    ("v5litepod-8", "v5e", "2x4", 8, (2, 4)),
    ("v5litepod-256", "v5e", "16x16", 256, None),
    ("v5e-256", "v5e", "16x16", 256, None),
    ("v6e-16", "v6e", "4x4", 16, None),
    ("v5p-128", "v5p", "4x4x4", 64, None),
    ("v5p-8", "v5p", "2x2x1", 4, (2, 2, 1)),
    ("v5:2x2x1", "v5p", "2x2x1", 4, None),
    ("v4-256", "v4", "4x4x8", 128, None),
    ("tpu7x-64", "tpu7x", "4x4x4", 64, None),
    ("v7x:2x2x1", "tpu7x", "2x2x1", 4, None),
]


@pytest.mark.parametrize(("name", "kind", "shape", "chips", "host"), KNOWN)
def test_a_name_counts_chips_and_not_cores(name, kind, shape, chips, host):
    target = find_target(name)
    assert (target.kind, target.shape, target.chips) == (kind, shape, chips)
    assert target.host == host
    assert (target.platform, target.compiler) == ("tpu", "libtpu")


@pytest.mark.parametrize(
    "name",
    [
        *("", "v5e", "v5e:", "v5e:2", "v5e:2x2x2", "v5p:4x4", "v5e:0x4", "v3:2x2"),
        *("v5e-7", "v5p-3", "v5p-6", "b200", "v5e:2x4,cores=2", "v5e:2x4,slices=0"),
        *("v5e:2x4,slices=2,slices=4", "v5e:2x4,host=2x2x1x9", "v5e:2x4,host=0x2"),
        *("v5e:2x4,slices=2x2", "v5e:2x4 slices=2", "2x4", "h100:2", "v5e:2x4,host=x"),
        *("v5e-" + "9" * 5000, "v5e:2x" + "9" * 5000, "v5e:2x4,slices=" + "9" * 5000),
    ],
)
def test_unknown_names_are_rejected(name):
    with pytest.raises(ValueError, match=r"`--topology` must .*; got") as caught:
        find_target(name)
    assert str(caught.value).endswith(f"got {name!r}.")


def test_the_memory_limit_of_a_gpu_is_what_jax_preallocates(monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    target = find_target("h100")
    assert (target.platform, target.chips) == ("cuda", 1)
    assert target.limit == pytest.approx(0.75 * 81559 / 1024)
    # JAX reads both names, too.
    for name in names:
        with monkeypatch.context() as patched:
            patched.setenv(name, "0.9")
            assert target.limit == pytest.approx(0.9 * 81559 / 1024)
            for wrong in ("most", "0", "-1", "nan", "inf"):
                patched.setenv(name, wrong)
                with pytest.raises(ValueError, match=f"`{name}` must be a number"):
                    _ = target.limit
