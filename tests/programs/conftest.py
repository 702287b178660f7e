"""Fixtures of the tests that run programs."""

import pytest
from smallest_runs import save_base_model


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """Saves a model of one layer and returns its path."""
    path = tmp_path_factory.mktemp("base") / "model.pth"
    save_base_model(path)
    return path
