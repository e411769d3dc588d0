"""Loops in integers: gated units over time to the last bit, layers as if written out, bounds that hold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import integers
import jaxq
from inspection import traced
from jaxq.integer.audit import floats
from random_nets import grid

pytestmark = pytest.mark.shared

STATIC = jaxq.w8a8(static=True)
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def built(f, params, *args, policy=STATIC):
    """Return a function's integer program, which holds no float, and its imitation's outputs."""
    plan = jaxq.calibrate(f, policy, progress=False)(params, [args])
    program = jaxq.integer(f, plan)(params, *args)
    assert not list(floats(traced(program, *args)))
    return program, jaxq.quantize(f, plan)(jaxq.convert(f, plan)(params, *args), *args)


# --- a gated unit in Python's integers -------------------------------------------------------------------------------

UNITS, STEPS = 8, 20


def unit(p, x):
    """An LSTM whose gates are rounded to eight bits, and whose output is bounded by a clip. x: [batch, time, in]."""

    def step(state, x):
        c, h = state
        gates = jnp.split(jnp.concatenate([x, h], -1) @ p["gates"], 4, -1)
        i, f, o = (jax.nn.sigmoid(g) for g in gates[:3])
        c = f * c + i * jnp.tanh(gates[3])
        h = o * jnp.clip(c, -1, 1)
        return (c, h), h

    zeros = jnp.zeros((x.shape[0], UNITS))
    (c, _), hs = lax.scan(step, (zeros, zeros), jnp.swapaxes(x @ p["enter"], 0, 1))
    return c, hs


def judge(plan, qparams, x):
    """Return what the unit gives in Python's integers. Of jaxq only grids and the codes of weights are read."""
    own = {
        name: [grid(q, r) for q, r in zip(plan[name].ranged, plan.range(name), strict=True) if r] for name in qparams
    }

    def dense(name, v):
        w = qparams[name].plain()
        return integers.dense(v, np.asarray(w.codes, np.int64), np.asarray(w.scale, np.float64), own[name][0])

    def table(v, f):
        return integers.table_alone(v, own["gates"][1], lambda x: np.asarray(f(jnp.asarray(x))))

    def step(x, state):
        c, h = state
        gates = integers.narrowed(dense("gates", integers.concatenate(x, h)), own["gates"][1])
        parts = [gates._replace(codes=codes) for codes in np.split(gates.codes, 4, -1)]
        i, f, o = (table(g, jax.nn.sigmoid) for g in parts[:3])
        c = integers.add(integers.product(f, c), integers.product(i, table(parts[3], jnp.tanh)))
        clipped = integers.clamped(integers.clamped(c, np.maximum, -1.0), np.minimum, 1.0)
        return [c, integers.product(o, clipped)]

    batch = x.shape[0]
    entered = integers.entered(np.asarray(x).reshape(-1, x.shape[-1]), own["enter"][0])
    sums = integers.uniform(dense("enter", entered))
    xs = [sums._replace(codes=c) for c in np.moveaxis(sums.codes.reshape(batch, -1, UNITS), 1, 0)]
    carried = integers.states(lambda state: step(xs[0], state), (batch, UNITS), [0.0, 0.0], len(xs))
    zeros = integers.Held(np.zeros((batch, UNITS), np.int64), *(integers.same(n, 2) for n in (1.0, 0, 0)))
    state, hs = [s.of(zeros) for s in carried], []
    for x_t in xs:
        outs = step(x_t, state)
        state = [s.of(v) for s, v in zip(carried, outs, strict=True)]
        hs.append(integers.left(outs[1]))
    return integers.left(state[0]), np.stack(hs)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 8))])
def test_a_gated_unit_is_that_of_pythons_integers(seed):
    rng = np.random.default_rng(seed)
    shapes = {"enter": (6, UNITS), "gates": (2 * UNITS, 4 * UNITS)}
    p = {name: jnp.asarray(2 * rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, STEPS, 6)), jnp.float32)
    plan = jaxq.calibrate(unit, {"gates": rounded(), "*": STATIC}, progress=False)(p, [x])
    qparams = jaxq.convert(unit, plan)(p, x)
    program = jaxq.integer(unit, plan)(qparams, x)
    for scale in (1.0, 1.5):  # of which the second saturates
        for ours, theirs in zip(program(scale * x), judge(plan, qparams, scale * x), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert not list(floats(traced(program, x)))


def rounded():
    static = jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())
    return jaxq.Scheme(weight=jaxq.int8(), act=static, out=static)


# --- units of Flax ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell])
def test_recurrent_cells_of_linen_run_in_integers(cell):
    module, x = nn.RNN(cell(16), reverse=cell is nn.GRUCell), normal(4, 12, 8)
    params = module.init(jax.random.key(0), x)
    program, imitated = built(module.apply, params, x)
    true = module.apply(params, x)
    assert np.abs(program(x) - true).max() < 0.05 * np.abs(true).max()
    assert np.abs(imitated - true).max() < 0.05 * np.abs(true).max()


