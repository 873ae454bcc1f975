"""What benchmarks of speed share: machines are noisy, so they compare within one run and say where it ran."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench_dfusion.results import records
from bench_dfusion.util import files

RESULTS = Path(__file__).parent / "results"


def write(name: str, result: dict[str, Any], out: Path | None) -> None:
    """Print the result and write it as JSON, with the command, hardware and versions (default: results/NAME.json)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    where = {"hardware": f"{records.hardware()}, {device}", "versions": records.versions()}
    path = out or RESULTS / f"{name}.json"
    files.write_json(
        path, {"command": f"python benchmarks/{name}.py {' '.join(sys.argv[1:])}".strip(), **result, **where}
    )
    print(json.dumps(result, indent=1))
    print(path)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {k: round(f(values), 3) for k, f in (("median", statistics.median), ("min", min), ("max", max))}
