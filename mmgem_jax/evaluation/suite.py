"""A run's own splits: scored while it trains and at its end, with floors and samples beside."""

import functools
from pathlib import Path

import numpy as np

from mmgem_jax import processes
from mmgem_jax.data.tfds_records import open_split
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import caption_metrics
from mmgem_jax.evaluation.pixel_floor import pixel_floor
from mmgem_jax.evaluation.predictor import Pixels, Predictor
from mmgem_jax.evaluation.region_retrieval import (
    region_chance_metrics,
    region_retrieval_metrics,
    truth_of,
)
from mmgem_jax.evaluation.region_sets import open_regions
from mmgem_jax.evaluation.results import data_stamp, model_stamp, write_result
from mmgem_jax.evaluation.retrieval import chance_metrics
from mmgem_jax.evaluation.samples import Sample, draw_samples
from mmgem_jax.evaluation.tasks import (
    Asked,
    named,
    predict,
    references,
    retrieval_scores,
    zero_shot_scores,
)
from mmgem_jax.evaluation.tfds_sets import open_pairs
from mmgem_jax.generate import Decoding

# One text an image; the gallery is the split's own images and distinct texts; the classes are those
# that occur in the split, each prompted by its bare name; captions are greedy.
PROTOCOL = "pairs-v1"
# The same, where there is a text of the whole image; and the regions of the split at their boxes.
REGIONS_PROTOCOL = "regions-v1"

# Heads of the results' table, and the metrics under them.
COLUMNS = (
    ("i>t R@1", "retrieval/image_to_text_r1"),
    ("R@5", "retrieval/image_to_text_r5"),
    ("R@10", "retrieval/image_to_text_r10"),
    ("t>i R@1", "retrieval/text_to_image_r1"),
    ("R@5", "retrieval/text_to_image_r5"),
    ("R@10", "retrieval/text_to_image_r10"),
    ("class", "zero_shot/acc1"),
    ("caption", "caption/exact_match"),
    ("F1", "caption/token_f1"),
    ("r>t R@1", "region_retrieval/region_to_text_r1"),
    ("t>r R@1", "region_retrieval/text_to_region_r1"),
    ("own im.", "region_retrieval/within_image_r1"),
    ("caption", "region_caption/exact_match"),
    ("F1", "region_caption/token_f1"),
)


class Evaluator:
    """A run's splits, opened once, and what its model says of them, for any number of times."""

    def __init__(self, config, model, tokenizer, mesh):
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        decoding = Decoding(length=config.data.caption_length - 1)  # all but <s>
        self.predictor = Predictor(config, model, tokenizer, mesh, decoding)
        self.datasets = {}
        self.check_splits()

    def check_splits(self):
        """Raises UserError for what an evaluation would miss: now, not at the end of a training."""
        options = self.config.eval
        for field in ("splits", "final_splits"):
            for name in options[field]:
                record = open_split(self.config.data, name, f"eval.{field}")[0]
                texts = [key for key, value in record.items() if isinstance(value, (bytes, str))]
                texts.remove(self.config.data.image_field)
                for role in ("caption_field", "class_field"):
                    if options[role] and options[role] not in texts:
                        raise UserError(
                            f"eval.{role}: no text field {options[role]!r}; there are {texts}"
                        )
                self.dataset(name)
        if options.sample_split and options.sample_split not in options.final_splits:
            raise UserError(
                f"eval.sample_split: {options.sample_split!r} is not one of the final_splits "
                f"{list(options.final_splits)}"
            )

    def dataset(self, name):
        """A split of the config's data set, opened on first use."""
        if name not in self.datasets:
            data, options = self.config.data, self.config.eval
            if data.regions_field:
                dataset = open_regions(data.name, data, name, options.caption_field)
            else:
                fields = options.caption_field, options.class_field
                dataset = open_pairs(data.name, data, name, *fields)
            self.datasets[name] = dataset
        return self.datasets[name]

    def asked(self, name):
        """The tasks that a split's fields allow; a class is prompted by its bare name."""
        dataset, zero_shot = self.dataset(name), ()
        if dataset.class_names:
            zero_shot = ("zero_shot",)
        of_images = ("retrieval", *zero_shot, "caption") if dataset.texts else ()
        of_regions = ("region_retrieval", "region_caption") if dataset.regions else ()
        return Asked((*of_images, *of_regions))

    def predict(self, params, name):
        """Everything the model says of a split."""
        return predict(self.predictor, params, self.dataset(name), self.asked(name))

    def score(self, name, predictions):
        """Flat metrics, `task/metric`, of what the model says of a split."""
        dataset, asked, metrics = self.dataset(name), self.asked(name), {}
        if "retrieval" in asked.tasks:
            metrics = named("retrieval", retrieval_scores(dataset, predictions))
        if "zero_shot" in asked.tasks:
            scores = zero_shot_scores(dataset, predictions, asked.templates)
            metrics |= named("zero_shot", scores)
        # Without the scores of a benchmark: they need more references, and time.
        if "caption" in asked.tasks:
            scores = caption_metrics(predictions.captions, captions_of(dataset))
            metrics |= named("caption", scores)
        if "region_retrieval" in asked.tasks:
            truth, found = truth_of(dataset.regions), predictions.regions
            texts = predictions.embeddings_of(truth.texts)
            scores = region_retrieval_metrics(truth, found.embeddings, texts)
            metrics |= named("region_retrieval", scores)
            scores = caption_metrics(found.captions, dataset.regions.texts)
            metrics |= named("region_caption", scores)
        return metrics

    def evaluate(self, params, name):
        """Flat metrics of a split."""
        return self.score(name, self.predict(params, name))

    def floors(self, name):
        """What costs nothing: chance, and the nearest training drawing by its pixels."""
        dataset, chance = self.dataset(name), {}
        if dataset.texts:
            chance = named("retrieval", chance_metrics(dataset.text_ids, dataset.image_ids))
        if dataset.class_names:
            chance["zero_shot/acc1"] = 1 / len(dataset.class_names)
        if dataset.regions:
            of_regions = region_chance_metrics(truth_of(dataset.regions))
            chance |= named("region_retrieval", of_regions)
        floors = {"chance": chance}
        if dataset.regions or not self.config.eval.pixel_floor:
            return floors
        train = self.dataset(self.config.data.split)
        if set(dataset.texts) & set(train.texts):
            images = self.pixels(train), train.image_ids, self.pixels(dataset), dataset.image_ids
            floors["pixels"] = named("retrieval", pixel_floor(*images))
        return floors

    def pixels(self, dataset):
        """The images as the model reads them, decoded when asked for."""
        return Pixels(dataset, self.config.model.vision.image_size)


