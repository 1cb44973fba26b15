"""Sets that are published as tar files: CLIP_benchmark's WebDataset folders.

    classnames.txt                          a class a line, in the order of the labels
    zeroshot_classification_templates.txt   a prompt a line, with {c} for the class
    dataset_type.txt                        `retrieval`; may be absent for classification
    SPLIT/nshards.txt                       the number of tar files
    SPLIT/0.tar, SPLIT/1.tar, ...           KEY.webp, .png or .jpg, with KEY.cls or KEY.txt

A `.cls` is the label, a `.txt` has a caption a line. Tar files are indexed once and never unpacked.
"""

import hashlib
import tarfile
from pathlib import Path

from mmgem_jax.data.annotation_files import decoded, name_lines, read_file
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.examples import Dataset, captioned, labelled
from mmgem_jax.evaluation.prompts import check_templates

IMAGES = ("webp", "png", "jpg", "jpeg")  # the first of them that a sample has
ANNOTATIONS = ("cls", "txt")
TEMPLATES = "zeroshot_classification_templates.txt"
TYPES = {"classification": "cls", "retrieval": "txt"}


def webdataset(name: str, protocol: str, path: Path, split: str) -> Dataset:
    """A split of a folder as above.

    `annotation_hash` is over `classnames.txt`, then every `.cls` or `.txt` with a line's end.
    Raises UserError for anything that is missing or not as above.
    """
    shards = [path / split / f"{shard}.tar" for shard in range(_shard_count(path / split))]
    samples = [(shard, *sample) for shard in shards for sample in _index(shard).items()]
    if not samples:
        raise UserError(f"{path / split}: found no sample in the tar files, expected one or more")
    kind = _annotation(path, samples[0][2])

    digest = hashlib.sha256()
    class_names = _lines_if_there(path / "classnames.txt", digest)
    rows = []
    for shard, key, members in samples:
        where = f"{shard}: sample {key}"
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        if image is None or kind not in members:
            raise UserError(f"{where}: found {sorted(members)}, expected an image and {kind!r}")
        digest.update(members[kind] + b"\n")
        text = decoded(members[kind], where)
        if kind == "cls" and not text.strip().isdecimal():
            raise UserError(f"{where}: found the label {text[:20]!r}, expected a number from 0")
        annotation = int(text) if kind == "cls" else text.splitlines()
        rows.append((f"{shard.name}/{key}", image, annotation))
    if kind == "txt":
        return captioned(name, protocol, rows, digest.hexdigest(), read_part)
    templates = _lines_if_there(path / TEMPLATES)
    if templates:
        check_templates(str(path / TEMPLATES), templates)
    return labelled(name, protocol, rows, class_names, digest.hexdigest(), read_part, templates)


def read_part(place: tuple[Path, int, int]) -> bytes:
    """The bytes at a place (file, offset, size); UserError where the file ends before."""
    path, offset, size = place
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise UserError(f"{path}: ends at {offset + len(content)}, expected {size} from {offset}")
    return content


def _index(path: Path) -> dict[str, dict]:
    """The samples of a tar file by key: the place of an image, the bytes of an annotation."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members.clear()  # it would keep them all
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not (member.isfile() and stem and extension):
                    continue
                extension = extension.lower()
                sample = samples.setdefault(f"{folder}{slash}{stem}", {})
                if extension in sample:
                    raise UserError(f"{path}: found {member.name} twice, expected it once")
                if extension in ANNOTATIONS:
                    sample[extension] = archive.extractfile(member).read()
                else:
                    sample[extension] = (path, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: {error}; expected a whole tar file") from None
    return samples


def _annotation(path: Path, first: dict) -> str:
    """Which member of a sample annotates its image: what the folder says, else what there is."""
    file = path / "dataset_type.txt"
    if not file.exists():
        return "txt" if "txt" in first and "cls" not in first else "cls"
    found = decoded(read_file(file), file).strip().lower()
    if found not in TYPES:
        raise UserError(f"{file}: found {found!r}, expected one of {sorted(TYPES)}")
    return TYPES[found]


def _shard_count(folder: Path) -> int:
    file = folder / "nshards.txt"
    text = decoded(read_file(file), file).strip()
    if not text.isdecimal():
        raise UserError(f"{file}: found {text[:20]!r}, expected the number of tar files")
    return int(text)


def _lines_if_there(path: Path, digest=None) -> list[str]:
    return name_lines(read_file(path, digest), path) if path.exists() else []
