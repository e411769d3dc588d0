"""Run on two host devices by test_storage: Orbax saves and restores converted parameters; one line per check."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {name: jax.random.normal(key, (64, 32)) for name, key in zip(("a", "b", "c"), KEYS, strict=True)}
X = jnp.ones((2, 64))
POLICY = {"a": jaxq.w8a8(), "b": jaxq.weight_only(jaxq.int4(group=16)), "c": jaxq.weight_only(jaxq.kmeans(16))}


def f(params, x):
    return sum(x @ w for w in params.values())


def template(qparams, sharding):
    """Return the shapes of converted parameters, columns spread over the devices where there are enough of them."""

    def shape(leaf):
        columns = P(*[None] * (leaf.ndim - 1), "m") if leaf.ndim and leaf.shape[-1] % 2 == 0 else P()
        where = NamedSharding(sharding, columns) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(shape, jax.eval_shape(lambda: qparams))


def check(name, mesh):
    plan = jaxq.make_plan(f, POLICY)(PARAMS, X)
    qparams = jaxq.convert(f, plan)(PARAMS, X)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "step", qparams)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(pathlib.Path(folder) / "step", template(qparams, mesh))
    assert jax.tree.structure(restored) == jax.tree.structure(qparams)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(qparams), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert len(restored["a"].stored.sharding.device_set) == (2 if mesh else 1)
    np.testing.assert_allclose(jaxq.quantize(f, plan)(restored, X), jaxq.quantize(f, plan)(qparams, X), rtol=1e-5)
    print(name, "passed")


check("unsharded", None)
check("sharded", jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,)))
