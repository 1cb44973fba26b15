"""The tasks: what is asked of a model on a data set, and what its answers score.

Whatever the tasks, every distinct text is embedded once and every image is read once, with all its
regions; only re-ranking, which does not know its pairs before that, reads the images again.

Axes: I images, T distinct texts, C classes, P prompts of a class, E joint embedding.
"""

import dataclasses
import re

import numpy as np

from mmgem_jax import sharding
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_scores
from mmgem_jax.evaluation.captioning import benchmark_scores
from mmgem_jax.evaluation.prompts import PLACE, check_templates, fill
from mmgem_jax.evaluation.region_tasks import (
    REGION_TASKS,
    RegionPredictions,
    check_regions,
    joined,
    pointing_phrases,
    predict_regions,
    score_regions,
    texts_to_embed,
)
from mmgem_jax.evaluation.rerank import reranked_metrics
from mmgem_jax.evaluation.retrieval import retrieval_metrics
from mmgem_jax.evaluation.siblings import sibling_metrics, siblings_of
from mmgem_jax.evaluation.zero_shot import check_labels, likelihood_metrics, prompted_metrics

WORDNET_ID = re.compile(r"n\d{8}")

# The tasks, and the fields of a Dataset that each needs.
TASKS = {
    "zero_shot": ("labels", "class_names"),
    "retrieval": ("texts",),
    "caption": ("texts",),
    "siblings": ("texts",),
    **{task: ("regions",) for task in REGION_TASKS},
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The tasks and their options."""

    tasks: tuple[str, ...]
    templates: tuple[str, ...] = ("{c}",)  # zero_shot, region_classification: prompts of a class
    likelihood: str = ""  # zero_shot: template of the class texts to score by log P; "": not done
    rerank: int = 0  # retrieval: how many items are re-ranked by log P; 0: not done
    spice: bool = False  # captions: SPICE too, which needs Java and downloads models
    window: int = 0  # pointing: cells a side of the box about a cell; 0: one for a bin

    def __post_init__(self):
        """Raises UserError for tasks and options that are not known."""
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            found = repr(unknown[0]) if unknown else "none"
            raise UserError(f"task: found {found}, expected one or more of {', '.join(TASKS)}")
        options = (("retrieval", "rerank"), ("zero_shot", "likelihood"), ("pointing", "window"))
        for task, option in options:
            if getattr(self, option) and task not in self.tasks:
                raise UserError(f"{option}: is of the task {task}, which is not asked for")
        for option, counted in (("rerank", "items"), ("window", "cells")):
            if getattr(self, option) < 0:
                found = getattr(self, option)
                raise UserError(f"{option}: found {found}, expected how many {counted}, or 0")
        check_templates("templates", [*self.templates, self.likelihood or PLACE])


@dataclasses.dataclass
class Predictions:
    """What the model says of a data set; what no task asked for is empty."""

    image_embeddings: np.ndarray  # fp32 [I, E]
    texts: list[str]  # distinct: those of the data set, then the prompts
    text_embeddings: np.ndarray  # fp32 [T, E]
    captions: list[str]
    class_log_probs: np.ndarray  # fp32 [I, C]
    truncated: dict[str, float]  # the share of each kind of text that was cut to fit
    regions: RegionPredictions | None = None

    def embeddings_of(self, texts):
        """The embeddings of some of the texts, fp32 [len(texts), E]."""
        place = {text: row for row, text in enumerate(self.texts)}
        return self.text_embeddings[[place[text] for text in texts]]


def check(dataset, asked):
    """Raises UserError where the data set lacks what a task needs."""
    where = f"data set {dataset.name}"
    if not len(dataset.images):
        raise UserError(f"{where}: found no images, expected one or more")
    for task in asked.tasks:
        for field in TASKS[task]:
            found = getattr(dataset, field)
            if found is None or not len(found):
                hint = " of its own; give a file of them" if field == "class_names" else ""
                raise UserError(f"task {task}: {where} has no {field}{hint}")
    if "zero_shot" in asked.tasks and all(WORDNET_ID.fullmatch(n) for n in dataset.class_names):
        raise UserError(f"task zero_shot: {where} names its classes by WordNet ids; give a file")
    if "zero_shot" in asked.tasks:
        check_labels(where, dataset.labels, dataset.class_names)
    if "siblings" in asked.tasks:
        siblings_of(dataset.image_keys)
    check_regions(dataset, asked.tasks)
    if "caption" in asked.tasks:
        if len(set(dataset.image_keys)) < len(dataset.image_keys):
            raise UserError(f"task caption: {where} has two images of one key, expected a key each")
        several = max(map(len, references(dataset))) > 1
        if several and not caption_scores.installed():
            raise UserError(
                f"task caption: {where} has several captions an image, whose scores need "
                "pycocoevalcap: pip install -e '.[caption]'"
            )


def predict(predictor, params, dataset, asked):
    """Asks the model everything that the tasks need, but for re-ranking.

    Args:
      predictor: a Predictor; within `sharding.use_mesh`.
      params: the model's parameters.
      dataset: a Dataset.
      asked: Asked.

    Returns:
      Predictions.
    """
    predictions = embed_texts(predictor, params, dataset, asked)
    classes = []
    if "zero_shot" in asked.tasks and asked.likelihood:
        classes, cut = predictor.candidates(class_texts(dataset, asked.likelihood))
        predictions.truncated["class_texts"] = float(np.mean(cut))
    of_regions = set(asked.tasks) & set(REGION_TASKS)
    of_images = set(asked.tasks) - of_regions
    phrases = pointing_phrases(dataset.regions, asked, predictions.embeddings_of)

    embeddings, log_probs, regions = [], [], []
    for places, feature_map in predictor.read_images(params, dataset):
        if of_images:
            embedding, visual = predictor.look_at_whole(params, feature_map)
            embeddings.append(sharding.to_host(embedding)[: len(places)])
        if "caption" in asked.tasks:
            predictions.captions += predictor.captions(params, places, visual)
        if len(classes):
            log_probs.append(predictor.score_all(params, visual, classes)[: len(places)])
        if of_regions:
            batch = places, feature_map, phrases
            regions.append(predict_regions(predictor, params, dataset.regions, asked, *batch))
    if of_images:
        predictions.image_embeddings = np.concatenate(embeddings)
    predictions.class_log_probs = np.concatenate(log_probs) if log_probs else np.zeros((0, 0))
    predictions.regions = joined(regions) if regions else None
    return predictions


def embed_texts(predictor, params, dataset, asked):
    """Predictions that hold the embeddings of all texts that the tasks need, and no images yet."""
    groups = {}
    if {"retrieval", "siblings"} & set(asked.tasks):
        groups["texts"] = dataset.texts
    if "zero_shot" in asked.tasks:
        groups["prompts"] = [text for row in prompts(dataset, asked.templates) for text in row]
    groups |= texts_to_embed(dataset.regions, asked)
    texts = list(dict.fromkeys(text for group in groups.values() for text in group))
    embeddings, cut = np.zeros((0, 0), np.float32), np.zeros(0, bool)
    if texts:
        embeddings, cut = predictor.embed_texts(params, texts)
    cut = dict(zip(texts, cut.tolist(), strict=True))
    truncated = {k: float(np.mean([cut[text] for text in v])) for k, v in groups.items()}
    nothing = np.zeros((0, 0), np.float32)
    return Predictions(nothing, texts, embeddings, [], nothing, truncated)


def score(predictor, params, dataset, asked, predictions):
    """What the predictions score; re-ranking asks the model once more.

    Args:
      predictor: a Predictor; within `sharding.use_mesh`.
      params: the model's parameters.
      dataset: a Dataset that `check` lets pass.
      asked: Asked.
      predictions: of `predict`.

    Returns:
      Flat metrics, `task/metric`, and by task how captions were scored.
    """
    metrics, how = {}, {}
    if "zero_shot" in asked.tasks:
        metrics |= named("zero_shot", zero_shot_scores(dataset, predictions, asked.templates))
        if asked.likelihood:
            scores = likelihood_metrics(predictions.class_log_probs, dataset.labels)
            metrics |= named("zero_shot_likelihood", scores)
    if "retrieval" in asked.tasks:
        metrics |= named("retrieval", retrieval_scores(dataset, predictions))
        if asked.rerank:
            scores, cut = reranked_scores(predictor, params, dataset, predictions, asked.rerank)
            metrics |= named("retrieval_reranked", scores)
            predictions.truncated["reranked_texts"] = cut
    if "caption" in asked.tasks:
        rows = predictions.captions, references(dataset), dataset.image_keys
        scores, how["caption"] = benchmark_scores(*rows, asked.spice)
        metrics |= named("caption", scores)
    if "siblings" in asked.tasks:
        metrics |= named("siblings", sibling_scores(dataset, predictions))
    if predictions.regions:
        rows = dataset.regions, asked, predictions.regions, predictions.embeddings_of
        of_tasks, of_captions = score_regions(*rows)
        how |= of_captions
        for task, scores in of_tasks.items():
            metrics |= named(task, scores)
    return metrics, how


def zero_shot_scores(dataset, predictions, templates):
    """Accuracies by the similarity of images and the classes' prompts."""
    every = [text for row in prompts(dataset, templates) for text in row]
    embeddings = predictions.embeddings_of(every)
    return prompted_metrics(
        predictions.image_embeddings, embeddings, len(templates), dataset.labels
    )


def retrieval_scores(dataset, predictions):
    """Recall and median rank, in both directions, by similarity."""
    return retrieval_metrics(
        predictions.image_embeddings,
        predictions.embeddings_of(dataset.texts),
        dataset.text_ids,
        image_ids=dataset.image_ids,
    )


def sibling_scores(dataset, predictions):
    """How often a text tells its image from the one that differs in a detail."""
    place = {image: row for row, image in enumerate(dataset.image_ids)}
    return sibling_metrics(
        predictions.image_embeddings,
        predictions.embeddings_of(dataset.texts),
        [place[image] for image in dataset.text_ids],
        siblings_of(dataset.image_keys),
    )


def reranked_scores(predictor, params, dataset, predictions, k):
    """The same after the k most similar items are put in the order of log P(text | image).

    Also returns the share of the texts that were cut to fit.
    """
    candidates, cut = predictor.candidates(dataset.texts)

    def log_probs(pairs):
        return predictor.score_pairs(params, dataset, candidates, pairs)

    scores = reranked_metrics(
        predictions.image_embeddings,
        predictions.embeddings_of(dataset.texts),
        dataset.text_ids,
        log_probs,
        k,
        image_ids=dataset.image_ids,
    )
    return scores, float(np.mean(cut))


def prompts(dataset, templates):
    """The prompts of each class: C lists of P texts."""
    return [fill(templates, name) for name in dataset.class_names]


def class_texts(dataset, template):
    """The text of each class whose likelihood is asked."""
    return [fill([template], name)[0] for name in dataset.class_names]


def references(dataset):
    """The texts of each image; UserError where one has none."""
    by_id = {}
    for text, of_image in zip(dataset.texts, dataset.text_ids, strict=True):
        by_id.setdefault(of_image, []).append(text)
    for key, image in zip(dataset.image_keys, dataset.image_ids, strict=True):
        if image not in by_id:
            raise UserError(f"data set {dataset.name}: image {key} has no text, expected a caption")
    return [by_id[image] for image in dataset.image_ids]


def named(task, metrics):
    """The metrics as `task/metric`."""
    return {f"{task}/{name}": value for name, value in metrics.items()}
