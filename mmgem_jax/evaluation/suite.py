"""Runs a model over a split and scores it: retrieval, zero-shot classes, captions, samples."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import mmgem_jax
from mmgem_jax import sharding
from mmgem_jax.data.pipeline import open_split, read_split
from mmgem_jax.data.tokenizer import EMB, embedding_row, fingerprint, used_vocab_size
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import caption_metrics
from mmgem_jax.evaluation.pixel_floor import pixel_floor
from mmgem_jax.evaluation.retrieval import chance_metrics, retrieval_metrics
from mmgem_jax.evaluation.samples import Sample, draw_samples
from mmgem_jax.evaluation.zero_shot import class_weights, classification_metrics
from mmgem_jax.generate import CaptionTokens, greedy_captions
from mmgem_jax.models.mmgem import MMGem, whole_image

# One text an image; the gallery is the split's own images and distinct texts; the classes are those
# that occur in the split, each prompted by its bare name; captions are greedy.
PROTOCOL = "pairs-v1"

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
)


@dataclasses.dataclass
class Split:
    """A split in memory: images, their texts, their class names."""

    images: np.ndarray  # uint8 [I, h, w, 3]
    texts: list[str]
    classes: list[str]


@dataclasses.dataclass
class Predictions:
    """What the model says of a split."""

    image_embeddings: np.ndarray  # fp32 [I, E]
    text_embeddings: np.ndarray  # fp32 [T, E], of `names`
    names: list[str]  # the distinct texts of the split
    captions: list[str]


class Evaluator:
    """The jitted functions and the splits, read once, for any number of evaluations."""

    def __init__(self, config, model, tokenizer, mesh):
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.batch_size = config.eval.batch_size
        shards = sharding.batch_shards(mesh)
        if self.batch_size % shards:
            raise UserError(
                f"eval.batch_size: {self.batch_size} is not a multiple of the {shards} parts "
                "that the mesh splits a batch into"
            )
        self.check_splits()
        self.splits = {}
        tokens = CaptionTokens(
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            emb=tokenizer.convert_tokens_to_ids(EMB),
            vocabulary=used_vocab_size(tokenizer),
        )
        length = config.data.caption_length

        def encode_images(params, image):
            return model.apply({"params": params}, image, method=MMGem.encode_image)

        def encode_texts(params, tokens, embed_index):
            return model.apply({"params": params}, tokens, embed_index, method=MMGem.encode_text)

        def caption(params, image):
            boxes = whole_image(image.shape[0])
            return greedy_captions(model, params, image, boxes, length, tokens)

        self.encode_images = jax.jit(encode_images)
        self.encode_texts = jax.jit(encode_texts)
        self.caption = jax.jit(caption)

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
        if options.sample_split and options.sample_split not in options.final_splits:
            raise UserError(
                f"eval.sample_split: {options.sample_split!r} is not one of the final_splits "
                f"{list(options.final_splits)}"
            )

    def split(self, name):
        """A split of the config's data set, read on first use."""
        if name not in self.splits:
            data, options = self.config.data, self.config.eval
            images, records = read_split(data, name, self.config.model.vision.image_size)
            texts = [record[options.caption_field] for record in records]
            classes = [record[options.class_field] for record in records if options.class_field]
            self.splits[name] = Split(images, texts, classes)
        return self.splits[name]

    def in_batches(self, function, params, **arrays):
        """Rows through a jitted function in batches of one size; padding is not counted."""
        count = len(next(iter(arrays.values())))
        results = []
        for start in range(0, count, self.batch_size):
            rows = np.arange(start, start + self.batch_size).clip(max=count - 1)
            batch = sharding.to_global({k: v[rows] for k, v in arrays.items()}, self.mesh)
            results.append(jax.device_get(function(params, *batch.values())))
        return np.concatenate(results)[:count]

    def embed_texts(self, params, texts):
        """Unit embeddings, fp32 [len(texts), E]."""
        rows = [embedding_row(self.tokenizer, text, self.config.data.text_length) for text in texts]
        tokens = np.stack([row[0] for row in rows])
        index = np.asarray([row[1] for row in rows], np.int32)
        return self.in_batches(self.encode_texts, params, tokens=tokens, embed_index=index)

    def predict(self, params, name):
        """Everything the model says of a split."""
        split = self.split(name)
        names = sorted(set(split.texts))
        rows = self.in_batches(self.caption, params, image=split.images)
        return Predictions(
            image_embeddings=self.in_batches(self.encode_images, params, image=split.images),
            text_embeddings=self.embed_texts(params, names),
            names=names,
            captions=[self.tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        )

    def score(self, params, name, predictions):
        """Flat metrics, `task/metric`, of what the model says of a split."""
        split = self.split(name)
        retrieval = retrieval_metrics(
            predictions.image_embeddings,
            predictions.text_embeddings,
            predictions.names,
            image_ids=split.texts,
        )
        metrics = {f"retrieval/{k}": v for k, v in retrieval.items()}
        if split.classes:
            classes = sorted(set(split.classes))
            weights = class_weights(self.embed_texts(params, classes)[:, None])
            labels = [classes.index(label) for label in split.classes]
            zero_shot = classification_metrics(predictions.image_embeddings, weights, labels)
            metrics |= {f"zero_shot/{k}": v for k, v in zero_shot.items()}
        captions = caption_metrics(predictions.captions, split.texts)
        return metrics | {f"caption/{k}": v for k, v in captions.items()}

    def evaluate(self, params, name):
        """Flat metrics of a split."""
        return self.score(params, name, self.predict(params, name))

    def floors(self, name):
        """What costs nothing: chance, and the nearest training drawing by its pixels."""
        split = self.split(name)
        chance = chance_metrics(split.texts, split.texts)
        floors = {"chance": {f"retrieval/{k}": v for k, v in chance.items()}}
        if split.classes:
            floors["chance"]["zero_shot/acc1"] = 1 / len(set(split.classes))
        if not self.config.eval.pixel_floor:
            return floors
        train = self.split(self.config.data.split)
        if set(split.texts) & set(train.texts):
            pixels = pixel_floor(train.images, train.texts, split.images, split.texts)
            floors["pixels"] = {f"retrieval/{k}": v for k, v in pixels.items()}
        return floors


def final_evaluation(evaluator, params, workdir, step):
    """Scores the final splits into results.json and samples.png; returns the results."""
    config = evaluator.config
    results = {
        "protocol": PROTOCOL,
        "mmgem_jax": mmgem_jax.__version__,
        "step": step,
        "data": config.data.name,
        "tokenizer": fingerprint(evaluator.tokenizer),
        "preprocessing": f"short side to {config.model.vision.image_size} (bicubic), centre crop, "
        "transparency on white",
        "prompt": "{" + config.eval.caption_field + "}",
        "decoding": {"method": "greedy", "length": config.data.caption_length},
        "config": config.to_dict(),
        "splits": {},
    }
    for name in config.eval.final_splits:
        predictions = evaluator.predict(params, name)
        results["splits"][name] = {
            "images": len(evaluator.split(name).images),
            "texts": len(predictions.names),
            "classes": len(set(evaluator.split(name).classes)),
            "metrics": evaluator.score(params, name, predictions),
            "floors": evaluator.floors(name),
        }
        if name == config.eval.sample_split:
            rows = samples(evaluator.split(name), predictions, config.eval.samples)
            title = f"{config.data.name}, {name}"
            draw_samples(Path(workdir) / "samples.png", rows, title)
    path = Path(workdir) / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def samples(split, predictions, count):
    """The same drawings every time: `count` of the split, evenly spaced in the order of names."""
    order = np.argsort(split.texts, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
    similarity = predictions.image_embeddings[chosen] @ predictions.text_embeddings.T
    rows = []
    for i, scores in zip(chosen, similarity, strict=True):
        nearest = np.argsort(-scores, kind="stable")[:3]
        neighbours = [(predictions.names[j], float(scores[j])) for j in nearest]
        rows.append(Sample(split.images[i], split.texts[i], predictions.captions[i], neighbours))
    return rows


def results_table(results):
    """The results as lines of text, with the floors beside them."""
    header = f"{'split':20s} {'':8s}" + "".join(f"{head:>9s}" for head, _ in COLUMNS)
    lines = [header]
    for name, split in results["splits"].items():
        rows = {"model": split["metrics"]} | split["floors"]
        for who, metrics in rows.items():
            cells = [metrics.get(key) for _, key in COLUMNS]
            cells = "".join(f"{'':>9s}" if c is None else f"{c:9.3f}" for c in cells)
            lines.append(f"{name if who == 'model' else '':20s} {who:8s}{cells}")
    return "\n".join(lines)
