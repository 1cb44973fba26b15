"""Evaluates a trained run on a data set, or shows two results side by side.

    python tools/evaluate.py --checkpoint workdirs/emoji --task zero_shot,retrieval,caption \
        --dataset emoji/things --data data --split test --out emoji.json
    python tools/evaluate.py --checkpoint workdirs/emoji_regions \
        --task region_caption,region_retrieval,region_classification,pointing \
        --dataset emoji_scenes --data data --out scenes.json
    python tools/evaluate.py --compare first.json second.json

On several hosts it is run on each of them (mmgem_jax/processes.py), with files that all share.

A result says how it came about: protocol, counts, fingerprints, prompts, decoding. The captions are
written beside it, in the format of COCO's results; those of regions in a file of their own.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from absl import logging

from mmgem_jax import processes, trained_run
from mmgem_jax.command_line import fail
from mmgem_jax.data.tfds_records import find_builder
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import results, tasks
from mmgem_jax.evaluation.datasets import open_dataset
from mmgem_jax.evaluation.evaluate_run import evaluate_run, make_predictor
from mmgem_jax.evaluation.progress import shown
from mmgem_jax.evaluation.prompts import DEFAULT_TEMPLATES, load_class_names, load_templates
from mmgem_jax.evaluation.tasks import TASKS, Asked
from mmgem_jax.evaluation.tfds_sets import TfdsCopy
from mmgem_jax.generate import Decoding


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--compare", nargs=2, metavar="JSON", help="two results to show side by side")
    add("--checkpoint", help="folder of a run, or of a step of it (WORKDIR/checkpoints/STEP)")
    add("--task", help=f"{', '.join(TASKS)}, or several with commas")
    add("--dataset", help="name of the data set")
    add("--data", help="file or folder of the data set")
    add("--split", default="", help="split of the data set; its protocol's by default")
    add("--allow_missing", action="store_true", help="leave out images that are not there")
    add("--out", help="JSON file for the result")
    add("--mesh", default="", help="AXIS=SIZE with commas; the run's own by default")
    add("--batch_size", type=int, help="images or texts at once; the run's own by default")
    add("--text_length", type=int, help="tokens of a text at most; the run's own by default")
    add("--image_size", type=int, help="pixels a side; the run's own by default")
    add = parser.add_argument_group("zero_shot and region_classification").add_argument
    add("--class_names", metavar="FILE", help="JSON file of class names, by data set")
    add("--templates", metavar="FILE", help="JSON file of prompts, by data set")
    add("--class_set", help="the data set in these files; that of --dataset by default")
    add("--template", action="append", help="a prompt, such as 'a photo of a {c}.'; repeatable")
    add("--likelihood", action="store_true", help="also classify by log P of the class's name")
    add("--likelihood_template", default="{c}", help="of the text whose log P is taken")
    add = parser.add_argument_group("retrieval").add_argument
    add("--rerank", type=int, default=0, metavar="K", help="re-rank the first K by log P")
    add = parser.add_argument_group("pointing").add_argument
    add("--window", type=int, default=0, help="cells a side about a cell; 0: one for a bin")
    add = parser.add_argument_group("caption and region_caption").add_argument
    add("--spice", action="store_true", help="score SPICE too: needs Java, downloads models")
    add("--decoding", default="greedy", help="greedy, beam or sample")
    add("--length", type=int, help="tokens of a caption at most; the run's own by default")
    add("--beams", type=int, default=5)
    add("--length_penalty", type=float, default=1.0, help="beam: log P / length ** this")
    add("--early_stopping", action="store_true", help="beam: stop at the first finished beams")
    add("--temperature", type=float, default=1.0, help="sample")
    add("--top_k", type=int, default=0, help="sample: of the likeliest so many; 0: of all")
    add("--top_p", type=float, default=1.0, help="sample: of the likeliest with this share")
    add("--cache_dtype", default="", help="float32 or bfloat16; the decoder's by default")
    add("--seed", type=int, default=0, help="sample")
    processes.add_arguments(parser)
    return parser.parse_args()


def dataset_of(args):
    """The data set of the command line."""
    options = {"split": args.split, "allow_missing": args.allow_missing}
    dataset = open_dataset(args.dataset, args.data, **options)
    if not args.class_names:
        return dataset
    names = load_class_names(args.class_names, args.class_set or args.dataset)
    regions = dataset.regions
    of_regions = regions is not None and not dataset.class_names
    own = regions.class_names if of_regions else dataset.class_names
    if own and len(names) != len(own):  # labels would shift
        raise UserError(
            f"--class_names: found {len(names)}, expected {len(own)}, the classes of {dataset.name}"
        )
    if of_regions:
        changes = {"regions": dataclasses.replace(regions, class_names=names)}
    else:
        changes = {"class_names": names}
    return dataclasses.replace(dataset, **changes)


def templates_of(args, dataset):
    """The prompts: those of the command line, else the data set's own, else ours."""
    templates = list(args.template or [])
    if args.templates:
        templates += load_templates(args.templates, args.class_set or args.dataset)
    return tuple(templates or dataset.templates or DEFAULT_TEMPLATES)