def test_a_recurrent_module_of_nnx_runs_in_integers_in_batches_of_any_size():
    module, x = nnx.RNN(nnx.GRUCell(8, 16, rngs=nnx.Rngs(0))), normal(4, 12, 8)
    program, _ = built(lambda m, x: m(x), module, x)
    assert np.abs(program(x) - module(x)).max() < 0.05 * np.abs(module(x)).max()
    exported = jax.export.export(jax.jit(program))(
        jax.ShapeDtypeStruct((jax.export.symbolic_shape("n")[0], 12, 8), jnp.float32)
    )
    np.testing.assert_array_equal(exported.call(x[:3]), program(x[:3]))


# --- loops of every kind ---------------------------------------------------------------------------------------------

SQUARE, LAYERS, H, XS = normal(16, 16, scale=0.25), normal(5, 16, 16, scale=0.25), normal(6, 16), normal(4, 12, 8)
TALL = normal(8, 16, scale=0.3)


def in_time(x):
    return jnp.swapaxes(x, 0, 1)


OVER_TIME = {
    "counted": lambda p, h: lax.fori_loop(0, 5, lambda i, s: (jnp.tanh(s[0] @ p["u"]), s[1] + i), (h, 0)),
    "a state from outside": lambda p, h: lax.scan(
        lambda s, x: (jnp.tanh(s @ p["u"] + x @ p["w"]), s), h[:4], in_time(XS) @ jnp.eye(8)
    ),
    "averages": lambda p, h: lax.scan(lambda s, x: (0.9 * s + 0.1 * x, s), jnp.zeros((16,)), h @ p["u"])[1],
    "sums": lambda p, h: lax.scan(lambda s, x: (s + x, s), jnp.zeros((16,)), h @ p["u"]),
    "backwards": lambda p, h: lax.scan(lambda s, x: (s / 2 + x, s), jnp.zeros((16,)), h @ p["u"], reverse=True),
    "a softmax": lambda p, h: lax.fori_loop(0, 3, lambda i, h: jax.nn.softmax(h @ p["u"]) + h / 2, h),
    "inside another": lambda p, h: lax.fori_loop(
        0, 2, lambda i, h: lax.scan(lambda s, _: (jnp.tanh(s @ p["u"]), None), h, None, length=2)[0], h
    ),
    "what does not change": lambda p, h: lax.scan(
        lambda s, _: ((s[0], jnp.tanh(s[0] + s[1])), s[0].argmax(-1)), (h @ p["u"], h @ p["u"]), None, length=2
    ),
}


@pytest.mark.parametrize("name", OVER_TIME)
def test_loops_over_time_are_near_their_imitation(name):
    f, p = OVER_TIME[name], {"u": SQUARE, "w": TALL}
    program, imitated = built(f, p, H)
    for ours, theirs in zip(jax.tree.leaves(program(H)), jax.tree.leaves(imitated), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if jnp.issubdtype(ours.dtype, jnp.floating):
            assert np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()
        else:
            assert np.mean(np.asarray(ours != theirs)) < 0.1


def residual(h, layer):
    return h + 0.5 * jax.nn.gelu(h @ layer["w"]), h.mean(-1)


def normed(h, layer):
    h = h @ layer["w"]
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5) * layer["gain"], h


def nested(h, layer):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.max(-1)), h, jnp.stack([layer["w"], layer["w"].T]))


@pytest.mark.parametrize("step", [residual, normed, jax.checkpoint(residual)], ids=["residual", "normed", "remat"])
@pytest.mark.parametrize("reverse", [False, True])
def test_layers_in_a_scan_are_layers_written_out(step, reverse):
    params = {"w": LAYERS, "gain": 1 + normal(5, 1, 16, scale=0.2)}

    def scanned(p, h):
        return lax.scan(step, h, p, reverse=reverse)

    def written_out(layers, h):
        ys = {}
        for n in range(5)[:: -1 if reverse else 1]:
            h, ys[n] = step(h, layers[f"{n}"])
        return h, jnp.stack([ys[n] for n in range(5)])

    ours, _ = built(scanned, params, H)
    theirs, _ = built(written_out, {f"{n}": jax.tree.map(lambda a, n=n: a[n], params) for n in range(5)}, H)
    for a, b in zip(ours(H), theirs(H), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7 * np.abs(b).max())


