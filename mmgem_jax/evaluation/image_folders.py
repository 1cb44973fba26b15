"""Classification sets that are published as a folder of images for every class."""

import hashlib
from pathlib import Path

from mmgem_jax.data.annotation_files import name_lines, read_file
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.examples import Dataset, labelled

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
CLASS_NAMES = "classnames.txt"


def imagenet(name: str, path: Path, split: str) -> Dataset:
    """ImageNet's validation set: 50,000 images in 1,000 folders, such as `val/n01440764/`.

    The 1,000 folders are in `path` or in its folder `val`. Where there is no `classnames.txt`, the
    class names are the folders': no words to prompt with.
    """
    if split not in ("", "val"):
        raise UserError(f"split: found {split!r} of {name}, expected 'val'")
    split = "val" if (path / "val").is_dir() else ""
    return image_folder(name, "imagenet1k-val-50k", path, split)


def image_folder(name: str, protocol: str, path: Path, split: str) -> Dataset:
    """A folder an image class, sorted, below `path` or below its folder `split`.

    Folders that are all numbers are sorted as such, as ImageNetV2's labels are. `classnames.txt` in
    `path` names the classes, a line each in that order; without it the folders' names do.
    `annotation_hash` is over the images' paths below the folder, a line each, and that file.
    """
    root = path / split
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a folder of images for every class")
    folders = [entry for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."]
    numbered = all(folder.name.isdecimal() for folder in folders)
    folders.sort(key=lambda folder: (int(folder.name) if numbered else 0, folder.name))
    if not folders:
        raise UserError(f"{root}: found no folder, expected one of images for every class")

    digest = hashlib.sha256()
    rows = []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{folder}: found no image, expected one or more of the class")
        for file in files:
            key = file.relative_to(root).as_posix()
            digest.update(f"{key}\n".encode())
            rows.append((key, file, label))

    class_names = [folder.name for folder in folders]
    if (path / CLASS_NAMES).exists():
        class_names = name_lines(read_file(path / CLASS_NAMES, digest), path / CLASS_NAMES)
        if len(class_names) != len(folders):
            raise UserError(
                f"{path / CLASS_NAMES}: found {len(class_names)} names for the {len(folders)} "
                f"folders of {root}, expected a line for each"
            )
    return labelled(name, protocol, rows, class_names, digest.hexdigest())
