"""Builds a TFDS data set of regions, regions/NAME, from published annotations and their images.

    python tools/build_regions.py --data_dir data --name vg --format visual-genome \\
        --annotations vg --images vg --test vg/annotations/test.json

Formats:
    visual-genome  a folder with region_descriptions.json and, if it is there, image_data.json
    refcoco        refs(unc).p or another beside its instances.json, whose splits are kept; or the
                   folder of the only one
    coco           a COCO-style file whose annotations have a bbox and a caption, such as GRiT's
                   train.json of Visual Genome

--validation, --test and --leave_out are files of image ids, one a line, or COCO-style JSON files of
images: what they name is not in the split train.
"""

import argparse
from pathlib import Path

from mmgem_jax.command_line import fail
from mmgem_jax.data.regions import build, read_splits
from mmgem_jax.errors import UserError


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", default="data", help="folder of TFDS data sets")
    add("--name", help="what to call the set; the format by default")
    add("--format", required=True, choices=("visual-genome", "refcoco", "coco"))
    add("--annotations", required=True, type=Path, help="file or folder")
    add("--images", required=True, type=Path, help="folder of the images")
    add("--splits", help="of the splits these alone, such as train,val")
    add("--validation", type=Path, help="ids of images that make up the split validation")
    add("--test", type=Path, help="ids of images that make up the split test")
    add("--leave_out", type=Path, help="ids of images for no split at all")
    add("--allow_missing", action="store_true", help="leave out missing and broken images")
    add("--vocab_size", type=int, help="also train a BPE of this size")
    return parser.parse_args()


def main():
    """Parses the command line, builds, and prints what was there, cut and left out."""
    args = parse_arguments()
    try:
        held_out = {"validation": args.validation, "test": args.test}
        held_out = {split: file for split, file in held_out.items() if file}
        splits = read_splits(args.format, args.annotations, args.images, held_out, args.leave_out)
        wanted = args.splits.split(",") if args.splits else list(splits)
        if unknown := sorted(set(wanted) - set(splits)):
            raise UserError(f"--splits: found {unknown}; expected some of {sorted(splits)}")
        splits = {split: splits[split] for split in wanted}
        name = args.name or args.format
        folder, counts = build(args.data_dir, name, splits, args.allow_missing, args.vocab_size)
    except (UserError, OSError) as error:
        fail(error)
    print(f"built {folder}; train on it with --config.data.name=regions/{name}")
    for split, count in counts.items():
        print(f"  {split}: {', '.join(f'{n:,} {what}' for what, n in count.items())}")


if __name__ == "__main__":
    main()
