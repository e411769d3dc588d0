"""Small models for the laws: every way in which a program may hold a matmul, a convolution or an embedding lookup.

Built on first use and kept: `model("mlp")` builds one, `zoo()` all of them, `NAMES` none.
"""

import functools

from . import attention, control, conv, dense
from .entry import Model as Model

_BUILDERS = {
    build.__name__: build for build in (*dense.BUILDERS, *conv.BUILDERS, *attention.BUILDERS, *control.BUILDERS)
}
NAMES: tuple[str, ...] = tuple(_BUILDERS)


@functools.cache
def model(name: str) -> Model:
    """Build the model of this name, once."""
    return _BUILDERS[name]()


def zoo() -> tuple[Model, ...]:
    """Build all models, in the order of NAMES."""
    return tuple(model(name) for name in NAMES)
