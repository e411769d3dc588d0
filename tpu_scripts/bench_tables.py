"""Tables of measurements: ratios first, with device and versions, as Markdown and JSON."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

import timing

PACKAGES = ("jax", "jaxlib", "numpy", "jaxq", "qwix", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """What to run and how long."""

    models: Sequence[str]
    rounds: int
    block: int
    peers: bool


@dataclass(frozen=True)
class Row:
    """One variant of one model, against its reference."""

    model: str
    variant: str
    ratio: timing.Ratio
    amount: float
    reference_amount: float


@dataclass(frozen=True)
class Table:
    """Rows that share a title and a meaning of `ratio`."""

    title: str
    ratio: str
    reference: str
    rows: list[Row]
    unit: str = "ms"


def speed_up(model: str, variant: str, blocks: timing.Blocks, reference: str = "float32") -> Row:
    """Compare with the reference: how many times as fast."""
    ratio = timing.ratio(blocks, reference, variant)
    return Row(model, variant, ratio, timing.milliseconds(blocks, variant), timing.milliseconds(blocks, reference))


def relative_time(model: str, variant: str, blocks: timing.Blocks, reference: str) -> Row:
    """Compare with the reference: which part of its time."""
    ratio = timing.ratio(blocks, variant, reference)
    return Row(model, variant, ratio, timing.milliseconds(blocks, variant), timing.milliseconds(blocks, reference))


def relative_size(model: str, variant: str, size: float, reference: float) -> Row:
    """Compare sizes in bytes: which part of the reference's; told in MiB."""
    ratio = size / reference
    return Row(model, variant, timing.Ratio(ratio, ratio, ratio), size / 2**20, reference / 2**20)


def processor() -> str:
    """Return the name of the CPU, or of its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def surroundings() -> dict[str, str]:
    """Return device and versions."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "host": f"{processor()}, {cores} cores",
        "python": platform.python_version(),
        **versions,
    }


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(table: Table) -> str:
    """Print a table, ratios first."""
    lines = [
        f"## {table.title}",
        "",
        f"Ratio: {table.ratio}; median of block pairs, quartiles in brackets.",
        "",
        f"| ratio | quartiles | model | variant | {table.unit} | {table.reference}, {table.unit} |",
        "|---:|:---:|---|---|---:|---:|",
    ]
    for row in table.rows:
        median, low, high = row.ratio
        amounts = f"{row.amount:.2f} | {row.reference_amount:.2f}"
        lines.append(f"| **{median:.2f}** | [{low:.2f}, {high:.2f}] | {row.model} | {row.variant} | {amounts} |")
    return "\n".join(lines) + "\n"


def heading(facts: dict[str, str]) -> str:
    """Print device and versions."""
    return "\n".join(f"* {name}: {value}" for name, value in facts.items()) + "\n"
