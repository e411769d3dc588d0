"""What a site costs, in float and as decided: multiplications, bit operations, bytes, energy.

    MACs = runs * terms * outputs            BOPs = MACs * bits of one operand * bits of the other

BOPs go by the width of the numbers, energy by how they are multiplied: codes that have no integer kernel are decoded,
and their products are those of floats. Weights are read from DRAM once per run, packed as they are held, a lookup only
the rows it takes; activations pass through SRAM once, in at the width of their codes, out at the width of the result.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxq.decisions.decision import Decision
from jaxq.numbers.formats import bits_each
from jaxq.programs.sites import Operand, Site
from jaxq.report.energy import DRAM_BIT, SRAM_BIT, Energy, float_mac, integer_mac


class Both(NamedTuple):
    """A number of the float program and of the quantized one."""

    float: Any
    quantized: Any

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized one is; NaN of nothing."""
        return self.float / self.quantized if self.quantized else math.nan


class Cost(NamedTuple):
    """Of one call: MACs; BOPs; bytes of weights held; energy."""

    macs: int
    bops: Both
    bytes: Both
    energy: Both


def cost_of(decision: Decision, runs: float, bytes_held: Both) -> Cost:
    """Return what one call costs at a site that runs `runs` times, all layers of a scan together."""
    site = decision.site
    macs = round(runs * site.terms * math.prod(site.out_shape))
    plain, coded = [_dtype_bits(o) for o in site.operands], _bits(decision)
    passes = runs / math.prod(site.stack)
    energies = (
        _energy(site, macs * float_mac(max(plain)), bytes_held.float * passes, (runs, plain)),
        _energy(site, macs * _mac(decision), bytes_held.quantized * passes, (runs, coded)),
    )
    return Cost(macs, Both(macs * _product(plain), macs * _product(coded)), bytes_held, Both(*energies))


def _product(bits: Sequence[float]) -> float:
    return bits[0] * bits[1] if len(bits) == 2 else 0


def _dtype_bits(operand: Operand) -> int:
    return 8 * jnp.dtype(operand.dtype).itemsize


def _bits(decision: Decision) -> list[float]:
    """Return the width of every operand's numbers as decided."""
    pairs = zip(decision.quantizers, decision.site.operands, strict=True)
    return [_dtype_bits(operand) if q is None else bits_each(q.format) for q, operand in pairs]


def _mac(decision: Decision) -> float:
    if decision.is_integer:
        return integer_mac(*_bits(decision))
    return float_mac(max(_dtype_bits(operand) for operand in decision.site.operands))


def _energy(site: Site, compute: float, weight_bytes: float, moved: tuple[float, Sequence[float]]) -> Energy:
    runs, bits = moved
    if site.op == "embedding":
        weight_bytes *= math.prod(site.out_shape) / max(1, math.prod(site.weight.shape)) if site.weight else 1
    operands = [math.prod(o.shape) * b for o, b in zip(site.operands, bits, strict=True) if o.role == "act"]
    out = math.prod(site.out_shape) * 8 * jnp.dtype(site.out_dtype).itemsize
    return Energy(compute, 8 * weight_bytes * DRAM_BIT, runs * (sum(operands) + out) * SRAM_BIT)
