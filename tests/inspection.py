"""What tests look at in programs and trees."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.programs import jaxpr


def emitted(body: jaxpr.Body):
    """Yield every equation of a program and its sub-programs; of what differs by platform, this one's form only."""
    for eqn in body.jaxpr.eqns:
        yield eqn
        held = eqn.params.values()
        if platforms := eqn.params.get("branches_platforms"):
            fits = [names is None or jax.default_backend() in names for names in platforms]
            held = [eqn.params["branches"][fits.index(True)]]
        programs = {id(inner.jaxpr): inner for inner in map(jaxpr.as_body, jaxpr.programs_in(held))}
        for inner in programs.values():
            yield from emitted(inner)


def traced(fn, *args) -> jaxpr.Body:
    """Return the program of `fn`."""
    return jaxpr.as_body(jax.make_jaxpr(fn)(*args))


def products(fn, *args) -> list[tuple[str, ...]]:
    """Return the operand dtypes of every matmul and convolution in the jaxpr of `fn`, sub-programs included."""
    eqns = [eqn for eqn in emitted(traced(fn, *args)) if jaxpr.is_site_primitive(eqn)]
    return [tuple(str(v.aval.dtype) for v in eqn.invars[:2]) for eqn in eqns]


def convolutions(fn, *args) -> list:
    """Return the parameters and the kernel's shape of every convolution in the jaxpr of `fn`."""
    return [
        (e.params, e.invars[1].aval.shape) for e in jaxpr.all_equations(traced(fn, *args)) if e.primitive is jaxpr.CONV
    ]


def is_depthwise(params, kernel) -> bool:
    """Tell whether a convolution gives every output channel one input channel."""
    return params["feature_group_count"] > 1 and kernel[params["dimension_numbers"].rhs_spec[1]] == 1


def pieces(params, kernel) -> int:
    """Return how many products of matrices a convolution is in integers: one for each group and phase, if not none."""
    if is_depthwise(params, kernel):
        return 0
    return params["feature_group_count"] * math.prod(params["lhs_dilation"])


def short_products(fn, *args) -> int:
    """Return how many elementwise products of 16-bit integers there are in the jaxpr of `fn`."""
    eqns = emitted(traced(fn, *args))
    names = [(eqn.primitive.name, eqn.outvars[0].aval) for eqn in eqns if eqn.outvars]
    return sum(name == "mul" and aval.dtype == jnp.int16 for name, aval in names)


def arrays(tree) -> list[np.ndarray]:
    """Return the array leaves of a tree as NumPy arrays, random keys as their data."""

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(plain(x)) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


def assert_bitwise(a, b) -> None:
    """Assert that two trees hold the same bits."""
    xs, ys = arrays(a), arrays(b)
    assert len(xs) == len(ys) > 0
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def cosine(a, b) -> float:
    """Return the cosine between two trees of gradients, float64."""
    x = np.concatenate([v.astype(np.float64).ravel() for v in arrays(a)])
    y = np.concatenate([v.astype(np.float64).ravel() for v in arrays(b)])
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))
