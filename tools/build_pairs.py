"""Builds a TFDS data set from one's own images and captions.

    python tools/build_pairs.py --data_dir data --train train.jsonl --validation validation.jsonl

Every line of a file is {"image": PATH, "caption": TEXT}, paths relative to the file.
"""

import argparse

from mmgem_jax.command_line import fail
from mmgem_jax.data.pairs import build
from mmgem_jax.errors import UserError


def main():
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="folder of TFDS data sets")
    parser.add_argument("--train", required=True, help="JSON-lines file of the training pairs")
    parser.add_argument("--validation", help="JSON-lines file of held-out pairs")
    parser.add_argument("--vocab_size", type=int, help="also train a BPE of this size")
    args = parser.parse_args()
    splits = {"train": args.train, "validation": args.validation}
    try:
        folder = build(args.data_dir, {k: v for k, v in splits.items() if v}, args.vocab_size)
    except (UserError, OSError) as error:
        fail(error)
    print(f"built {folder}; train on it with --config.data.name=pairs")


if __name__ == "__main__":
    main()
