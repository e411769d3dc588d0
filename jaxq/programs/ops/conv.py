"""`conv_general_dilated`: any number of spatial axes, any layout, strides, dilations, feature groups."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax import lax

from jaxq.programs import jaxpr


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution; specs are JAX's: (batch, feature, *spatial), (out, in, *spatial), (batch, feature, *spatial)."""

    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    precision: Any
    out_dtype: Any

    name: ClassVar[str] = "conv_general_dilated"
    operands: ClassVar[int] = 2

    @staticmethod
    def read(eqn: jaxpr.Eqn) -> "Conv":
        p, numbers = eqn.params, eqn.params["dimension_numbers"]
        return Conv(
            tuple(numbers.lhs_spec),
            tuple(numbers.rhs_spec),
            tuple(numbers.out_spec),
            tuple(p["window_strides"]),
            tuple((int(low), int(high)) for low, high in p["padding"]),
            tuple(p["lhs_dilation"]),
            tuple(p["rhs_dilation"]),
            p["feature_group_count"],
            p["batch_group_count"],
            p["precision"],
            eqn.outvars[0].aval.dtype,
        )

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All axes but the batch of the images and the output features of the kernel; input features, as last ones,
        are what groups run along."""
        (_, image, *area), (_, kernel, *window) = self.lhs_spec, self.rhs_spec
        return (*sorted(area), image), (*sorted(window), kernel)

    def terms(self, shapes) -> int:
        """Return how many products are summed into one output element."""
        return math.prod(shapes[1][axis] for axis in self.rhs_spec[1:])

    def reuse(self, shapes, out_shape) -> tuple[int, int]:
        """Return for each operand how many products one of its elements takes part in, at most."""
        out, _, *window = self.rhs_spec
        of_image = math.prod(shapes[1][axis] for axis in (out, *window)) // self.feature_groups
        return of_image, math.prod(out_shape[axis] for axis in (self.out_spec[0], *self.out_spec[2:]))

    def has_sizes(self, image: Sequence[Any], kernel: Sequence[Any]) -> bool:
        """Tell whether sizes are known and none is zero; that of the batch may be a symbol."""
        sizes = [n for axis, n in enumerate(image) if axis != self.lhs_spec[0]]
        return all(isinstance(n, int) for n in sizes) and 0 not in (*sizes, *kernel)

    def laid_out(self, out: jax.Array) -> jax.Array:
        """Return an output [batch, *space, channels] in the layout of this convolution."""
        batch, feature, *space = self.out_spec
        order = (batch, *space, feature)
        return lax.transpose(out, [order.index(axis) for axis in range(out.ndim)])

    def apply(self, lhs: jax.Array, rhs: jax.Array, *rest, out_dtype=None) -> jax.Array:
        """Run the convolution on plain arrays."""
        del rest
        return lax.conv_general_dilated(
            lhs,
            rhs,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            lax.ConvDimensionNumbers(self.lhs_spec, self.rhs_spec, self.out_spec),
            feature_group_count=self.feature_groups,
            batch_group_count=self.batch_groups,
            precision=self.precision,
            preferred_element_type=out_dtype or self.out_dtype,
        )
