"""The choice of a backend: a named one runs or raises, None takes the first that can."""

import os
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import backends
from sparseattn_jax.kernels.backends import (
    DeviceFacts,
    Implementation,
    UnsupportedError,
    choose,
    device_facts,
    device_model,
    never_refuses,
)

TABLE = {
    "mosaic_sm90": Implementation(
        lambda: "mosaic", lambda facts: None if facts == "hopper" else f"needs hopper, got {facts}"
    ),
    "xla": Implementation(lambda: "xla", never_refuses),
}


@pytest.mark.parametrize(("facts", "expected"), [("hopper", "mosaic"), ("cpu", "xla")])
def test_none_takes_the_first_that_does_not_refuse(facts: str, expected: str):
    assert choose(TABLE, None, facts).run() == expected


def test_a_named_backend_runs_although_a_better_one_could():
    assert choose(TABLE, "xla", "hopper").run() == "xla"


def test_a_named_backend_that_refuses_raises_its_reason():
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs hopper, got cpu"):
        choose(TABLE, "mosaic_sm90", "cpu")


def test_a_backend_that_the_op_has_not_raises_what_there_is():
    with pytest.raises(UnsupportedError, match="'cudnn': this op has mosaic_sm90, xla"):
        choose(TABLE, "cudnn", "cpu")


def test_facts_of_a_concrete_and_of_a_traced_operand():
    cpu = DeviceFacts(platform="cpu", compute_capability=None)
    seen = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(device_facts(x))
        return x

    traced(jnp.ones(3))
    assert [device_facts(jnp.ones(3)), *seen] == [cpu, cpu]


def write_ptxas(root: pathlib.Path, says: str) -> str:
    """A ptxas in root/bin that says this."""
    ptxas = root / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.write_text(f"#!/bin/sh\necho '{says}'\n")
    ptxas.chmod(0o755)
    return str(ptxas)


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("Cuda compilation tools, release 12.9, V12.9.41", (12, 9, 41)),
        ("release 13.0, V13.0.88\nBuild cuda_13.0.r13.0", (13, 0, 88)),
        ("a sentence without a version", None),
    ],
)
def test_version_of_ptxas(tmp_path: pathlib.Path, says: str, version: tuple[int, int, int] | None):
    assert backends._ptxas_version(write_ptxas(tmp_path, says)) == version


def test_no_ptxas_has_no_version():
    assert backends._ptxas_version(None) is None


def test_ptxas_on_the_path_comes_before_that_of_cuda_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    on_path = write_ptxas(tmp_path / "path", "")
    in_cuda_home = write_ptxas(tmp_path / "home", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", os.pathsep.join(["/none", str(tmp_path / "path" / "bin")]))
    assert backends._ptxas() == on_path
    monkeypatch.setenv("PATH", "/none")
    assert backends._ptxas() == in_cuda_home


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    gpu = types.SimpleNamespace(
        platform="gpu",
        compute_capability="9.0",
        core_count=132,
        device_kind="NVIDIA H100 80GB HBM3",
    )
    monkeypatch.setattr(backends, "_device", lambda *_: gpu)
    write_ptxas(tmp_path, "V12.9.86")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert device_facts() == DeviceFacts(
        platform="gpu",
        compute_capability=(9, 0),
        multiprocessors=132,
        ptxas_version=(12, 9, 86),
        model="h100",
    )


@pytest.mark.parametrize(
    ("device_kind", "model"),
    [
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", None),
    ],
)
def test_models_with_tables(device_kind: str, model: str | None):
    assert backends._model(device_kind) == model


def test_without_a_gpu_the_rules_hold():
    assert device_model(jnp.zeros(1)) is None
