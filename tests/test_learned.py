"""Learned quantizers: parameters are leaves of the plan, started from a weight, trained by its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import jaxq
from jaxq.numbers import clustering, learning
from jaxq.numbers.formats import Int
from jaxq.numbers.parameters import Parameters

pytestmark = pytest.mark.shared


def kmeans(size=4, **options):
    return jaxq.kmeans(size, calibrator=jaxq.learned(), **options)


def model(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x @ params["head"]


def weights(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {"layers": jax.random.normal(a, (3, 8, 8)), "head": jax.random.normal(b, (8, 2))}


POLICY = {"head": jaxq.Scheme(weight=kmeans(5), act=jaxq.int8()), "*": jaxq.weight_only(kmeans(4, group=4))}
X = jax.random.normal(jax.random.key(9), (6, 8))


@pytest.fixture(scope="module")
def plan():
    return jaxq.observe(model, POLICY)(weights(), X)[1]


def test_parameters_start_as_the_optimum_of_each_layer_and_block(plan):
    layers, head = plan.range("layers")[1], plan.range("head")[1]
    assert layers.value.shape == (3, 2, 8, 4) and layers.count.tolist() == [1, 1, 1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plan)} == {"float32"}
    for w, table in zip(weights()["layers"], layers.value, strict=True):
        want = np.sort(np.asarray(w).reshape(2, 4, 8).transpose(0, 2, 1), axis=-1)  # four centroids for four values
        np.testing.assert_allclose(table, want, rtol=1e-6)
    best = clustering.optimal(weights()["head"], 5)
    np.testing.assert_allclose(head.value.ravel(), best, rtol=1e-6)


def test_a_second_observation_changes_nothing_but_the_count(plan):
    again = jaxq.observe(model, plan, quantized=True)(weights(1), X)[1]
    for old, new in zip(plan.ranges, again.ranges, strict=True):
        np.testing.assert_array_equal(old[1].value, new[1].value)
        np.testing.assert_array_equal(old[1].count + 1, new[1].count)


def test_training_equals_serving_after_training_and_in_json(plan):
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(10 * leaf), plan)  # some centroids pass one another
    moved = jaxq.Plan.from_json(moved.to_json())
    converted = jaxq.convert(model, moved)(weights(), X)
    trained = jax.jit(jaxq.qat(model, moved))(weights(), X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(model, moved))(converted, X), trained)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(model, moved))(weights(), X), trained)
    head = np.sort(moved.range("head")[1].value.ravel())
    np.testing.assert_array_equal(np.unique(converted["head"].decode()), head)


def test_the_gradient_of_a_centroid_is_the_sum_over_its_cluster(plan):
    def loss(plan, params):
        return jnp.sum(jnp.sin(jaxq.qat(model, plan)(params, X)))

    by_plan, by_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(plan, weights())
    codes = jaxq.convert(model, plan)(weights(), X)["head"].codes
    want = [np.sum(np.asarray(by_params["head"], np.float64), where=np.asarray(codes) == j) for j in range(5)]
    np.testing.assert_allclose(by_plan.range("head")[1].value.ravel(), want, rtol=1e-5)
    assert float(by_plan.range("head")[1].count) == 0
    layers = np.asarray(by_params["layers"]).reshape(3, 2, 4, 8).transpose(0, 1, 3, 2)
    order = np.argsort(np.asarray(weights()["layers"]).reshape(3, 2, 4, 8).transpose(0, 1, 3, 2), axis=-1)
    sums = np.take_along_axis(layers, order, axis=-1)
    np.testing.assert_allclose(by_plan.range("layers")[1].value, sums, rtol=1e-5, atol=1e-7)


def test_forward_and_second_derivatives_by_the_plan(plan):
    def loss(value):
        (layers, head), (none, table) = plan.ranges
        moved = jaxq.Plan(plan.decisions, ((layers, head), (none, table._replace(value=value))))
        return jnp.sum(jaxq.qat(model, moved)(weights(), X) ** 2)

    value = plan.range("head")[1].value
    change = jnp.full_like(value, 0.5)
    # Dots of decoded float32: quadratic in the table as long as no assignment changes, but for rounding.
    slope = jax.jvp(loss, (value,), (change,))[1]
    np.testing.assert_allclose(slope, jnp.sum(jax.grad(loss)(value) * change), rtol=1e-4)
    bend = jax.jvp(jax.grad(loss), (value,), (change,))[1]
    step = 1e-2
    numeric = (jax.grad(loss)(value + step * change) - jax.grad(loss)(value - step * change)) / (2 * step)
    np.testing.assert_allclose(bend, numeric, rtol=2e-2, atol=1e-2)


def trained_together(plan, rate, count):
    """Return plan and weights after steps of Adam towards the float model's outputs, and the loss before each step."""
    target, optimizer = model(weights(), X), optax.adam(rate)

    def loss(pair):
        return jnp.mean((jaxq.qat(model, pair[0])(pair[1], X) - target) ** 2)

    @jax.jit
    def step(pair, state):
        value, gradient = jax.value_and_grad(loss)(pair)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(pair, updates), state, value

    pair, state, losses = (plan, weights()), optimizer.init((plan, weights())), []
    for _ in range(count):
        pair, state, value = step(pair, state)
        losses.append(float(value))
    return pair, losses


