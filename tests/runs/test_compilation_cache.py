"""The compilation cache: without a folder, and with one that the environment names."""

import pytest

from rwkv7_jax.runs import compilation_cache


def test_a_missing_home_or_cache_folder_is_only_a_warning(monkeypatch, capfd, tmp_path):
    changed = []
    monkeypatch.setattr(
        compilation_cache.jax.config, "update", lambda *pair: changed.append(pair)
    )
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert (
        compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
        is None
    )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (
        compilation_cache.enable_compilation_cache(compilation_cache.user_folder())
        is None
    )
    assert changed == [("jax_enable_compilation_cache", False)] * 2
    assert (
        capfd.readouterr().err.count("warning: the compilation cache is disabled") == 2
    )


@pytest.mark.parametrize("name", ["gs://no-bucket/programs", "s3://no-bucket/programs"])
def test_a_store_named_by_the_environment_creates_no_local_folder(
    monkeypatch, capfd, tmp_path, name
):
    changed = {}
    monkeypatch.setattr(compilation_cache.jax.config, "update", changed.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", name)
    monkeypatch.chdir(tmp_path)
    reached = []
    monkeypatch.setattr(
        compilation_cache.epath.Path(name).__class__,
        "mkdir",
        lambda self, **_: reached.append(str(self)),
    )
    folder = compilation_cache.user_folder()
    assert compilation_cache.enable_compilation_cache(folder) == name
    assert reached == [name] and changed["jax_compilation_cache_dir"] == name
    assert not list(tmp_path.iterdir()) and not capfd.readouterr().err


def test_a_store_without_its_package_is_a_warning(monkeypatch, capfd):
    def fail(self, **_):
        raise ImportError("Please install gcsfs")

    changed = {}
    monkeypatch.setattr(compilation_cache.jax.config, "update", changed.__setitem__)
    path = compilation_cache.epath.Path("gs://no-bucket")
    monkeypatch.setattr(path.__class__, "mkdir", fail)
    assert compilation_cache.enable_compilation_cache("gs://no-bucket") is None
    assert changed == {"jax_enable_compilation_cache": False}
    assert (
        "the compilation cache is disabled: Please install gcsfs"
        in capfd.readouterr().err
    )
