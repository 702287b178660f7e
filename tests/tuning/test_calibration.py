"""Kernel features fitted to reads: their scales, the kernel they approximate, their landmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from upscaled_states import noise

from rwkv7_jax.model.kernel_features import kernel_features, unit_vectors
from rwkv7_jax.tuning.calibration import calibrate, resolve_features

H, N = 3, 8


@pytest.mark.parametrize("kind", ["gaussian", "fourier"])
def test_whitened_features_have_unit_covariance_on_the_calibration_text(kind):
    reads = noise((2, 500, H, N), 7) * np.arange(1, N + 1).reshape(1, 1, 1, N)
    features = calibrate(reads, size=16, kind=kind, damping=1e-6)
    phi = kernel_features(jax.tree.map(lambda x: x[1], features), reads[1][None])[0]
    for head in range(H):
        np.testing.assert_allclose(phi[:, head].mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(np.cov(phi[:, head].T), np.eye(16), atol=0.02)


def test_centred_features_have_mean_0_and_size_1_and_raw_ones_are_the_kernel():
    reads = noise((1, 200, H, N), 7)
    raw = calibrate(reads, size=16, prepare="none", widths=(1.0,))
    centred = calibrate(reads, size=16, prepare="centre", widths=(1.0,))
    phi = {
        name: np.asarray(kernel_features(jax.tree.map(lambda x: x[0], one), reads)[0])
        for name, one in (("raw", raw), ("centred", centred))
    }
    apart = phi["raw"] - phi["raw"].mean(0)
    apart = apart / np.sqrt(np.mean(apart**2, axis=(0, 2), keepdims=True))
    np.testing.assert_allclose(phi["centred"], apart, atol=1e-4)
    unit = np.asarray(unit_vectors(reads[0]))
    apart = unit[:, :, None] - np.asarray(raw.landmarks[0, 0])
    kernel = np.exp(-np.asarray(raw.widths[0, 0]) * np.sum(np.square(apart), -1))
    np.testing.assert_allclose(phi["raw"], kernel, atol=1e-5)


def test_cosine_features_approximate_the_gaussian_kernel():
    reads = noise((1, 300, 1, N), 7)
    features = calibrate(
        reads, size=4096, kind="fourier", prepare="none", widths=(1.0,)
    )
    phi = np.asarray(
        kernel_features(jax.tree.map(lambda x: x[0], features), reads)[0, :, 0]
    )
    unit = np.asarray(unit_vectors(reads[0, :, 0]))
    square = np.sum((unit[:, None] - unit) ** 2, -1)
    gamma = 1 / np.median(square)
    np.testing.assert_allclose(phi @ phi.T, np.exp(-gamma * square), atol=0.15)
    # A saved memory depends on the phases' sign, which the kernel does not.
    angles = unit @ np.asarray(features.landmarks[0, 0, 0]).T
    cosines = np.cos(angles + np.asarray(features.widths[0, 0, 0]))
    np.testing.assert_allclose(phi, np.sqrt(2 / 4096) * cosines, atol=1e-6)


def test_kmeans_landmarks_are_closer_to_the_reads_than_random_ones():
    reads = noise((1, 400, 1, N), 7)
    unit = np.asarray(unit_vectors(reads[0, :, 0]))
    far = {}
    for method in ("random", "kmeans"):
        centres = np.asarray(
            calibrate(reads, size=12, landmarks=method).landmarks[0, 0, 0]
        )
        far[method] = np.min(np.sum((unit[:, None] - centres) ** 2, -1), 1).mean()
    assert far["kmeans"] < 0.9 * far["random"]


# Of very different lengths, which the raw kernel does not even out.
UNEVEN = noise((1, 80, 1, 3), 7) * jnp.geomspace(0.1, 10, 80).reshape(1, 80, 1, 1)


def test_kmeans_landmarks_are_the_means_of_their_nearest_reads():
    features = calibrate(
        UNEVEN, size=4, kind="gaussian_raw", landmarks="kmeans", prepare="none"
    )
    points = np.asarray(UNEVEN[0, :, 0])
    centres = np.asarray(features.landmarks[0, 0, 0])
    nearest = np.sum((points[:, None] - centres) ** 2, -1).argmin(1)
    means = [points[nearest == at].mean(0) for at in range(len(centres))]
    np.testing.assert_allclose(centres, means, atol=1e-3)


def test_the_width_follows_the_median_squared_distance_to_a_landmark():
    features = calibrate(
        UNEVEN, size=80, kind="gaussian_raw", prepare="none", widths=(1.0,)
    )
    points = np.asarray(UNEVEN[0, :, 0])
    distances = np.sum((points[:, None] - points) ** 2, -1)
    # From a sample of all pairs; their mean is six times as large.
    np.testing.assert_allclose(features.widths, 1 / np.median(distances), rtol=0.3)


def test_more_features_than_distinct_reads_get_distinct_landmarks():
    reads = jnp.tile(noise((1, 5, 1, N), 7), (1, 20, 1, 1))
    centres = np.asarray(calibrate(reads, size=16).landmarks[0, 0, 0])
    assert len(np.unique(centres, axis=0)) == 16 and np.isfinite(centres).all()


@pytest.mark.parametrize("kind", ["gaussian", "fourier", "gaussian_raw"])
@pytest.mark.parametrize("prepare", ["centre", "whiten"])
@pytest.mark.parametrize("count", [1, 50])
def test_constant_reads_get_features_of_their_own_scale(kind, prepare, count):
    reads = noise((1, count, 2, N), 7)
    # The second head varies where there is more than one vector.
    reads = reads.at[:, :, 0].set(reads[:, :1, 0])
    features = calibrate(reads, size=16, kind=kind, prepare=prepare)
    layer = jax.tree.map(lambda x: x[0], features)
    other = np.asarray(kernel_features(layer, noise((1, 100, 2, N), 8)))
    assert np.abs(other[:, :, 0]).max() < 10
    own = np.asarray(kernel_features(layer, reads))
    assert np.abs(own[:, :, 0]).max() < 1e-5
    if count > 1:
        assert np.mean(own[:, :, 1] ** 2) == pytest.approx(1.0, rel=0.7)


def test_too_small_a_damping_is_rejected():
    reads = noise((1, 5, 2, N), 7)
    sentence = (
        "calibrate: `damping` must be larger, because 5 reads of a head give a singular"
    )
    with pytest.raises(ValueError, match=sentence):
        calibrate(reads, size=16, damping=0.0)
    assert np.isfinite(calibrate(reads, size=16).map).all()


@pytest.mark.parametrize(
    ("dynamics", "whiten", "given", "expected"),
    [
        ("static", True, {}, ("gaussian", "whiten", (1.0, 4.0, 16.0))),
        ("delta", False, {}, ("gaussian", "none", (1.0,))),
        ("replace", True, {}, ("gaussian_raw", "none", (1.0,))),
        ("static", True, {"prepare": "none"}, ("gaussian", "none", (1.0,))),
        (
            "static",
            False,
            {"prepare": "centre"},
            ("gaussian", "centre", (1.0, 4.0, 16.0)),
        ),
        ("static", False, {"widths": (2.0, 3.0)}, ("gaussian", "none", (2.0, 3.0))),
        ("replace", True, {"kind": "fourier"}, ("fourier", "none", (1.0,))),
    ],
)
def test_defaults_of_settings_are_in_one_place(dynamics, whiten, given, expected):
    assert resolve_features(dynamics, whiten=whiten, **given) == expected
    # Config files, and the records of old runs, spell an open setting "" or ().
    written = {"kind": "", "prepare": "", "widths": ()} | given
    assert resolve_features(dynamics, whiten=whiten, **written) == expected


def test_widths_may_be_an_array(unchecked):
    for given in (np.array([2.0, 3.0]), [2.0, 3.0]):
        assert resolve_features("static", widths=given).widths == (2.0, 3.0)
    assert resolve_features("static", widths=np.array([])).widths == (1.0, 4.0, 16.0)