def test_training_plan_and_parameters_lowers_the_loss(plan):
    (plan, _), losses = trained_together(plan, 1e-2, 40)
    assert losses[-1] < 0.3 * losses[0]
    np.testing.assert_array_equal(plan.range("head")[1].count, 1)


def test_learned_codebooks_of_activations(plan):
    def f(params, x):
        return jnp.tanh(x) @ params["w"]

    params = {"w": weights()["head"]}
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=kmeans(8))
    plan = jaxq.calibrate(f, scheme, progress=False)(params, [X, 2 * X])
    np.testing.assert_allclose(plan.range("w")[0].value.ravel(), clustering.optimal(np.tanh(X), 8), rtol=1e-6)
    gradient = jax.grad(lambda plan: jnp.sum(jaxq.qat(f, plan)(params, X)))(plan).range("w")[0].value
    dequantized = jaxq.int8()(params["w"]).decode().sum(axis=1)
    np.testing.assert_allclose(gradient.sum(), len(X) * dequantized.sum(), rtol=1e-5)


def test_what_was_not_observed_is_named(plan):
    blank = jaxq.make_plan(model, POLICY)(weights(), X)
    for verb in (jaxq.qat, jaxq.quantize, jaxq.convert):
        with pytest.raises(ValueError, match=r"layers, head.*calibrate"):
            verb(model, blank)(weights(), X)
    broken = weights() | {"head": weights()["head"].at[0, 0].set(jnp.nan)}
    assert np.isnan(jaxq.qat(model, plan)(broken, X)).all()
    with pytest.raises(ValueError, match="layers has no observed range"):
        blank.check(observed=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jaxq.float8(calibrator=jaxq.learned()),
        lambda: jaxq.Quantizer(Int(8), group=32, scaling=jaxq.mxint8().scaling, calibrator=jaxq.learned()),
        lambda: jaxq.Scheme(act=kmeans(4, per_tensor=False)),
        lambda: jaxq.Scheme(act=kmeans(4, group=4)),
    ],
)
def test_what_cannot_be_learned_is_refused(make):
    with pytest.raises(ValueError, match="learned|groups|group"):
        make()


# --- steps ------------------------------------------------------------------------------------------------------------

# Where LSQ's estimate of the gradient of the squared error is zero, on N(0, 1): not where the error is least.
ROOTS = {(2, True): 1.0979, (3, True): 0.6109, (4, True): 0.3402, (5, True): 0.1891, (8, True): 0.03077}
ROOTS |= {(2, False): 1.3039, (3, False): 0.6623, (4, False): 0.3552, (5, False): 0.1935, (8, False): 0.03087}


@pytest.mark.parametrize("bits, full", ROOTS)
def test_steps_come_to_rest_where_lsq_does(bits, full):
    q = jaxq.Quantizer(Int(bits), per_tensor=True, narrow=not full, calibrator=jaxq.learned())
    x = jnp.asarray(special.ndtri((np.arange(10**6) + 0.5) / 10**6), jnp.float32)[None]

    def slope(step):
        parameters = Parameters(jnp.reshape(step, (1, 1)), jnp.float32(1))
        codes = learning.encode(q, x, (1, 1), parameters)
        return jnp.sum((codes.decode() - x) * learning.follow(q, x, codes, parameters, jnp.ones((1, 1))))

    assert slope(0.995 * ROOTS[bits, full]) < 0 < slope(1.005 * ROOTS[bits, full])


