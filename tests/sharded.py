"""Run on four host devices by test_sharding: prints one line per check."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"up": jax.random.normal(KEYS[0], (64, 128)), "down": jax.random.normal(KEYS[1], (128, 16))}
X = jax.random.normal(KEYS[2], (8, 64))
LAYOUT = {"up": P(None, "m"), "down": P("m", None)}


def network(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def ready(fn, policy):
    plan = jaxq.make_plan(fn, policy)(PARAMS, X)
    return jaxq.calibrate(fn, plan, progress=False)(PARAMS, [X]) if plan.unobserved() else plan


def placed(mesh):
    params = {name: jax.device_put(w, NamedSharding(mesh, LAYOUT[name])) for name, w in PARAMS.items()}
    return params, jax.device_put(X, NamedSharding(mesh, P("d", None)))


def assert_same(policy, got, expected):
    """Integer sums are the same bits however they are split; float sums differ by their order."""
    if policy.scheme.act is not None:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def automatic(policy):
    """Sharded arguments under `jit`: bit for bit what one device gives, converted or not."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    plan, (params, x) = ready(network, policy), placed(mesh)
    expected = jaxq.qat(network, plan)(PARAMS, X)
    assert_same(policy, jaxq.qat(network, plan)(params, x), expected)
    converted = jaxq.convert(network, plan)(params, x)
    assert converted["up"].codes.sharding.spec == P(None, "m")
    assert_same(policy, jaxq.quantize(network, plan)(converted, x), expected)


def manual(policy):
    """`shard_map` inside: columns, then rows with a psum; ranges agree on all devices."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)

    def local(up, down, x):
        return jax.lax.psum(jax.nn.relu(x @ up) @ down, "m")

    def fn(params, x):
        specs = (LAYOUT["up"], LAYOUT["down"], P("d", None))
        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("d", None))
        return sharded(params["up"], params["down"], x)

    plan = ready(fn, policy)
    assert plan.names == ("up", "down")
    out = jaxq.qat(fn, plan)(PARAMS, X)
    np.testing.assert_array_equal(jaxq.quantize(fn, plan)(jaxq.convert(fn, plan)(PARAMS, X), X), out)
    exact = network(PARAMS, X)
    assert jnp.abs(out - exact).max() < 0.03 * jnp.abs(exact).max()
    if plan.range("up")[0] is not None:
        assert float(plan.range("up")[0].hi) == float(X.max())
    gradients = jax.grad(lambda params: jaxq.qat(fn, plan)(params, X).sum())(PARAMS)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def learned():
    """Learned steps start inside `shard_map` too: those of all devices, on average, and are trained from there."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def fn(w, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(w, x)

    act = jaxq.Quantizer(jaxq.Int(8), per_tensor=True, calibrator=jaxq.learned())
    scheme = jaxq.Scheme(weight=jaxq.int8(calibrator=jaxq.learned()), act=act)
    _, plan = jaxq.observe(fn, scheme)(PARAMS["up"], X)
    again, same = jaxq.observe(fn, plan, quantized=True)(PARAMS["up"], X)
    assert all(np.array_equal(a.value, b.value) for a, b in zip(*(p.range("dot0") for p in (plan, same)), strict=True))
    parts = [jaxq.observe(lambda w, x: x @ w, scheme)(PARAMS["up"], part)[1].range("dot0") for part in jnp.split(X, 4)]
    for n, ours in enumerate(plan.range("dot0")):
        np.testing.assert_allclose(ours.value, np.mean([part[n].value for part in parts], axis=0), rtol=1e-5)
    np.testing.assert_array_equal(again, jaxq.qat(lambda w, x: x @ w, plan)(PARAMS["up"], X))
    gradient = jax.grad(lambda plan: jnp.sum(jnp.sin(jaxq.qat(fn, plan)(PARAMS["up"], X))))(plan)
    assert all(np.any(np.asarray(r.value)) for r in gradient.range("dot0"))


def explicit(policy):
    """A mesh with explicit axes, `out_sharding=` on the product."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def fn(params, x):
        return jnp.einsum("bk,kn->bn", jax.nn.relu(x @ params["up"]), params["down"], out_sharding=P("d", None))

    expected = jaxq.qat(network, ready(network, policy))(PARAMS, X)
    with jax.set_mesh(mesh):
        params, x = placed(mesh)
        plan = ready(network, policy)
        assert_same(policy, jaxq.qat(fn, plan)(params, x), expected)
        gradients = jax.grad(lambda params: jaxq.qat(fn, plan)(params, x).sum())(params)
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, PARAMS)
        # Several axes on both sides of a product, one of them spread.
        heads = jax.device_put(params["up"].reshape(64, 8, 16), NamedSharding(mesh, P(None, "m", None)))
        tokens = jax.device_put(jnp.stack([X, -X], 1), NamedSharding(mesh, P("d", None, None)))
        attention = lambda w, x: jnp.einsum("btd,dhk->bthk", x, w)  # noqa: E731
        got, pull = jax.vjp(jaxq.qat(attention, jaxq.w8a8()), heads, tokens)
        assert_same(policy, got, jaxq.qat(attention, jaxq.w8a8())(*map(jax.device_get, (heads, tokens))))
        assert all(bool(jnp.isfinite(g).all()) for g in pull(got))
        back = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.Backward(act=jaxq.int8()))
        alone = [jax.device_get(a) for a in (heads, tokens)]
        got, pull = jax.vjp(jaxq.qat(attention, back), *alone)
        expected = pull(got)
        for weight in (alone[0], heads):
            got, pull = jax.vjp(jaxq.qat(attention, back), weight, tokens)
            for g, e in zip(pull(got), expected, strict=True):
                np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4)
        images = jax.device_put(X[:4, :48].reshape(4, 4, 4, 3), NamedSharding(mesh, P("d", None, None, None)))
        kernel = PARAMS["up"][:12, :6].reshape(2, 2, 3, 6)
        layout = ("NHWC", "HWIO", "NHWC")
        tiles = lambda w, x: jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=layout)  # noqa: E731
        cut = jaxq.qat(tiles, jaxq.w8a8())
        np.testing.assert_array_equal(cut(kernel, images), cut(kernel, jax.device_get(images)))


if __name__ == "__main__":
    learned()
    print("passed learned", flush=True)
    for check in (automatic, manual, explicit):
        for policy in (jaxq.w8a8(), jaxq.w8a8(static=True), jaxq.weight_only()):
            check(policy)
            print("passed", check.__name__, flush=True)
