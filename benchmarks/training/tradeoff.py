"""What does speed cost in quality? One training recipe under several teachers and AR weights.

    python benchmarks/training/tradeoff.py recipes/smollm2_cpu.yaml --work runs/tradeoff \
        --record cpu --plot docs/training_tradeoff_cpu.png -- --max-steps 30

Trains the recipe once for every teacher and AR weight (arguments behind ``--`` go to every
``cllm train``), then records and draws the evaluations as curves.py does. A run that has finished
is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent


def train(recipe: Path, folder: Path, teacher: str, weight: float, extra: list[str]) -> str | None:
    """One run; what went wrong, or None."""
    if (folder / "trainer_state.json").exists():
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "cllm.cli", "train", "--config", str(recipe)),
        *("--output", str(folder), "--teacher", teacher, "--ar-weight", str(weight), *extra),
    ]
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    return None if code == 0 else f"{folder.name} ended with exit code {code}; see {log}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--teachers", nargs="+", default=["self", "base"])
    parser.add_argument("--ar-weights", nargs="+", type=float, default=[1.0, 10.0, 100.0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options, extra = parser.parse_args(given[:split]), given[split + 1 :]

    runs = {
        f"{teacher}, AR {weight:g}": (options.work / f"{teacher}-{weight:g}", teacher, weight)
        for weight, teacher in product(options.ar_weights, options.teachers)
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda run: train(options.recipe, *run, extra), runs.values())
        failed = [message for message in found if message]
    if failed:
        raise SystemExit("\n".join(failed))
    command = [sys.executable, str(HERE / "curves.py"), "--name", "cllm_tradeoff"]
    for name, (folder, _, _) in runs.items():
        command += ["--run", f"{name}={folder}"]
    command += ["--record", options.record] if options.record else []
    command += ["--plot", str(options.plot)] if options.plot else []
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
