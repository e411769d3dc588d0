"""Whole programs in integers: the same integers as NumPy int64, no float inside, and no silence about what is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from random_nets import POLICIES, Judge, drawn


def calibrated(f, params, *batches, policy=POLICIES[1]):
    return jaxq.calibrate(f, policy, progress=False)(params, batches)


def judged(net, policy):
    """Assert that a net in integers is what int64 NumPy says, on data that saturates its ranges."""
    plan = calibrated(net, net.params, net.x, policy=policy)
    qparams = jaxq.convert(net, plan)(net.params, net.x)
    x = net.x * 1.5
    np.testing.assert_array_equal(jaxq.integer(net, plan)(qparams, x)(x), Judge(net, plan, qparams)(x))


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_give_the_integers_of_numpy(seed):
    judged(drawn(seed), POLICIES[seed % len(POLICIES)])


@pytest.mark.long
def test_many_random_programs_give_the_integers_of_numpy():
    for seed in range(6, 206):
        judged(drawn(seed), POLICIES[seed % len(POLICIES)])
