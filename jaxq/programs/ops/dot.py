"""`dot_general`: out[b, m, n] = sum_k lhs[b, m, k] rhs[b, k, n], with any number of axes in the place of each index."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from jax import lax

from jaxq.numbers.blocks import spread_axes
from jaxq.programs import jaxpr


@dataclasses.dataclass(frozen=True)
class Dot:
    """A matrix product; `contract` and `batch` are the axes of (lhs, rhs)."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    precision: Any
    out_dtype: Any
    out_sharding: Any

    name: ClassVar[str] = "dot_general"
    operands: ClassVar[int] = 2

    @staticmethod
    def read(eqn: jaxpr.Eqn) -> "Dot":
        contract, batch = eqn.params["dimension_numbers"]
        out = eqn.outvars[0].aval.dtype
        return Dot(_pair(contract), _pair(batch), eqn.params["precision"], out, eqn.params.get("out_sharding"))

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of each operand that are summed over: they cannot carry a scale."""
        return self.contract

    def terms(self, shapes) -> int:
        """Return how many products are summed into one output element."""
        return math.prod(shapes[0][axis] for axis in self.contract[0])

    def reuse(self, shapes, out_shape) -> tuple[int, int]:
        """Return for each operand how many products one of its elements takes part in: what its gradient sums."""
        del out_shape
        left, right = (math.prod(shapes[side][a] for a in self.free(side, len(shapes[side]))) for side in (0, 1))
        return right, left

    def free(self, side: int, rank: int) -> list[int]:
        """Return the axes of an operand that appear in the output, batch axes excluded, in output order."""
        return [a for a in range(rank) if a not in self.contract[side] and a not in self.batch[side]]

    def is_spread(self, lhs: Any, rhs: Any) -> bool:
        """Tell whether operands or output are known to be spread over devices, by explicit sharding."""
        return self.out_sharding is not None or any(any(spread_axes(x)) for x in (lhs, rhs))

    def apply(self, lhs: jax.Array, rhs: jax.Array, *rest, out_dtype=None) -> jax.Array:
        """Run the product on plain arrays."""
        del rest
        numbers = (self.contract, self.batch)
        return lax.dot_general(
            lhs, rhs, numbers, self.precision, out_dtype or self.out_dtype, out_sharding=self.out_sharding
        )


def _pair(axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(int(a) for a in axes[0]), tuple(int(a) for a in axes[1])
