"""The machine information in results."""

import json
import types

from rwkv7_jax.reports.system_info import (
    device_line,
    installed_versions,
    lines,
    peak_memory,
    system,
    versions,
)


def test_system_info_has_devices_and_versions_and_survives_json():
    info = json.loads(json.dumps(system()))
    assert info == system()
    (device,) = info["devices"]
    assert (device["platform"], device["count"]) == ("cpu", 2)
    assert info["versions"]["jax"].split(".")[0].isdigit()
    assert info["cores"] >= 1


def test_lines_omit_missing_information():
    info = {
        "versions": {"python": "3.11", "jax": "0.10"},
        "cores": 4,
        "platform": "here",
    }
    device = {
        "kind": "TPU v4",
        "platform": "tpu",
        "count": 8,
        "memory_bytes": 32 * 2**30,
    }
    assert lines(info | {"devices": [device], "memory_bytes": 2**30}) == [
        "python      3.11 on here, 4 cores, 1.0 GiB",
        "jax               0.10",
        "device      8 x TPU v4 (tpu, 32.0 GiB)",
    ]
    assert lines({}) == ["python      ? on ?, ? cores"]


def test_a_missing_package_is_listed_as_not_installed():
    assert versions(("no-such-package",))["no-such-package"] == "not installed"
    assert set(installed_versions(("jax", "no-such-package"))) == {"jax"}
    assert device_line().startswith("cpu, ")


def test_peak_memory_falls_back_to_that_of_the_process(unchecked):
    own = peak_memory()
    assert own.of == "process" and 50e6 < own.bytes < 1e12
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    assert peak_memory(device) == (7, "device")
