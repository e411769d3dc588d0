"""Strict settings for every test: no silent promotion of types or ranks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request):
    """Refuse implicit rank promotion, so that no test passes by broadcasting."""
    with jax.numpy_rank_promotion("raise"):
        yield