def overrides(args):
    """What the command line changes in the run's config, by dotted name."""
    changes = trained_run.mesh_overrides(args.mesh)
    for option, field in (
        ("batch_size", "eval.batch_size"),
        ("text_length", "data.text_length"),
        ("image_size", "model.vision.image_size"),
    ):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: found {value}, expected 1 or more")
        if value is not None:
            changes[field] = value
    return changes


def decoding_of(args, config):
    """The decoding of the command line."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Decoding)}
    own_length = config.data.caption_length - 1  # all but <s>
    given |= {"length": own_length if args.length is None else args.length}
    given |= {"method": args.decoding}
    return Decoding(**given)


def check_tokenizer(args, trained):
    """Raises UserError where the run's tokenizer came with its data, and other data are given."""
    data = trained.config.data
    name = f"{args.dataset}/things" if args.dataset in ("emoji", "emoji_scenes") else args.dataset
    if data.tokenizer or name not in (data.name, f"tfds/{data.name}"):
        return
    folder = find_builder(TfdsCopy(data.name, args.data)).data_path / "tokenizer"
    expected, found = (fingerprint(t) for t in (trained.tokenizer, load_tokenizer(str(folder))))
    if found != expected:
        raise UserError(
            f"--checkpoint {args.checkpoint}: its tokenizer is {expected[:12]} and that of the "
            f"data, {folder}, is {found[:12]}; expected the data that the run was trained on"
        )


def evaluate(args):
    """Evaluates, prints the metrics and, with --out, writes the result and the captions."""
    for name in ("checkpoint", "task", "dataset", "data"):
        if not getattr(args, name):
            raise UserError(f"--{name}: found none; expected one, or --compare and two results")
    likelihood = args.likelihood_template if args.likelihood else ""
    options = {"rerank": args.rerank, "spice": args.spice, "window": args.window}
    asked = Asked(tuple(args.task.split(",")), likelihood=likelihood, **options)
    out = Path(args.out) if args.out else None
    caption_files = {}
    if out:
        processes.on_first(lambda: results.check_writable(out))
        caption_files = files_of_captions(out, asked.tasks)
        for path in caption_files.values():
            processes.on_first(functools.partial(results.check_writable, path))
    dataset = dataset_of(args)
    asked = dataclasses.replace(asked, templates=templates_of(args, dataset))
    tasks.check(dataset, asked)
    trained = trained_run.load(args.checkpoint, overrides(args))
    check_tokenizer(args, trained)
    predictor = make_predictor(trained, decoding_of(args, trained.config), args.seed, shown)
    result = evaluate_run(trained, predictor, dataset, asked, args.split, caption_files)
    if out:
        processes.on_first(lambda: results.write_result(out, result))
    if dataset.missing:
        print(f"left out: {len(dataset.missing)} images that are not there")
    print(f"{dataset.protocol}, step {trained.step}\n{results.metrics_table(result['metrics'])}")
    for task in ("caption", "region_caption"):
        for name, what in result.get(f"{task}_scores", {}).items():
            if what.startswith("not run"):
                print(f"{task}: {name} {what}")
    if processes.is_first():
        warn(dataset, result["truncated"])


def files_of_captions(out, asked):
    """Where the captions of each task that has them go, beside the result."""
    ends = {"caption": ".captions.json", "region_caption": ".region_captions.json"}
    stem = out.name.removesuffix(".json")
    return {task: out.with_name(stem + end) for task, end in ends.items() if task in asked}


def warn(dataset, truncated):
    """One line where texts were cut to fit."""
    cut = [f"{share:.2%} of the {kind}" for kind, share in truncated.items() if share]
    if cut:
        whole = ", which is of whole texts" if dataset.long_text else ""
        message = f"--text_length cut {', '.join(cut)} of {dataset.protocol}{whole}"
        print(f"warning: {message}", file=sys.stderr)


def main():
    """Compares or evaluates."""
    args = parse_arguments()
    logging.set_verbosity(logging.ERROR)  # orbax warns of what it is not asked for
    try:
        if args.compare:
            print(results.comparison(*args.compare))
        else:
            with processes.joined(args.coordinator, args.process_id, args.process_count):
                evaluate(args)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
