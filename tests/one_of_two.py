"""What each of two processes does for tests/test_many_hosts.py: several runs, one after the other.

python tests/one_of_two.py JOBS.json FOLDER --coordinator HOST:PORT --process_id I --process_count N
"""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "configs")]


def tool(name):
    """A module of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    """Trains every config of the jobs, then evaluates, noting the images that it opens."""
    from mmgem_jax import processes

    parser = argparse.ArgumentParser()
    parser.add_argument("jobs")
    parser.add_argument("folder")
    processes.add_arguments(parser)
    args = parser.parse_args()
    flags.FLAGS(sys.argv[:1])
    where = args.coordinator, args.process_id, args.process_count
    with processes.joined(*where, heeds_sigterm=True):
        import emoji_fixture

        from mmgem_jax import train
        from mmgem_jax.evaluation.examples import Dataset

        jobs = json.loads(Path(args.jobs).read_text())
        for workdir, changes in jobs["train"].items():
            config = emoji_fixture.get_config()
            config.update_from_flattened_dict(
                {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
            )
            train.train(config, workdir)

        opened, pixels = [], Dataset.pixels

        def counted(dataset, index, size):
            opened.append(int(index))
            return pixels(dataset, index, size)

        Dataset.pixels = counted
        evaluate = tool("evaluate")
        sys.argv = ["evaluate.py", *shlex.split(jobs["evaluate"])]
        evaluate.evaluate(evaluate.parse_arguments())
        path = Path(args.folder) / f"opened.{args.process_id}"
        path.write_text(json.dumps(sorted(opened)))


if __name__ == "__main__":
    main()
