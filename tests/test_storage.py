"""Sizes, times and memory of saved models: the figures of `tpu_scripts/storage.py`, and where loaded arrays lie."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

ROOT = pathlib.Path(jaxq.__file__).parents[1]


def test_figures_keep_their_limits(tmp_path):
    sys.path.insert(0, str(ROOT / "tpu_scripts"))
    try:
        import storage
    finally:
        sys.path.remove(str(ROOT / "tpu_scripts"))
    for figure in (*storage.sizes(), *storage.memory()):
        assert 0 <= figure.value <= figure.limit, figure


@pytest.fixture
def saved(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (96, 101)), "b": jnp.ones(3)}  # 9696 codes: 32 over
    plan = jaxq.make_plan(lambda p, x: x @ p["w"], jaxq.w8a8())(params, jnp.ones((1, 96)))
    qparams = jaxq.convert(lambda p, x: x @ p["w"], plan)(params, jnp.ones((1, 96)))
    wide = {"f8": jnp.zeros((64, 99), jnp.float8_e4m3fn), "bf": jnp.ones((50, 50), jnp.bfloat16)}
    jaxq.save(tmp_path / "m.safetensors", {**qparams, **wide}, plan)
    return tmp_path / "m.safetensors"


def test_large_arrays_stay_in_the_map(saved):
    qparams, _ = jaxq.load(saved)
    lines = [
        line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if line.endswith(saved.name)
    ]
    maps = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for array in (qparams["w"].stored, qparams["f8"], qparams["bf"]):
        assert any(low <= array.unsafe_buffer_pointer() < high for low, high in maps), array.dtype


def test_donated_arrays_do_not_reach_the_file(saved):
    before = saved.read_bytes()
    qparams, _ = jaxq.load(saved)
    out = jax.jit(lambda x: x + 1, donate_argnums=0)(qparams["bf"])
    np.testing.assert_array_equal(out, np.full((50, 50), 2, jnp.bfloat16))
    assert saved.read_bytes() == before
    np.testing.assert_array_equal(jaxq.load(saved)[0]["bf"], np.ones((50, 50), jnp.bfloat16))


def test_a_new_version_leaves_loaded_arrays_alone(saved):
    qparams, plan = jaxq.load(saved)
    old = np.array(qparams["bf"])
    jaxq.save(saved, {**qparams, "bf": qparams["bf"] * 3}, plan)
    np.testing.assert_array_equal(qparams["bf"], old)
    np.testing.assert_array_equal(jaxq.load(saved)[0]["bf"], old * 3)


def test_orbax_restores_into_shapes_sharded_and_not():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = [sys.executable, str(pathlib.Path(__file__).parent / "orbaxed.py")]
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("passed") == 2
