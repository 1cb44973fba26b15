"""Runs a config several times with different fields and seeds; prints a table of the results.

    python tools/sweep.py --config configs/emoji.py --workdir workdirs/objectives \
        --run "joint" --run "embedding only: loss.generation_weight=0" --seeds 0,1,2

A run is a name, and after a colon the fields it overrides. A run whose folder has a results.json is
not run again. The table shows mean and, with several seeds, standard deviation.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from mmgem_jax.command_line import fail
from mmgem_jax.evaluation.suite import COLUMNS


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="config file of every run")
    parser.add_argument("--workdir", required=True, help="folder of the runs' folders")
    parser.add_argument("--run", action="append", required=True, help="NAME[: FIELD=VALUE ...]")
    parser.add_argument("--seeds", default="0", help="seeds of each run, with commas")
    parser.add_argument("--splits", default="test", help="splits of the table, with commas")
    return parser.parse_args()


def train(config, workdir, overrides, seed):
    """Trains one run in a process of its own; returns its results.json."""
    command = [sys.executable, "-m", "mmgem_jax.train", "--config", config]
    command += ["--workdir", str(workdir), f"--config.seed={seed}"]
    command += [f"--config.{override}" for override in overrides]
    path = workdir / "results.json"
    if not path.exists():
        print("$", *command, flush=True)
        if subprocess.run(command).returncode:
            fail(f"--run: the run in {workdir} failed; expected exit status 0")
    return json.loads(path.read_text())


def cell(values):
    """Mean and spread of a metric over the seeds."""
    if None in values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def main():
    """Trains every run with every seed and prints the table as Markdown."""
    args = parse_arguments()
    splits, table = args.splits.split(","), []
    for text in args.run:
        name, _, overrides = text.partition(":")
        folder = re.sub(r"\W+", "_", name.strip())
        results = [
            train(args.config, Path(args.workdir) / f"{folder}-{seed}", overrides.split(), seed)
            for seed in args.seeds.split(",")
        ]
        for split in splits:
            if split not in results[0]["splits"]:
                fail(f"--splits: no split {split!r}; there are {list(results[0]['splits'])}")
            metrics = [result["splits"][split]["metrics"] for result in results]
            cells = [cell([m.get(key) for m in metrics]) for _, key in COLUMNS]
            table.append([name.strip(), split, *cells])
    header = ["run", "split", *(head for head, _ in COLUMNS)]
    for row in [header, ["---"] * len(header), *table]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
