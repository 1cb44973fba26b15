"""What training on regions gave and what it cost: checkpoints before and after it, in one table.

    python tools/compare_stages.py --before workdirs/emoji --after workdirs/emoji_regions \
        --data data --json stages.json

Both are asked the same of three data sets: scenes with regions, pairs of scenes with long
descriptions, and the drawings of the training before. Where the two read images of different
sizes, the one before is asked at its own and, its position embeddings interpolated, at the other's.
"""

import argparse

from absl import logging

from mmgem_jax import trained_run
from mmgem_jax.command_line import fail
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import results, tasks
from mmgem_jax.evaluation.datasets import open_dataset
from mmgem_jax.evaluation.evaluate_run import evaluate_run, make_predictor
from mmgem_jax.evaluation.progress import shown
from mmgem_jax.evaluation.region_retrieval import region_chance_metrics, truth_of
from mmgem_jax.evaluation.retrieval import chance_metrics
from mmgem_jax.evaluation.tasks import Asked, named
from mmgem_jax.generate import Decoding
from mmgem_jax.run_folder import find_run

# What is asked of each data set; the long descriptions are of pairs of scenes.
ASKED = {
    "scenes": (
        *("region_caption", "region_retrieval", "region_classification", "pointing"),
        *("retrieval", "caption"),
    ),
    "long": ("retrieval", "siblings"),
    "drawings": ("retrieval", "caption"),
}

# The table's rows: what they are called, the data set and the metric.
ROWS = (
    ("regions: caption, exact match", "scenes", "region_caption/exact_match"),
    ("regions: caption, token F1", "scenes", "region_caption/token_f1"),
    ("regions: caption, CIDEr", "scenes", "region_caption/cider"),
    ("regions: caption, METEOR", "scenes", "region_caption/meteor"),
    ("regions: text to region R@1", "scenes", "region_retrieval/text_to_region_r1"),
    ("regions: region to text R@1", "scenes", "region_retrieval/region_to_text_r1"),
    ("regions: text to region of its image R@1", "scenes", "region_retrieval/within_image_r1"),
    ("regions: class", "scenes", "region_classification/acc1"),
    ("regions: pointing", "scenes", "pointing/accuracy"),
    ("scenes: image to sentence R@1", "scenes", "retrieval/image_to_text_r1"),
    ("scenes: sentence to image R@1", "scenes", "retrieval/text_to_image_r1"),
    ("scenes: caption, exact match", "scenes", "caption/exact_match"),
    ("scenes: caption, token F1", "scenes", "caption/token_f1"),
    ("long: image to description R@1", "long", "retrieval/image_to_text_r1"),
    ("long: description to image R@1", "long", "retrieval/text_to_image_r1"),
    ("long: own scene, not its sibling", "long", "siblings/accuracy"),
    ("drawings: image to name R@1", "drawings", "retrieval/image_to_text_r1"),
    ("drawings: name to image R@1", "drawings", "retrieval/text_to_image_r1"),
    ("drawings: caption, exact match", "drawings", "caption/exact_match"),
    ("drawings: caption, token F1", "drawings", "caption/token_f1"),
)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--before", required=True, help="folder of a run, or of a step of it")
    add("--after", required=True, help="folder of a run that began with it, or of a step of it")
    add("--data", default="data", help="folder of the data sets")
    add("--scenes", default="emoji_scenes", help="data set with regions")
    add("--drawings", default="emoji/things", help="data set of the training before")
    add("--split", default="test", help="split of both")
    add("--long_split", default="long", help="split of the scenes with pairs of long descriptions")
    add("--image_size", type=int, help="pixels a side, of both; by default --after's own")
    add("--text_length", type=int, help="tokens of a text; those of both runs at least")
    add("--mesh", default="", help="AXIS=SIZE with commas; each run's own by default")
    add("--json", help="JSON file for the results")
    return parser.parse_args()


