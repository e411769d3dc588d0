"""`ragged_dot`: rows of lhs [m, k] come in runs, and run g is multiplied by rhs[g] [k, n] (mixture of experts)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from jax import lax

from jaxq.programs import jaxpr


@dataclasses.dataclass(frozen=True)
class RaggedDot:
    """A grouped matrix product; `numbers` are JAX's `RaggedDotDimensionNumbers`."""

    numbers: Any
    precision: Any
    out_dtype: Any

    name: ClassVar[str] = "ragged_dot"
    operands: ClassVar[int] = 2

    @staticmethod
    def read(eqn: jaxpr.Eqn) -> "RaggedDot":
        p = eqn.params
        return RaggedDot(p["ragged_dot_dimension_numbers"], p["precision"], eqn.outvars[0].aval.dtype)

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of each operand that are summed over."""
        (lhs, rhs), _ = self.numbers.dot_dimension_numbers
        return tuple(lhs), tuple(rhs)

    @property
    def is_rows_by_experts(self) -> bool:
        """Whether this is the forward form [m, k] x [g, k, n] with runs along m, the one that has an integer kernel."""
        (lhs, rhs), batch = self.numbers.dot_dimension_numbers
        form = (tuple(lhs), tuple(rhs), *(tuple(b) for b in batch))
        runs = tuple(self.numbers.lhs_ragged_dimensions), tuple(self.numbers.rhs_group_dimensions)
        return form == ((1,), (1,), (), ()) and runs == ((0,), (0,))

    def terms(self, shapes) -> int:
        """Return how many products are summed into one output element."""
        return math.prod(shapes[0][axis] for axis in self.contracted[0])

    def reuse(self, shapes, out_shape) -> tuple[int, int]:
        """Return for each operand how many products one of its elements takes part in, at most."""
        del out_shape
        return shapes[1][-1], shapes[0][0]

    def apply(self, lhs: jax.Array, rhs: jax.Array, *rest, out_dtype=None) -> jax.Array:
        """Run the product on plain arrays; `rest` is the group sizes [g]."""
        return lax.ragged_dot_general(
            lhs,
            rhs,
            rest[0],
            self.numbers,
            precision=self.precision,
            preferred_element_type=out_dtype or self.out_dtype,
        )
