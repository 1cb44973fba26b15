"""Build the emoji data set: drawings of six vendors with names, and a tokenizer for them.

python tools/build_emoji.py --data_dir data --config things
"""

import argparse
from collections import Counter

import tensorflow_datasets as tfds

from mmgem_jax.command_line import fail
from mmgem_jax.data import emoji
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="root folder of the data sets")
    parser.add_argument("--config", default="things", help="things, all or fixture")
    parser.add_argument("--packages", help="local folder of the npm packages, instead of fetching")
    parser.add_argument("--vocab_size", type=int, default=2048, help="size of the tokenizer")
    return parser.parse_args()


def report(folder) -> None:
    """Print what the data set on disk holds."""
    builder = tfds.builder_from_directory(folder)
    decoders = {"image": tfds.decode.SkipDecoding()}
    for split, info in builder.info.splits.items():
        drawings = builder.as_data_source(split=split, decoders=decoders)
        vendors = Counter(drawing["vendor"].decode() for drawing in drawings)
        by_vendor = ", ".join(f"{vendor} {count}" for vendor, count in sorted(vendors.items()))
        print(f"  {split}: {info.num_examples} drawings ({by_vendor})")
    print(f"  held-out concepts: {len(builder.info.metadata['held_out'])}")
    print(f"  tokenizer: {len(load_tokenizer(str(folder / 'tokenizer')))} tokens")


def main() -> None:
    args = parse_arguments()
    folder = emoji.data_folder(args.data_dir, args.config)
    built = folder.exists()
    if not built:
        source = f"reading {args.packages}" if args.packages else "fetching nine npm packages"
        print(f"{source}, then drawing ...", flush=True)
    emoji.build(args.data_dir, args.config, args.packages, args.vocab_size)
    print(f"{'already built' if built else 'built'}: {folder}")
    report(folder)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
