"""The words a class is asked for with: class names and templates, ours or from files.

Files are those of CLIP_benchmark: JSON objects by data set, of lists of class names and of lists of
templates with `{c}` where the class name goes.
"""

from collections.abc import Sequence
from pathlib import Path

from mmgem_jax.data.annotation_files import parse_json, read_file
from mmgem_jax.errors import UserError

PLACE = "{c}"
DEFAULT_TEMPLATES = ("{c}", "a photo of a {c}", "a picture of the {c}", "an image with {c} in it")


def load_class_names(path: str | Path, dataset: str) -> list[str]:
    """The class names of a data set, in the order of its labels, as in `en_classnames.json`.

    Names may occur twice, as two of ImageNet's do. Raises UserError where the file is missing or
    not of that format, or has no such data set.
    """
    return _texts(Path(path), dataset, "class names")


def load_templates(path: str | Path, dataset: str) -> list[str]:
    """The templates of a data set, as in `en_zeroshot_classification_templates.json`.

    Raises UserError where the file is missing or not of that format, has no such data set, or a
    template has no `{c}`.
    """
    templates = _texts(Path(path), dataset, "templates")
    check_templates(f"{path}: {dataset}", templates)
    return templates


def check_templates(where: str, templates: Sequence[str]) -> None:
    """Raises UserError where there is no template, or one of them has no place for the class."""
    for template in templates:
        if PLACE not in template:
            raise UserError(f"{where}: found the template {template!r}, expected {PLACE} in it")
    if not templates:
        raise UserError(f"{where}: found no template, expected one or more")


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of a class, one a template."""
    return [template.replace(PLACE, name) for template in templates]


def _texts(path: Path, dataset: str, what: str) -> list[str]:
    content = parse_json(read_file(path), path)
    if not isinstance(content, dict) or dataset not in content:
        known = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: found {known}, expected {what} of {dataset!r}")
    texts = content[dataset]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{path}: {dataset}: found {texts!r:.60}, expected a list of {what}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {dataset}: found {text!r:.60}, expected a text")
    return texts
