"""Which program to emit for a product of codes, on which platform: the table, and how it is read.

A product of int8 codes into int32 is the same number whatever program computes it, so each platform gets the program
that its compiler is fast at. `FORMS` is read from the top: the first form of the platform that suits the shapes is
emitted. A form may hand smaller products on (`then`), for which the table is read again. `lax.platform_dependent` makes
the choice when the program is lowered, so that one `jax.export` holds the right one for every platform it is made for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.decisions import table
from jaxq.lowering import channels_last, cudnn, depthwise, flipped, grouped, narrow, patches, rows, rowwise, transposed
from jaxq.programs.ops import Conv, Dot

Sums = Callable[[Any, jax.Array, jax.Array], jax.Array]

CPU, GPU, TPU = "cpu", "gpu", "tpu"
EVERYWHERE = (CPU, GPU, TPU)
# The other platforms (ROCm, Metal, ...) take the forms of a TPU: mostly XLA's own operation.


class Form(NamedTuple):
    """A way to write a product: for which operation, on which platforms, when, and why.

    suits: `(op, a, b) -> bool`, from shapes and explicit shardings; sums: `(op, a, b, then) -> int32 sums`.
    """

    op: type[Dot] | type[Conv]
    name: str
    platforms: tuple[str, ...]
    suits: Callable[[Any, Any, Any], bool]
    sums: Callable[[Any, jax.Array, jax.Array, Sums], jax.Array]
    why: str


def _always(op: Any, a: Any, b: Any) -> bool:
    del op, a, b
    return True


def _plain(op: Any, a: jax.Array, b: jax.Array, then: Sums) -> jax.Array:
    """Return XLA's own operation."""
    del then
    return op.apply(a, b, out_dtype=jnp.int32)


FORMS = (
    Form(Dot, "two rows", (CPU,), rows.suits, rows.product, "products with one row are loops without vectors"),
    Form(Dot, "flipped", (CPU,), flipped.suits, flipped.product, "a left operand summed over its first axis is slow"),
    Form(Dot, "rowwise", (GPU,), rowwise.suits, rowwise.product, "int8 tensor cores read along the sum"),
    Form(Dot, "dot", EVERYWHERE, _always, _plain, "vector instructions, tensor cores, the matrix unit"),
    Form(
        Conv, "phases", (CPU, GPU), transposed.suits, transposed.convolve, "most products of a dilated image are zero"
    ),
    Form(Conv, "patches", (CPU,), patches.suits, patches.convolve, "no vector kernel for few input channels"),
    Form(
        Conv, "shifted products", EVERYWHERE, depthwise.suits, depthwise.convolve, "one channel leaves nothing to sum"
    ),
    Form(Conv, "groups", (CPU, GPU), grouped.suits, grouped.convolve, "slow on a CPU, wrong in cuDNN (openxla 49123)"),
    Form(Conv, "channels last", (CPU,), channels_last.suits, channels_last.convolve, "the layout of the vector kernel"),
    Form(Conv, "filled up", (CPU,), narrow.suits, narrow.convolve, "no vector kernel for few channels on both sides"),
    Form(Conv, "float sums", (GPU,), _always, cudnn.convolve, "cuDNN gives out float32, exact below 2^24"),
    Form(Conv, "convolution", (CPU, TPU), _always, _plain, "vector instructions, the matrix unit"),
)


# Forms that are one program on every platform, as they hand nothing on.
LEAVES = {form for form in FORMS if form.sums in (_plain, depthwise.convolve)}


def choose(platform: str, op: Any, a: Any, b: Any) -> Form:
    """Return the form of a product on a platform; `a` and `b` need shapes only."""
    return next(f for f in FORMS if isinstance(op, f.op) and platform in f.platforms and f.suits(op, a, b))


def sums_on(platform: str, op: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the int32 sums of products of codes in the form of one platform. Runs anywhere; fast only there."""

    def then(op: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return sums_on(platform, op, a, b)

    return choose(platform, op, a, b).sums(op, a, b, then)


def sums(op: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the int32 sums of products of codes, in the form of the platform that the program is lowered for."""
    found = {choose(platform, op, a, b) for platform in EVERYWHERE}
    if len(found) == 1 and found <= LEAVES:
        return sums_on(TPU, op, a, b)
    return _by_platform(op, a, b)


@functools.partial(jax.jit, static_argnums=0)
def _by_platform(op: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sums in the form of each platform, of which lowering keeps one; traced once for its shapes."""

    def on(platform: str) -> Callable:
        return lambda a, b: sums_on(platform, op, a, b)

    cpu = {} if _same(op, a, b, CPU) else {"cpu": on(CPU)}
    gpu = {} if _same(op, a, b, GPU) else {"cuda": on(GPU)}
    return lax.platform_dependent(a, b, **cpu, **gpu, default=on(TPU))


def _same(op: Any, a: Any, b: Any, platform: str) -> bool:
    """Tell whether a platform's program is the default one."""
    form = choose(platform, op, a, b)
    return form in LEAVES and form == choose(TPU, op, a, b)


def describe() -> str:
    """Return the table as text, one form a line, in the order in which it is read."""
    rows = [(form.op.name, form.name, " ".join(form.platforms), form.why) for form in FORMS]
    return table.text([("operation", "form", "platforms", "because"), *rows])
