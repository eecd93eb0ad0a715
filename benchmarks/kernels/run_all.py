"""Runs every kernel benchmark on a device, each in a process of its own, and writes its record.

    python benchmarks/kernels/run_all.py --device cpu

Further options are handed on (--quick, --skip, --no-memory, --budget, --record FOLDER).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
OPS = (
    *("row_argmax", "jacobi_step", "gumbel_noise"),
    *("guess_window", "guess_candidates", "best_candidate", "guess_pool_add"),
    "draft_window",
    *("linear_argmax", "block_attention", "block_linear", "decoder_layer"),
    *("rms_norm", "linear_consistency_loss"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", default=",".join(OPS), help="a comma-separated list")
    options, rest = parser.parse_known_args()
    if "--record" not in rest:
        rest.append("--record")
    failed = []
    for op in options.ops.split(","):
        began = time.perf_counter()
        command = [sys.executable, str(FOLDER / f"{op}.py"), "--device", options.device, *rest]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(op)
        print(f"{op}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