STEPS = {
    "signed": dict(format=Int(4)),
    "full range": dict(format=Int(3), narrow=False),
    "unsigned": dict(format=Int(4, signed=False)),
    "zero point": dict(format=Int(4, signed=False), symmetric=False),
    "power of two": dict(format=Int(4), power_of_two=True),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", STEPS)
def test_arrays_follow_their_steps_by_the_formula(name, sign):
    """Against the equations in float64 NumPy, for every channel, also where a step has become negative."""
    q = jaxq.Quantizer(**STEPS[name], calibrator=jaxq.learned())
    rng, (low, high) = np.random.default_rng(0), jaxq.Quantizer(**STEPS[name]).bounds()
    x, step = rng.normal(size=(40, 3)).astype(np.float32), np.array([[0.11, 0.2, 0.35]], np.float32)
    lowest = np.array([[-1.0, -0.75, -0.3]], np.float32)
    used = 2.0 ** np.ceil(np.log2(step)) if q.power_of_two else step.astype(np.float64)
    zero = 0 if q.symmetric else np.clip(np.round(low - lowest / used), low, high)
    codes = np.round(x / used) + zero
    inside, clipped = (codes >= low) & (codes <= high), np.clip(codes, low, high)
    base = zero if q.symmetric else low
    within = (x / used >= low - zero) & (x / used <= high - zero)
    by_step = np.where(within, clipped - zero - x / used, clipped - base) * (used / (sign * step))
    share = 1 / np.sqrt(40 * (high if q.symmetric else high - low))
    value = jnp.asarray(sign * step) if q.symmetric else (jnp.asarray(sign * step), jnp.asarray(lowest))
    parameters = Parameters(value, jnp.float32(1))
    got = learning.encode(q, jnp.asarray(x), (1, 3), parameters)
    np.testing.assert_array_equal(got.codes, clipped)
    np.testing.assert_allclose(got.scale, used, rtol=1e-6)
    ones, zeros = jnp.ones((1, 3)), jnp.zeros((1, 3))
    change = ones if q.symmetric else (ones, zeros)
    np.testing.assert_allclose(
        learning.follow(q, jnp.asarray(x), got, parameters, change), share * by_step, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(learning.passed(q, jnp.asarray(x), got, jnp.ones_like(x)), inside)
    if not q.symmetric:
        moved = learning.follow(q, jnp.asarray(x), got, parameters, (zeros, ones))
        np.testing.assert_allclose(moved, share * ~within, rtol=1e-6)


def test_steps_train_with_the_weights_and_serve_what_they_trained():
    """4-bit weights and activations, in a scan too; steps that a large rate throws below zero stay positive in use."""
    act = jaxq.Quantizer(Int(4), per_tensor=True, calibrator=jaxq.learned())
    policy = {
        "head": jaxq.Scheme(weight=jaxq.int4(calibrator=jaxq.learned()), act=jaxq.int8()),
        "*": jaxq.Scheme(weight=jaxq.int4(calibrator=jaxq.learned()), act=act),
    }
    plan = jaxq.calibrate(model, policy, progress=False)(weights(), [X, 2 * X])
    assert plan.range("layers")[1].value.shape == (3, 1, 8) and plan.range("layers")[0].value.shape == (3, 1, 1)
    (plan, params), losses = trained_together(plan, 3e-2, 60)
    assert min(losses) < 0.3 * losses[0]
    negative = jax.tree.map(lambda leaf: -leaf, plan.range("head")[1].value)
    (layers, head) = plan.ranges
    flipped = jaxq.Plan(plan.decisions, (layers, (head[0], head[1]._replace(value=negative))))
    trained = jax.jit(jaxq.qat(model, plan))(params, X)
    for same in (plan, flipped):
        converted = jaxq.convert(model, same)(params, X)
        np.testing.assert_array_equal(jax.jit(jaxq.quantize(model, same))(converted, X), trained)


@pytest.mark.parametrize("off", [1 / 8, 8])
def test_the_split_of_fixed_point_is_learned(off):
    """Where the point of a tensor's numbers is: one power of two, which training moves to where the error is least."""
    w = np.asarray(jax.random.normal(jax.random.key(0), (512, 1)))
    f, x = (lambda p, x: x @ p["w"]), jnp.eye(512)
    _, plan = jaxq.observe(f, jaxq.weight_only(jaxq.dynamic_fixed(4, calibrator=jaxq.learned())))({"w": w}, x)
    none, leaf = plan.range("w")
    plan = jaxq.Plan(plan.decisions, ((none, leaf._replace(value=off * leaf.value)),))
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(plan, state):
        gradient = jax.grad(lambda plan: jnp.sum(jnp.square(jaxq.qat(f, plan)({"w": w}, x) - w)))(plan)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(plan, updates), state

    state = optimizer.init(plan)
    for _ in range(200):
        plan, state = step(plan, state)

    def error(exponent):
        return np.square(2.0**exponent * np.clip(np.round(w / 2.0**exponent), -7, 7) - w).sum()

    best = min(range(-8, 4), key=error)
    scale = float(jaxq.convert(f, plan)({"w": w}, x)["w"].scale.squeeze())
    assert abs(np.log2(scale) - best) <= 1 and scale == 2.0 ** round(np.log2(scale))


def test_nan_shows_in_arrays_with_learned_steps():
    act = jaxq.int8(per_tensor=True, calibrator=jaxq.learned())
    f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    plan = jaxq.calibrate(f, jaxq.Scheme(weight=jaxq.int8(), act=act), progress=False)(params, [jnp.eye(4)])
    assert np.isnan(jaxq.qat(f, plan)(params, jnp.full((2, 4), jnp.nan))).all()
    assert np.isfinite(jaxq.qat(f, plan)(params, jnp.full((2, 4), 1e30))).all()


def test_a_weight_used_twice_has_codes_for_each_use():
    def f(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    _, plan = jaxq.observe(f, jaxq.weight_only(jaxq.int4(calibrator=jaxq.learned())))(params, X)
    first, second = plan.ranges
    plan = jaxq.Plan(plan.decisions, (first, (second[0], second[1]._replace(value=1.5 * second[1].value))))
    converted = jaxq.convert(f, plan)(params, X)
    trained = jax.jit(jaxq.qat(f, plan))(params, X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(f, plan))(converted, X), trained)


def test_centroids_that_have_passed_one_another_keep_their_gradients():
    f, params = (lambda p, x: x @ p["w"]), {"w": jnp.array([[1.0], [2.0], [9.0]])}
    _, plan = jaxq.observe(f, jaxq.weight_only(kmeans(2)))(params, jnp.ones((1, 3)))
    (none, table), = plan.ranges  # fmt: skip
    crossed = jaxq.Plan(plan.decisions, ((none, table._replace(value=table.value[..., ::-1])),))
    gradient = jax.grad(lambda plan: jaxq.qat(f, plan)(params, jnp.ones((1, 3))).sum())(crossed)
    assert gradient.range("w")[1].value.ravel().tolist() == [1.0, 2.0]


def test_learned_activations_fit_other_ranks():
    act = jaxq.Quantizer(Int(4), per_tensor=True, calibrator=jaxq.learned())
    f, params = (lambda p, x: x @ p["w"]), {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    _, plan = jaxq.observe(f, jaxq.Scheme(weight=jaxq.int8(), act=act))(params, X[None])
    flat, stacked = jaxq.qat(f, plan)(params, X), jaxq.qat(f, plan)(params, X[None])
    np.testing.assert_array_equal(flat, stacked[0])
    _, again = jaxq.observe(f, plan, quantized=True)(params, X)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, plan)


@pytest.mark.parametrize("loop", ["scan", "fori_loop"])
def test_steps_of_a_recurrent_state_do_not_start_from_its_zeros(loop):
    """A state starts as zeros, of which any step is the best; what it grows to has to fit."""
    w = jax.random.normal(jax.random.key(0), (8, 8))

    def cell(w, h, x):
        return jnp.tanh(jnp.dot(h, w) + x)

    def rnn(w, xs):
        h = jnp.zeros(xs.shape[1:])
        if loop == "scan":
            return jax.lax.scan(lambda h, x: (cell(w, h, x), None), h, xs)[0]
        return jax.lax.fori_loop(0, len(xs), lambda i, h: cell(w, h, xs[i]), h)

    xs = jax.random.normal(jax.random.key(1), (5, 4, 8))
    signed = jaxq.Quantizer(Int(8), per_tensor=True, calibrator=jaxq.learned())
    y, plan = jaxq.observe(rnn, {"*": jaxq.Scheme(weight=jaxq.int8(), act=signed)})(w, xs)
    error = jnp.linalg.norm(jaxq.qat(rnn, plan)(w, xs) - y) / jnp.linalg.norm(y)
    assert error < 0.03


def losses_of(loss, trained, rate, steps):
    """Return the losses of so many steps of Adam."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimizer.init(trained), []
    for _ in range(steps):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize(
    "weight",
    [jaxq.Quantizer(Int(4), calibrator=jaxq.learned()), jaxq.Quantizer(Int(8), calibrator=jaxq.learned()),
     jaxq.apot(4), jaxq.ttq()],
    ids=["4 bits", "8 bits", "apot", "ttq"],
)  # fmt: skip
def test_a_layer_of_zeros_is_zero_and_can_be_trained(weight):
    """As the last layer of a block, or an adapter, often starts: the loss falls by half at least.

    The steps, which stay, are for weights of the usual size, so that a few small updates change a code.
    """
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((32, 12), (12, 4)))
    target, w = x @ target / np.sqrt(12), jnp.zeros((12, 4))

    def f(w, x):
        return x @ w

    _, plan = jaxq.observe(f, jaxq.weight_only(weight))(w, x)
    np.testing.assert_array_equal(jaxq.qat(f, plan)(w, x), 0)
    losses = losses_of(lambda w: jnp.mean((jaxq.qat(f, plan)(w, x) - target) ** 2), w, rate=1e-2, steps=150)
    assert losses[-1] < 0.5 * losses[0]


KINDS = {
    "steps": dict(format=Int(4)),
    "zero point": dict(format=Int(4, signed=False), symmetric=False),
    "centroids": dict(format=jaxq.Codebook(4)),
    "levels": dict(format=jaxq.apot(5).format),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows_and_gives_way_to_what_is_seen_later(kind, bad):
    w, x = jnp.eye(4), jnp.arange(1.0, 9.0).reshape(2, 4)
    act = jaxq.Quantizer(**KINDS[kind], per_tensor=True, calibrator=jaxq.learned())
    f, policy, broken = (lambda w, x: x @ w), {"*": jaxq.Scheme(act=act)}, x.at[0, 0].set(bad)
    with pytest.raises(ValueError, match="batch 0 brings NaN or infinity to site"):
        jaxq.calibrate(f, policy, progress=False)(w, [broken])
    _, want = jaxq.observe(f, policy)(w, x)
    _, plan = jax.jit(jaxq.observe(f, jaxq.make_plan(f, policy)(w, x)))(w, broken)
    assert np.isnan(jaxq.qat(f, plan)(w, x)).all()
    np.testing.assert_array_equal(jaxq.observe(f, plan, quantized=True)(w, x)[0], jaxq.qat(f, want)(w, x))
    _, plan = jaxq.observe(f, plan)(w, x)
    jax.tree.map(np.testing.assert_array_equal, plan.ranges[0][0].value, want.ranges[0][0].value)
    _, plan = jaxq.observe(f, plan)(w, broken)  # what was learned stays
    jax.tree.map(np.testing.assert_array_equal, plan.ranges[0][0].value, want.ranges[0][0].value)


def test_what_is_not_finite_shows_in_one_iteration_of_a_loop():
    act = jaxq.Quantizer(Int(4), per_tensor=True, calibrator=jaxq.learned())
    xs = jnp.ones((3, 2, 4))

    def f(w, xs):
        return jax.lax.scan(lambda h, x: (h + x @ w, None), jnp.zeros((2, 4)), xs)[0]

    for number in range(3):
        with pytest.raises(ValueError, match="batch 0 brings NaN or infinity to site"):
            broken = xs.at[number, 0, 0].set(jnp.nan)
            jaxq.calibrate(f, {"*": jaxq.Scheme(act=act)}, progress=False)(jnp.eye(4), [broken])


STARTS = {"4 bits": jaxq.Quantizer(Int(4), calibrator=jaxq.learned()), "apot": jaxq.apot(4), "ttq": jaxq.ttq()}
STARTS |= {"power of two": jaxq.Quantizer(Int(4), power_of_two=True, calibrator=jaxq.learned())}


@pytest.mark.parametrize("name", STARTS)
def test_steps_of_zero_come_back(name):
    """Through a ReLU too, which lets no gradient of zeros through."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((32, 12), (12, 4)))
    target = jax.nn.relu(x @ w)

    def f(w, x):
        return jax.nn.relu(x @ w)

    def loss(plan):
        return jnp.mean((jaxq.qat(f, plan)(w, x) - target) ** 2)

    def started(value):
        (none, leaf), = plan.ranges  # fmt: skip
        values = jax.tree.map(lambda v: jnp.full_like(v, value), leaf.value)
        return jaxq.Plan(plan.decisions, ((none, leaf._replace(value=values)),))

    _, plan = jaxq.observe(f, jaxq.weight_only(STARTS[name]))(w, x)
    plan, tiny = started(0.0), started(2.0**-125)
    trained = jax.jit(jaxq.qat(f, plan))(w, x)
    np.testing.assert_allclose(trained, 0, atol=1e-30)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(f, plan))(jaxq.convert(f, plan)(w, x), x), trained)
    # What is below the least step in use is used as that.
    np.testing.assert_array_equal(*(jax.tree.leaves(jax.grad(loss)(p))[0] for p in (plan, tiny)))
    losses = losses_of(loss, plan, rate=3e-2, steps=60)
    assert losses[-1] < 0.4 * losses[0]


