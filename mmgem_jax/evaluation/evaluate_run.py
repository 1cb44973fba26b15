"""A trained run on a data set: one result that says how it came about."""

from mmgem_jax import processes, run, sharding
from mmgem_jax.evaluation import results, tasks
from mmgem_jax.evaluation.caption_scores import write_coco_results
from mmgem_jax.evaluation.predictor import Predictor
from mmgem_jax.evaluation.progress import not_shown


def make_predictor(trained, decoding, seed=0, watch=not_shown):
    """The Predictor of a TrainedRun; programs are kept where its config says."""
    run.keep_programs(trained.config)
    parts = trained.config, trained.model, trained.tokenizer, trained.mesh
    return Predictor(*parts, decoding, seed, watch)


def evaluate_run(trained, predictor, dataset, asked, split="", caption_files=()):
    """Asks a run the tasks on a data set.

    Args:
      trained: a TrainedRun.
      predictor: its `make_predictor`.
      dataset: a Dataset that `tasks.check` lets pass.
      asked: Asked.
      split: as asked for, for the result.
      caption_files: mapping from `caption` and `region_caption` to where their captions are
        written, in the format of COCO's results.

    Of several processes all ask, and the first writes and scores captions.

    Returns:
      The result: its stamp, and last of all its `metrics`, flat `task/metric`.

    Raises:
      UserError: what was asked cannot be scored.
    """
    facts = [dataset.protocol, dataset.annotation_hash, list(dataset.missing)]
    processes.check_same(f"data set {dataset.name}", facts)
    with sharding.use_mesh(trained.mesh):
        predictions = tasks.predict(predictor, trained.params, dataset, asked)

        def write_captions():
            for task, path in dict(caption_files).items():
                write_coco_results(path, *keyed_captions(dataset, predictions, task))

        # Before they are scored, which may fail for want of Java.
        processes.on_first(write_captions)
        metrics, how = tasks.score(predictor, trained.params, dataset, asked, predictions)
        result = results.data_stamp(dataset, asked, predictor, predictions.truncated)
        result |= {"split": split} | {f"{task}_scores": of_task for task, of_task in how.items()}
        parts = trained.config, trained.tokenizer, trained.params, trained.step
        result |= results.model_stamp(*parts)
    return result | {"metrics": metrics}


def keyed_captions(dataset, predictions, task):
    """The keys and the captions of what a task captions: whole images, or regions."""
    if task == "region_caption":
        return dataset.regions.keys, predictions.regions.captions
    return dataset.image_keys, predictions.captions
