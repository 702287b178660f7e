"""Which versions of triton, jax and jax-triton launch the Triton kernels."""

import pytest

from pallas_kernels.gpu import triton_launcher

NEEDED = "The Triton kernels need triton 3.6 or 3.7 and jax 0.10, 0.11 or 0.12"


@pytest.fixture
def install(monkeypatch):
    """Returns a function that pretends that these versions, by name, are installed."""

    def pretend(**installed):
        def version(name):
            if name.replace("-", "_") in installed:
                return installed[name.replace("-", "_")]
            raise triton_launcher.PackageNotFoundError(name)

        monkeypatch.setattr(triton_launcher, "version", version)

    return pretend


@pytest.mark.parametrize(
    ("installed", "error", "sentence"),
    [
        ({"jax": "0.10.2"}, ImportError, f"{NEEDED}; triton is missing."),
        (
            {"jax": "0.9.1", "triton": "3.7.1"},
            RuntimeError,
            f"{NEEDED}; installed are triton 3.7.1 and jax 0.9.1.",
        ),
        (
            {"jax": "0.10.2", "jax_triton": "0.3.1", "triton": "3.9.0"},
            RuntimeError,
            f"{NEEDED}; installed are triton 3.9.0 and jax 0.10.2.",
        ),
    ],
)
def test_a_missing_or_untested_version_is_named_in_one_sentence(
    install, installed, error, sentence
):
    install(**installed)
    with pytest.raises(error) as caught:
        triton_launcher.check_versions()
    assert str(caught.value) == sentence
    assert triton_launcher.missing()


@pytest.mark.parametrize(
    ("jax", "triton", "jax_triton", "fits"),
    [
        ("0.10.2", "3.6.0", "0.3.1", True),
        ("0.10.2", "3.7.1", "0.3.1", True),
        ("0.11.2", "3.6.0", "0.3.1", True),
        ("0.11.0", "3.7.0", "0.4.1", True),
        ("0.11.2", "3.6.0", "0.4.1", False),
        ("0.12.0.1", "3.7.1", "0.4.1", False),
        ("0.12.0.1", "3.6.0", "0.3.1", False),
        ("0.11.2", "3.7.1", None, False),
    ],
)
def test_jax_triton_launches_where_its_version_fits_and_is_optional_elsewhere(
    install, jax, triton, jax_triton, fits
):
    versions = {"jax": jax, "triton": triton}
    if jax_triton is not None:
        versions["jax_triton"] = jax_triton
    install(**versions)
    triton_launcher.check_versions()
    assert not triton_launcher.missing()
    assert triton_launcher.has_fitting_jax_triton() == fits
