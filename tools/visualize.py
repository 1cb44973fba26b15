"""Pictures of what a trained run, or two, make of the regions of an image.

    python tools/visualize.py regions --checkpoint workdirs/stage1 --checkpoint workdirs/stage2 \
        --image photo.jpg --box 0.1,0.2,0.5,0.9 --box 0.5,0.1,1,0.6 --out regions.png
    python tools/visualize.py similarity --checkpoint workdirs/stage2 --image photo.jpg \
        --text "red apple" --text "green apple" --out similarity.png --json similarity.json
    python tools/visualize.py regions --checkpoint workdirs/stage2 --dataset emoji_scenes \
        --data data --split test --examples 4 --out regions.png

Boxes are x0,y0,x1,y1: shares of the whole image, from its top left corner.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from absl import logging

from mmgem_jax import run_folder, sharding, trained_run
from mmgem_jax.command_line import fail
from mmgem_jax.data import images
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import results
from mmgem_jax.evaluation.datasets import open_dataset
from mmgem_jax.evaluation.drawing import FORMATS, save_sheet
from mmgem_jax.evaluation.evaluate_run import make_predictor
from mmgem_jax.evaluation.examples import Dataset, Images, Regions
from mmgem_jax.evaluation.region_pictures import RegionExample, draw_regions
from mmgem_jax.evaluation.similarity_pictures import (
    SimilarityExample,
    draw_similarity,
    numbers,
    similarity_maps,
)
from mmgem_jax.evaluation.tasks import Asked, predict
from mmgem_jax.generate import Decoding
from mmgem_jax.models.pooling import WHOLE_IMAGE, check_boxes

LEAST_BATCH = 16  # few images and boxes are looked at, and a batch is filled up


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True, metavar="regions|similarity")
    regions = commands.add_parser("regions", help="boxes, and the captions of each")
    similarity = commands.add_parser("similarity", help="heat maps of texts")
    parser.error = regions.error = similarity.error = fail  # one line, without the usage
    for command in (regions, similarity):
        add = command.add_argument
        add("--checkpoint", action="append", required=True, help="of one run, or twice of two")
        add("--names", nargs="+", metavar="NAME", help="of the checkpoints, in the picture")
        add("--out", required=True, metavar="FILE.png", help="or .webp, .jpg")
        add("--image", metavar="FILE", help="an image file; or --dataset")
        add("--dataset", help="name of a data set with regions, as of tools/evaluate.py")
        add("--data", help="file or folder of the data set")
        add("--split", default="", help="split of the data set; its protocol's by default")
        add("--examples", type=int, default=4, help="images of it at most, evenly spaced")
        add("--keys", nargs="+", metavar="KEY", help="images of it, by their keys")
        add("--most", type=int, default=6, help="regions of an image of it, the first so many")
        add("--image_size", type=int, help="pixels a side; the run's own by default")
        add("--mesh", default="", help="AXIS=SIZE with commas; the run's own by default")
        box = "x0,y0,x1,y1, shares of the --image; repeatable"
        add("--box", action="append", default=[], help=box)
    add = similarity.add_argument
    add("--text", action="append", default=[], help="repeatable; with a --box each, or none")
    add("--window", type=int, default=0, help="cells a side of a box; by default one for each bin")
    add("--json", metavar="FILE", help="the same as numbers")
    return parser.parse_args()


def check(args):
    """Raises UserError for arguments that do not go together."""
    if len(args.checkpoint) > 2:
        raise UserError(f"--checkpoint: found {len(args.checkpoint)}, expected one or two")
    if Path(args.out).suffix.lower() not in FORMATS:
        raise UserError(f"--out: found {args.out}, expected a file in {', '.join(FORMATS)}")
    if args.names and len(args.names) != len(args.checkpoint):
        raise UserError(f"--names: found {len(args.names)}, expected {len(args.checkpoint)}")
    if bool(args.image) == bool(args.dataset):
        found = "both" if args.image else "none"
        raise UserError(f"--image, --dataset: found {found}; expected one of the two")
    texts = getattr(args, "text", [])
    own, given = ("box", args.box) if args.what == "regions" else ("text", texts)
    if args.image and not given:
        raise UserError(f"--{own}: found none; expected one or more for an --image")
    if args.dataset and (args.box or texts):
        raise UserError(f"--{own}: is for an --image; the regions of a --dataset have theirs")
    if texts and args.box and len(texts) != len(args.box):
        raise UserError(f"--box: found {len(args.box)}; expected {len(texts)}, one a --text")
    for option in ("data", "split", "keys"):
        if args.image and getattr(args, option):
            raise UserError(f"--{option}: is for a --dataset, and not for an --image")
    if args.dataset and not args.data:
        raise UserError("--data: found none; expected where the --dataset is")
    for name, least in (("examples", 1), ("most", 1), ("image_size", 1), ("window", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name}: found {value}, expected {least} or more")
    if not all(text.strip() for text in texts):
        raise UserError("--text: found an empty one, expected a text")


def parse_box(text):
    """The box of the command line, fp32 [4]."""
    try:
        box = np.array([float(part) for part in text.split(",")], np.float32)
    except ValueError:
        box = np.empty(0)
    if box.shape != (4,):
        raise UserError(f"--box: found {text!r}, expected four numbers x0,y0,x1,y1")
    try:
        check_boxes(box)
    except ValueError:
        expected = "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, shares of the image"
        raise UserError(f"--box: found {text!r}, expected {expected}") from None
    return box


# ---- images and regions --------------------------------------------------------------------------


def image_file(args):
    """The image of the command line as a data set, with its boxes or one for each text."""
    path = Path(args.image)
    if args.what == "regions":
        boxes, texts = [parse_box(text) for text in args.box], [""] * len(args.box)
    else:
        texts = args.text
        whole = [np.array(WHOLE_IMAGE, np.float32)] * len(texts)
        boxes = [parse_box(text) for text in args.box] or whole
    regions = Regions(np.zeros(len(boxes), int), np.stack(boxes), texts, list(range(len(boxes))))
    fields = {"texts": [], "text_ids": [], "labels": [], "class_names": [], "annotation_hash": ""}
    fields |= {"images": Images([path]), "image_keys": [path.name], "image_ids": [0]}
    return Dataset(name="--image", protocol="", regions=regions, **fields)


def examples_of(args):
    """The chosen images of the command line's data set, with the first of their regions."""
    dataset = open_dataset(args.dataset, args.data, split=args.split)
    if not len(dataset.regions or ()):
        raise UserError(f"--dataset: {dataset.name} has no regions; expected one that has")
    with_regions = np.unique(dataset.regions.images)
    if args.keys:
        place_of = {str(dataset.image_keys[place]): place for place in with_regions}
        unknown = [key for key in args.keys if key not in place_of]
        if unknown:
            known = ", ".join(list(place_of)[:3])
            found = f"--keys: found {unknown[0]!r}, which no image with regions of {dataset.name}"
            raise UserError(f"{found} has; expected such as {known}")
        chosen = [place_of[key] for key in args.keys]
    else:
        count = min(args.examples, len(with_regions))
        spaced = np.linspace(0, len(with_regions) - 1, count).round().astype(int)
        chosen = with_regions[spaced].tolist()
    return subset(dataset, chosen, args.most)


