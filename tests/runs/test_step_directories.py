"""Manifests of step directories."""

from rwkv7_jax.runs.resume import step_directories


def test_a_manifest_detects_changed_and_extra_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_text(name)
    step_directories.write_manifest(tmp_path)
    assert step_directories.verify_manifest(tmp_path) == []
    (tmp_path / "in/b").write_text("c")
    (tmp_path / "further").write_text("")
    assert step_directories.verify_manifest(tmp_path) == ["in/b", "further"]