def open_datasets(args):
    """Each data set with its split, by its name in `ASKED`; UserError where one will not do."""
    places = {
        "scenes": (args.scenes, args.split),
        "long": (args.scenes, args.long_split),
        "drawings": (args.drawings, args.split),
    }
    datasets = {}
    for name, (dataset, split) in places.items():
        datasets[name] = open_dataset(dataset, args.data, split=split), split
        tasks.check(datasets[name][0], Asked(ASKED[name]))
    return datasets


def columns_of(args):
    """The table's columns: their heads, and of each a run's folder and changes of its config."""
    for option in ("image_size", "text_length"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: found {value}, expected 1 or more")
    before, after = (
        trained_run.read_config(find_run(folder)[0] / "config.json")[0]
        for folder in (args.before, args.after)
    )
    own, size = before.model.vision.image_size, args.image_size or after.model.vision.image_size
    changes = trained_run.mesh_overrides(args.mesh)
    for field in ("text_length", "caption_length"):
        changes[f"data.{field}"] = max(before.data[field], after.data[field])
    changes["data.text_length"] = max(changes["data.text_length"], args.text_length or 0)
    columns = {f"before, {own} px": (args.before, own)}
    columns |= {f"before, {size} px": (args.before, size), f"after, {size} px": (args.after, size)}
    return {
        head: (folder, changes | {"model.vision.image_size": pixels})
        for head, (folder, pixels) in columns.items()
    }


def evaluate(folder, changes, datasets):
    """The results of a run, by data set."""
    trained = trained_run.load(folder, changes)
    decoding = Decoding(length=trained.config.data.caption_length - 1)  # all but <s>
    predictor = make_predictor(trained, decoding, watch=shown)
    return {
        name: evaluate_run(trained, predictor, dataset, Asked(ASKED[name]), split)
        for name, (dataset, split) in datasets.items()
    }


def chance(datasets, found):
    """What a random answer has, by data set; of pointing, on the map of the last of `found`."""
    floors = {}
    for name, (dataset, _) in datasets.items():
        floors[name] = named("retrieval", chance_metrics(dataset.text_ids, dataset.image_ids))
    regions, last = datasets["scenes"][0].regions, list(found.values())[-1]["scenes"]["metrics"]
    floors["scenes"] |= named("region_retrieval", region_chance_metrics(truth_of(regions)))
    floors["scenes"]["region_classification/acc1"] = 1 / len(regions.class_names)
    floors["scenes"]["pointing/accuracy"] = last["pointing/chance"]
    floors["long"]["siblings/accuracy"] = 0.5
    return floors


def table(found, floors):
    """The Markdown table of results by column and data set, and a line on each text cut to fit."""
    lines = [f"| | chance | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for title, dataset, metric in ROWS:
        cells = [of_run[dataset]["metrics"].get(metric) for of_run in found.values()]
        if any(cell is not None for cell in cells):
            cells = [floors[dataset].get(metric), *cells]
            cells = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    for head, of_run in found.items():
        for dataset, result in of_run.items():
            for kind, share in result["truncated"].items():
                if share:
                    length = result["text_length"]
                    cut = f"{share:.1%} of the {kind} of `{dataset}` were cut to {length} tokens"
                    lines += ["", f"{head}: {cut}."]
    return "\n".join(lines)


def compare(args):
    """Evaluates every column, prints the table and, with --json, writes all there is."""
    if args.json:
        results.check_writable(args.json)
    columns, datasets, found = columns_of(args), open_datasets(args), {}
    for head, (folder, changes) in columns.items():
        print(f"{head}: {folder}", flush=True)
        found[head] = evaluate(folder, changes, datasets)
    floors = chance(datasets, found)
    text = table(found, floors)
    print(f"\n{text}")
    if args.json:
        results.write_result(args.json, {"table": text, "chance": floors, "results": found})


def main():
    """Prints the table."""
    args = parse_arguments()
    logging.set_verbosity(logging.ERROR)  # orbax warns of what it is not asked for
    try:
        compare(args)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
