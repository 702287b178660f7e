"""The folder of compiled programs, where there is none."""

from rwkv7_jax.runs import compilation_cache


def test_without_a_home_or_a_folder_for_programs_a_warning_is_all(
    monkeypatch, capfd, tmp_path
):
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
        capfd.readouterr().err.count("warning: programs are compiled anew each time")
        == 2
    )
