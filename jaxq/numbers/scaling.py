"""How the scales of blocks are stored, where not as float32: exponents of two (MX), or float8 under a second scale."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Microscale:
    """One byte of exponent for a block: the largest power of two that fits (OCP Microscaling v1.0, section 6.3)."""

    def __str__(self) -> str:
        return "microscaled"


@dataclasses.dataclass(frozen=True)
class Nested:
    """One float8 (e4m3) for a block, and one float32 for the tensor (NVFP4)."""

    def __str__(self) -> str:
        return "with float8 scales"


Scaling = Microscale | Nested