def subset(dataset, chosen, most):
    """The data set of the chosen images alone, with the first `most` regions of each."""
    regions, rows, image_of = dataset.regions, [], []
    for image, place in enumerate(chosen):
        own = np.flatnonzero(regions.images == place)
        if len(own) > most:
            print(f"{dataset.image_keys[place]}: the first {most} of {len(own)} regions")
        rows += own[:most].tolist()
        image_of += [image] * len(own[:most])
    return dataclasses.replace(
        dataset,
        images=Images(chosen, dataset.images.__getitem__),
        image_keys=[dataset.image_keys[place] for place in chosen],
        image_ids=[dataset.image_ids[place] for place in chosen],
        regions=Regions(
            images=np.array(image_of),
            boxes=np.asarray(regions.boxes)[rows],
            texts=[regions.texts[row] for row in rows],
            keys=[regions.keys[row] for row in rows],
        ),
    )


def pictures_of(dataset):
    """Every image as it is, uint8 [H, W, 3]."""
    pictures = []
    for place in range(len(dataset.images)):
        dataset.pixels(place, 1)  # says which image it is that cannot be read
        pictures.append(np.asarray(images.decode(dataset.images[place])))
    return pictures


# ---- models --------------------------------------------------------------------------------------


def ask_models(args, ask):
    """Names, stamps and answers, `ask(predictor, params)`, of the command line's checkpoints."""
    overrides = trained_run.mesh_overrides(args.mesh)
    if args.image_size is not None:
        overrides["model.vision.image_size"] = args.image_size
    names, stamps, answers = [], [], []
    for folder in args.checkpoint:
        trained = trained_run.load(folder, overrides)
        config, shards = trained.config, sharding.batch_shards(trained.mesh)
        config.eval.batch_size = -(-LEAST_BATCH // shards) * shards
        decoding = Decoding(length=config.data.caption_length - 1)  # all but <s>
        predictor = make_predictor(trained, decoding)
        with sharding.use_mesh(trained.mesh):
            answers.append(ask(predictor, trained.params))
        names.append(f"{run_folder.find_run(folder)[0].name}, step {trained.step}")
        if names[-1] in names[:-1]:  # two runs of one name
            names[-1] = str(folder)
        stamp = results.model_stamp(config, trained.tokenizer, trained.params, trained.step)
        stamps.append({"folder": str(folder)} | stamp)
    return args.names or names, stamps, answers


def draw_captions(args, dataset):
    """`regions`: the boxes and what each checkpoint says of them."""
    pictures, regions = pictures_of(dataset), dataset.regions

    def asked(predictor, params):
        return predict(predictor, params, dataset, Asked(("region_caption",))).regions.captions

    names, _, answers = ask_models(args, asked)
    examples = []
    for place, picture in enumerate(pictures):
        own = np.flatnonzero(regions.images == place)
        captions = [[answer[row] for row in own] for answer in answers]
        truths = [regions.texts[row] for row in own] if args.dataset else []
        title = str(dataset.image_keys[place])
        examples.append(RegionExample(picture, regions.boxes[own], captions, truths, title))
    save_sheet(draw_regions(examples, names), args.out)


def draw_maps(args, dataset):
    """`similarity`: how similar each checkpoint finds each text and the places of an image."""
    pictures, regions = pictures_of(dataset), dataset.regions
    boxes_of = [{} for _ in pictures]  # of each image: of each distinct text, its regions
    for image, text, box in zip(regions.images, regions.texts, regions.boxes, strict=True):
        boxes_of[image].setdefault(text, []).append(box)
    texts = [list(own) for own in boxes_of]
    windows = []

    def asked(predictor, params):
        windows.append(args.window or predictor.window)
        return similarity_maps(predictor, params, dataset, texts, args.window)

    names, stamps, answers = ask_models(args, asked)
    for name, (_, cut) in zip(names, answers, strict=True):
        for text in cut:
            print(f"warning: {name}: cut to fit: {text!r}", file=sys.stderr)
    examples = []
    for place, picture in enumerate(pictures):
        maps = [answer[place] for answer, _ in answers]
        known = args.dataset or args.box
        boxes = [np.array(own) if known else [] for own in boxes_of[place].values()]
        title = str(dataset.image_keys[place])
        examples.append(SimilarityExample(picture, texts[place], maps, windows, boxes, title))
    save_sheet(draw_similarity(examples, names), args.out)
    if args.json:
        shown = [numbers(example, names) for example in examples]
        models = [{"name": name} | stamp for name, stamp in zip(names, stamps, strict=True)]
        cut = {name: texts for name, (_, texts) in zip(names, answers, strict=True)}
        written = {"models": models, "protocol": dataset.protocol, "cut": cut}
        written |= {"annotations": dataset.annotation_hash, "framing": results.framing_of(dataset)}
        results.write_result(args.json, written | {"examples": shown})


def main():
    """Draws what is asked for."""
    args = parse_arguments()
    logging.set_verbosity(logging.ERROR)  # orbax warns of what it is not asked for
    try:
        check(args)
        results.check_writable(args.out)
        if getattr(args, "json", None):
            results.check_writable(args.json, "--json")
        dataset = image_file(args) if args.image else examples_of(args)
        draw = draw_captions if args.what == "regions" else draw_maps
        draw(args, dataset)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
