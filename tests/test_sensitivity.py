"""Sensitivity: each site by itself, against the same program with a plan that quantizes that site only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from zoo import model

SIZES = ((24, 32), (32, 32), (32, 8))


def network(params, x):
    for layer in ("a", "b"):
        x = jnp.tanh(x @ params[layer])
    return x @ params["c"]


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s) / 5, jnp.float32) for n, s in zip("abc", SIZES, strict=True)}
    batches = [jnp.asarray(rng.normal(size=(16, 24)), jnp.float32) for _ in range(2)]
    policy = {"b": jaxq.Scheme(weight=jaxq.int2(), act=jaxq.int8()), "c": jaxq.weight_only(), "*": jaxq.w8a8()}
    traces = []

    def counted(params, x):
        traces.append(1)
        return network(params, x)

    with jax.numpy_rank_promotion("raise"):
        plan = jaxq.make_plan(network, policy)(params, batches[0])
        traces.clear()
        found = jaxq.sensitivity(counted, plan, metric=_metric, progress=False)(params, batches)
    return params, batches, plan, found, len(traces)


def _metric(out, batch):
    return float(jnp.mean(out)) + float(batch[0, 0])


def _db(params, batches, policy):
    exact = [np.asarray(network(params, x), np.float64) for x in batches]
    rough = [np.asarray(jaxq.quantize(network, policy)(params, x), np.float64) for x in batches]
    noise = sum(np.sum((a - b) ** 2) for a, b in zip(exact, rough, strict=True))
    return 10 * np.log10(sum(np.sum(a**2) for a in exact) / noise)


def test_every_effect_is_that_of_a_plan_of_its_own(made):
    params, batches, plan, found, _ = made
    for name in "abc":
        scheme = plan[name].scheme
        others = {other: None for other in "abc" if other != name}
        assert found.sites[name].db == pytest.approx(_db(params, batches, {name: scheme, **others}), abs=0.05)
        weight_only = {name: jaxq.weight_only(scheme.weight), **others}
        assert found.weights[name].db == pytest.approx(_db(params, batches, weight_only), abs=0.05)
        if name in found.acts:
            act_only = {name: jaxq.Scheme(act=scheme.act), **others}
            assert found.acts[name].db == pytest.approx(_db(params, batches, act_only), abs=0.05)
    assert found.on.db == pytest.approx(_db(params, batches, plan), abs=0.05)
    assert np.isinf(found.off.db) and set(found.acts) == {"a", "b"}


def test_the_worst_come_first_and_the_program_is_traced_once(made):
    params, batches, plan, found, traces = made
    assert found.worst(1) == ["b"] and traces == 1
    errors = [effect.db for effect in found.sites.values()]
    assert errors == sorted(errors)
    outs = [network(params, x) for x in batches]
    mean = np.mean([_metric(out, x) for out, x in zip(outs, batches, strict=True)])
    assert found.off.metric == pytest.approx(mean, abs=1e-6)
    better = jaxq.revise(plan, dict.fromkeys(found.worst(1), jaxq.w8a8()))
    assert _db(params, batches, better) > found.on.db + 10


def test_it_prints(made):
    text = str(made[3])
    assert text.splitlines()[2].startswith("b ") and text.splitlines()[-1].startswith("all sites")


@pytest.mark.parametrize("name", ["scan_xs", "shard_map"])
def test_programs_with_programs_inside(name):
    entry = model(name)
    found = jaxq.sensitivity(entry.fn, jaxq.w8a8(), progress=False)(entry.params, [entry.args])
    assert 25 < found.on.db < min(effect.db for effect in found.sites.values()) + 0.5


def test_nothing_to_run_on_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        jaxq.sensitivity(network, progress=False)({}, [])
