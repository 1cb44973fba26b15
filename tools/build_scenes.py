"""Build the emoji scenes: several drawings on a textured canvas, with boxes and texts.

python tools/build_emoji.py --data_dir data
python tools/build_scenes.py --data_dir data
"""

import argparse

import numpy as np
import tensorflow_datasets as tfds

from mmgem_jax.command_line import fail
from mmgem_jax.data import scenes
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder of the data sets, with the emoji")
    parser.add_argument("--config", default="things", help="things or fixture")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    return parser.parse_args()


def report(folder) -> None:
    """Print what the data set on disk holds."""
    builder = tfds.builder_from_directory(folder)
    backend = load_tokenizer(str(folder / "tokenizer")).backend_tokenizer
    decoders = {"image": tfds.decode.SkipDecoding()}
    for split, info in builder.info.splits.items():
        records = list(builder.as_data_source(split=split, decoders=decoders))
        size = sum(len(record["image"]) for record in records) / 1e6
        regions = sum(len(record["regions"]["text"]) for record in records)
        print(f"  {split}: {info.num_examples} scenes, {regions} objects, {size:.1f} MB of images")
        for field in ("sentence", "description"):
            texts = [record[field].decode() for record in records]
            tokens = [len(row.ids) for row in backend.encode_batch_fast(texts)]
            low, middle, high = np.percentile(tokens, [0, 50, 100])
            print(f"    {field}: {low:.0f} to {high:.0f} tokens, median {middle:.0f}")


def main() -> None:
    args = parse_arguments()
    built = scenes.data_folder(args.data_dir, args.config).exists()
    folder = scenes.build(args.data_dir, args.config, args.seed)
    print(f"{'already built' if built else 'built'}: {folder}")
    report(folder)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
