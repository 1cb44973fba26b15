"""The tasks that ask about regions, at the boxes that the data set gives.

`region_caption`: a caption of every box, each a key of its own with the region's text as its one
reference. That is the protocol of Visual Genome's and RefCOCOg's region captions; CIDEr takes its
document frequencies from these references, so that a part of a set has other scores.
`region_retrieval`: see `region_retrieval.py`. `region_classification`: a box's class is the one
whose prompts its embedding is most similar to. `pointing`: see `pointing.py`.

Axes: N regions, E joint embedding.
"""

import dataclasses

import numpy as np

from mmgem_jax import sharding
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import benchmark_scores
from mmgem_jax.evaluation.pointing import pointed_cells, pointing_metrics
from mmgem_jax.evaluation.prompts import fill
from mmgem_jax.evaluation.region_retrieval import region_retrieval_metrics, truth_of
from mmgem_jax.evaluation.zero_shot import check_labels, prompted_metrics

REGION_TASKS = ("region_caption", "region_retrieval", "region_classification", "pointing")


@dataclasses.dataclass(frozen=True)
class RegionPredictions:
    """What the model says of regions; what no task asked for is empty."""

    places: np.ndarray  # int [N], which of the data set's regions each row is about
    embeddings: np.ndarray  # fp32 [N, E]
    captions: list[str]
    pointed: np.ndarray  # int [N], the cell that the region's text is most similar to
    map_shape: tuple[int, int]  # cells of the feature map


def check_regions(dataset, tasks):
    """Raises UserError where a data set's regions lack what a task needs."""
    if "region_classification" not in tasks:
        return
    where, regions = f"data set {dataset.name}", dataset.regions
    for field in ("labels", "class_names"):
        if not len(getattr(regions, field)):
            hint = " of their own; give a file of them" if field == "class_names" else ""
            raise UserError(f"task region_classification: {where}: regions have no {field}{hint}")
    check_labels(where, regions.labels, regions.class_names)


def texts_to_embed(regions, asked):
    """The texts that the tasks compare with regions, by their kind, as `Predictions.truncated`."""
    groups = {}
    if {"region_retrieval", "pointing"} & set(asked.tasks):
        truth = truth_of(regions)
        groups["region_texts"] = [truth.texts[place] for place in truth.text_of]
    if "region_classification" in asked.tasks:
        groups["region_prompts"] = class_prompts(regions, asked.templates)
    return groups


def pointing_phrases(regions, asked, embeddings_of):
    """The embeddings of the distinct texts that point, [T, E], and which is each region's, [N]."""
    if "pointing" not in asked.tasks:
        return None
    truth = truth_of(regions)
    return embeddings_of(truth.texts), truth.text_of


def predict_regions(predictor, params, regions, asked, places, feature_map, phrases):
    """Asks what the tasks need of the regions on a batch's images.

    Args:
      predictor: a Predictor; within `sharding.use_mesh`.
      params: the model's parameters.
      regions: Regions.
      asked: Asked.
      places: int [<= B], the batch's images, and
      feature_map: [B, H, W, D], their map, from `read_images`.
      phrases: of `pointing_phrases`.

    Returns:
      RegionPredictions of these images' regions.
    """
    own = np.flatnonzero(np.isin(regions.images, places))
    rows = np.searchsorted(places, regions.images[own])
    embeddings, captions, pointed = [np.zeros((0, 0), np.float32)], [], np.zeros(0, int)
    for start in range(0, len(own), predictor.batch_size):
        chunk = slice(start, start + predictor.batch_size)
        boxes = regions.boxes[own[chunk]]
        found, visual = predictor.look(params, feature_map, rows[chunk], boxes)
        embeddings.append(sharding.to_host(found)[: len(boxes)])
        if "region_caption" in asked.tasks:
            captions += predictor.captions(params, own[chunk], visual)
    if "pointing" in asked.tasks and len(own):
        cells, (texts, text_of) = predictor.embed_cells(params, feature_map, asked.window), phrases
        pointed = np.zeros(len(own), int)
        for row in np.unique(rows):
            of_image = rows == row
            pointed[of_image] = pointed_cells(cells[row], texts[text_of[own[of_image]]])
    embeddings = np.concatenate(embeddings[1:] or embeddings)
    return RegionPredictions(own, embeddings, captions, pointed, feature_map.shape[1:3])


def joined(parts):
    """The predictions of all batches as one, in the order of the data set's regions."""
    parts = [part for part in parts if len(part.places)]
    places = np.concatenate([part.places for part in parts])
    order = np.argsort(places)
    captions = [caption for part in parts for caption in part.captions]
    pointed = np.concatenate([part.pointed for part in parts])
    return RegionPredictions(
        places=places[order],
        embeddings=np.concatenate([part.embeddings for part in parts])[order],
        captions=[captions[row] for row in order] if captions else [],
        pointed=pointed[order] if len(pointed) else pointed,
        map_shape=parts[0].map_shape,
    )


def score_regions(regions, asked, found, embeddings_of):
    """What the predictions score.

    Args:
      regions: Regions.
      asked: Asked.
      found: RegionPredictions of all of them.
      embeddings_of: function of texts that were embedded, to their embeddings.

    Returns:
      Metrics by task, and for `region_caption` how the captions were scored, by task.
    """
    metrics, how = {}, {}
    truth = truth_of(regions)
    if "region_retrieval" in asked.tasks:
        metrics["region_retrieval"] = region_retrieval_metrics(
            truth, found.embeddings, embeddings_of(truth.texts)
        )
    if "region_classification" in asked.tasks:
        prompts = embeddings_of(class_prompts(regions, asked.templates))
        metrics["region_classification"] = prompted_metrics(
            found.embeddings, prompts, len(asked.templates), regions.labels
        )
    if "region_caption" in asked.tasks:
        references = [[text] for text in regions.texts]
        metrics["region_caption"], how["region_caption"] = benchmark_scores(
            found.captions, references, regions.keys, asked.spice
        )
    if "pointing" in asked.tasks:
        metrics["pointing"] = pointing_metrics(truth, regions.boxes, found.pointed, found.map_shape)
    return metrics, how


def class_prompts(regions, templates):
    """The prompts of the regions' classes, one class after the other."""
    return [text for name in regions.class_names for text in fill(templates, name)]