def branching(params, x):
    """Two branches, the second with a scan over layers that take either of two, and a loop that need not run."""

    def one(x):
        return x @ params["a"]

    def other(x):
        def layer(x, pair):
            number, w = pair
            return jax.lax.cond(number % 2 == 0, lambda x: x @ w, lambda x: x @ (2 * params["odd"]), x), None

        return jax.lax.scan(layer, x, (jnp.arange(3), params["layers"]))[0]

    x = jax.lax.cond(x[0, 0] > 100, one, other, x)
    return jax.lax.while_loop(lambda x: x[0, 0] > 100, lambda x: x @ params["loop"] / 2, x)


@pytest.mark.parametrize("watch", [lambda f: f, jax.jit], ids=["as it is", "compiled"])
@pytest.mark.parametrize("weight", [jaxq.int4(calibrator=jaxq.learned()), kmeans(3)], ids=["steps", "centroids"])
def test_weights_of_branches_that_do_not_run_are_started(weight, watch):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 4), "layers": (3, 4, 4), "odd": (4, 4), "loop": (4, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x, policy = jnp.ones((2, 4)), jaxq.weight_only(weight)
    blank = jaxq.make_plan(branching, policy)(params, x)
    plan = watch(jaxq.observe(branching, blank))(params, x)[1].check(observed=True)
    assert plan.range("layers")[1].count.tolist() == [1, 1, 1]
    sums = {"a": params["a"], "odd": 2 * params["odd"], "loop": params["loop"]}
    for name, w in sums.items():
        alone = jaxq.observe(lambda w, x: x @ w, policy)(w, x)[1].ranges[0][1]
        jax.tree.map(np.testing.assert_array_equal, plan.range(name)[1], alone)
    for start in (x, 101 * x):  # either branch
        trained = jax.jit(jaxq.qat(branching, plan))(params, start)
        converted = jaxq.convert(branching, plan)(params, start)
        np.testing.assert_array_equal(jax.jit(jaxq.quantize(branching, plan))(converted, start), trained)
        assert np.isfinite(trained).all()


def test_importance_is_that_of_weights_in_branches_too():
    params = {"a": jnp.array([[1.0], [2.0], [9.0]]), "b": jnp.array([[1.0], [2.0], [9.0]])}

    def f(params, x):
        return jax.lax.cond(x[0, 0] > 100, lambda x: x @ params["a"], lambda x: x @ params["b"], x)

    importance = {"a": jnp.array([[1.0], [0.0], [1.0]]), "b": jnp.array([[0.0], [1.0], [1.0]])}
    _, plan = jaxq.observe(f, jaxq.weight_only(kmeans(2)), importance=importance)(params, jnp.ones((1, 3)))
    assert plan.range("a")[1].value.ravel().tolist() == [1.0, 9.0]
    assert plan.range("b")[1].value.ravel().tolist() == [2.0, 9.0]


def test_activations_of_branches_that_did_not_run_are_named():
    def f(params, x):
        return jax.lax.cond(x[0, 0] > 100, lambda x: x @ params["a"], lambda x: x @ params["b"], x)

    params, x = {"a": jnp.eye(4), "b": jnp.eye(4)}, jnp.ones((2, 4))
    act = jaxq.Quantizer(Int(8), per_tensor=True, calibrator=jaxq.learned())
    _, plan = jaxq.observe(f, jaxq.Scheme(weight=jaxq.int8(), act=act))(params, x)
    with pytest.raises(ValueError, match=r"no data: a; run jaxq.calibrate.* with batches that reach a \(in a branch"):
        jaxq.qat(f, plan)(params, x)


@pytest.mark.parametrize("kind", ["vjp", "jvp"])
def test_plans_say_what_a_custom_derivative_does_without(kind):
    def inner(w, x):
        return x @ w

    inner = jax.custom_vjp(inner) if kind == "vjp" else jax.custom_jvp(inner)
    if kind == "vjp":
        inner.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))
    else:
        inner.defjvp(lambda p, t: (p[1] @ p[0], p[1] @ t[0] + t[1] @ p[0]))

    def f(params, x):
        return jax.checkpoint(inner)(params["a"], x) @ params["b"]

    params, x = {"a": jnp.eye(4), "b": jnp.eye(4)}, X[:, :4]
    weight = jaxq.int4(calibrator=jaxq.learned(), estimator=jaxq.EWGS())
    _, plan = jaxq.observe(f, jaxq.Scheme(weight=weight))(params, x)
    gradient = jax.grad(lambda plan: jnp.sum(jaxq.qat(f, plan)(params, x) ** 2))(plan)
    assert not np.any(gradient.range("a")[1].value) and np.any(gradient.range("b")[1].value)
    for same in (plan, jaxq.Plan.from_json(plan.to_json())):
        a, b = (line for line in str(same).splitlines() if line.startswith(("a ", "b ")))
        assert a.endswith("has a custom derivative, without learned() and estimator=") and "custom" not in b
    others = {
        "dkm()": jaxq.Scheme(jaxq.kmeans(4, fit=jaxq.dkm(0.1))),
        "grad=": jaxq.Scheme(jaxq.int8(), grad=jaxq.int8()),
    }
    for name, scheme in others.items():
        assert jaxq.make_plan(f, scheme)(params, x)["a"].unheeded == (name,)
    assert "custom" not in str(jaxq.make_plan(f, jaxq.w8a8())(params, x))


def test_zeros_alone_give_way_to_what_is_seen_later():
    def f(w, x):
        return x @ w

    w, x = jnp.eye(4), jnp.full((2, 4), 3.0)
    act = jaxq.Quantizer(Int(8), per_tensor=True, calibrator=jaxq.learned())
    policy = {"*": jaxq.Scheme(weight=jaxq.int8(), act=act)}
    _, plan = jaxq.observe(f, policy)(w, jnp.zeros((2, 4)))
    np.testing.assert_array_equal(jaxq.qat(f, plan)(w, jnp.zeros((2, 4))), 0)
    np.testing.assert_allclose(jaxq.observe(f, plan, quantized=True)(w, x)[0], x, rtol=1e-2)
    _, plan = jaxq.observe(f, plan)(w, x)
    np.testing.assert_allclose(jaxq.qat(f, plan)(w, x), x, rtol=1e-2)
    start = plan.range(plan.names[0])[0].value
    _, plan = jaxq.observe(f, plan)(w, 10 * x)
    np.testing.assert_array_equal(plan.range(plan.names[0])[0].value, start)