def final_evaluation(evaluator, params, workdir, step):
    """Scores the final splits into results.json and samples.png; returns the results.

    Of several processes all ask the model, and the first does the rest for all.
    """
    config = evaluator.config
    results = model_stamp(config, evaluator.tokenizer, params, step) | {
        "protocol": REGIONS_PROTOCOL if config.data.regions_field else PROTOCOL,
        "step": step,
        "data": config.data.name,
        "prompt": "{" + config.eval.caption_field + "}",
        "config": config.to_dict(),
        "splits": {},
    }
    for name in config.eval.final_splits:
        dataset, asked = evaluator.dataset(name), evaluator.asked(name)
        predictions = evaluator.predict(params, name)
        stamp = data_stamp(dataset, asked, evaluator.predictor, predictions.truncated)
        results["splits"][name] = stamp | {
            "metrics": evaluator.score(name, predictions),
            "floors": processes.on_first(functools.partial(evaluator.floors, name)),
        }
        if name == config.eval.sample_split and dataset.texts:
            draw = functools.partial(draw_split, evaluator, name, predictions)
            processes.on_first(functools.partial(draw, Path(workdir) / "samples.png"))
    processes.on_first(lambda: write_result(Path(workdir) / "results.json", results))
    return results


def draw_split(evaluator, name, predictions, path):
    """Draws some of a split's images and what was said about them."""
    dataset, config = evaluator.dataset(name), evaluator.config
    rows = samples(dataset, evaluator.pixels(dataset), predictions, config.eval.samples)
    draw_samples(path, rows, f"{config.data.name}, {name}")


def samples(dataset, images, predictions, count):
    """The same drawings every time: `count` of the split, evenly spaced in the order of names."""
    names = captions_of(dataset)
    order = np.argsort(names, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
    gallery = predictions.embeddings_of(dataset.texts)
    similarity = predictions.image_embeddings[chosen] @ gallery.T
    rows = []
    for i, scores in zip(chosen, similarity, strict=True):
        nearest = np.argsort(-scores, kind="stable")[:3]
        neighbours = [(dataset.texts[j], float(scores[j])) for j in nearest]
        rows.append(Sample(images[i], names[i], predictions.captions[i], neighbours))
    return rows


def captions_of(dataset):
    """The one text of each image."""
    return [texts[0] for texts in references(dataset)]


def results_table(results):
    """The results as lines of text, with the floors beside them."""
    splits = {
        name: {"model": split["metrics"]} | split["floors"]
        for name, split in results["splits"].items()
    }
    known = {key for rows in splits.values() for metrics in rows.values() for key in metrics}
    columns = [(head, key) for head, key in COLUMNS if key in known]
    lines = [f"{'split':20s} {'':8s}" + "".join(f"{head:>9s}" for head, _ in columns)]
    for name, rows in splits.items():
        for who, metrics in rows.items():
            cells = [metrics.get(key) for _, key in columns]
            cells = "".join(f"{'':>9s}" if c is None else f"{c:9.3f}" for c in cells)
            lines.append(f"{name if who == 'model' else '':20s} {who:8s}{cells}")
    return "\n".join(lines)