def test_layers_may_be_counted_derived_and_nested():
    def counted(p, h):
        return lax.fori_loop(0, 5, lambda i, h: jnp.tanh(h @ p[i]), h)

    def whole(p, h):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p)[0]

    a, _ = built(counted, LAYERS, H)
    b, _ = built(whole, LAYERS, H)
    np.testing.assert_array_equal(a(H), b(H))

    def deep(p, h):
        return lax.scan(lambda h, ws: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws), h, p)[0]

    program, imitated = built(deep, LAYERS[:4].reshape(2, 2, 16, 16), H)
    assert np.abs(program(H) - imitated).max() < 0.05


def test_numbers_that_are_known_differ_from_one_iteration_to_the_next():
    place = normal(12, 1, 8)

    def f(p, x):
        return lax.scan(lambda s, x: (jnp.tanh(s @ p["u"] + (x[0] + x[1]) @ p["w"]), s), jnp.zeros((4, 16)), (x, place))

    program, imitated = built(lambda p, x: f(p, in_time(x @ p["e"])), {"e": jnp.eye(8), "u": SQUARE, "w": TALL}, XS)
    for ours, theirs in zip(program(XS), imitated, strict=True):
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_a_sum_over_a_long_time_has_room():
    """A thousand additions of the largest number that there may be: a bound found in fewer would wrap or saturate."""

    def f(p, x):
        return lax.scan(lambda s, x: (s + x, None), jnp.zeros((4,)), x @ p["w"])[0]

    x = jnp.ones((1000, 4))
    program, _ = built(f, {"w": jnp.eye(4)}, x)
    np.testing.assert_allclose(program(x), 1000.0, rtol=1e-6)
    np.testing.assert_allclose(program(-x), -1000.0, rtol=1e-6)


def test_a_large_state_that_grows_by_little_has_room():
    """A thousandth of what it begins with in each of four thousand iterations."""

    def f(p, x):
        start = 100 + x @ p["w"]
        return lax.fori_loop(0, 4000, lambda i, s: s + 0.05 * jax.nn.relu(start - 99), start)

    x = jnp.array([[1.0, 0.5, -0.5, 0.25]])
    program, _ = built(f, {"w": jnp.eye(4)}, x)
    np.testing.assert_allclose(program(x), f({"w": jnp.eye(4)}, x), rtol=1e-2)


def test_what_a_loop_does_not_touch_passes_through():
    """A float input that no range is known for."""

    def f(p, h, y):
        (y, h), _ = lax.scan(lambda s, _: ((s[0], jnp.tanh(s[1] @ p["u"])), None), (y, h), None, length=3)
        return h, y

    program, _ = built(f, {"u": SQUARE}, H, XS)
    np.testing.assert_array_equal(program(H, XS)[1], XS)


def test_a_moving_average_over_a_long_time_keeps_its_steps():
    """A bound that grew by as much in each iteration as in the first ones would leave an average five digits."""

    def f(p, x):
        sums = x @ p["w"]
        return lax.fori_loop(0, 20_000, lambda i, s: 0.9 * s + 0.1 * sums, jnp.zeros((2, 4))), sums

    average, sums = built(f, {"w": jnp.eye(4)}, normal(2, 4))[0](normal(2, 4))
    np.testing.assert_allclose(average, sums, atol=1e-6)  # float32, in which they leave, has steps of 1e-7


def test_what_is_handed_on_from_state_to_state_comes_round():
    def f(p, x):
        def step(s, x):
            return (s[1], s[2], s[3], x), s[0]

        zeros = (jnp.zeros((4,)),) * 4
        return lax.scan(step, zeros, x @ p["w"])

    x = normal(9, 4)
    program, imitated = built(f, {"w": jnp.eye(4)}, x)
    for ours, theirs in zip(jax.tree.leaves(program(x)), jax.tree.leaves(imitated), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("grows", [lambda h: 2 * h, lambda h: h * h + h])
def test_what_grows_too_fast_is_refused(grows):
    with pytest.raises(ValueError, match="scan at .*test_integer_loops.*may grow from .* in an iteration.*bound it"):
        built(lambda p, h: lax.fori_loop(0, 50, lambda i, h: grows(h), h @ p["u"]), {"u": SQUARE}, H)


def test_floats_that_a_loop_passes_on_are_refused():
    def f(p, h, y, x):
        return lax.scan(lambda s, x: ((jnp.tanh(s[0] @ p["u"]), x), s[1]), (h, y), x)

    ours, theirs = built(f, {"u": SQUARE}, H, XS[0], XS)[0](H, XS[0], XS), f({"u": SQUARE}, H, XS[0], XS)
    np.testing.assert_allclose(ours[0][1], theirs[0][1], atol=1e-5)  # in 24 bits
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)({"u": SQUARE}, [(H, XS[0], XS)])
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (H, XS[0], XS))
    with pytest.raises(ValueError, match="scan at .*passes a float input on"):
        jaxq.integer(f, plan)({"u": SQUARE}, *shapes)
