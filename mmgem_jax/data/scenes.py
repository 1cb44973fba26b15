"""The emoji scenes: several drawings of the emoji data set on a textured canvas, with texts.

Every object has a box, its name as the text and its subgroup as the category; every scene has a
sentence that says where each object is, and a long description. A split's drawings are those of a
split of the emoji, so what is held out there is held out here:

    split                     drawings of emoji
    train                     train (four vendors, mixed in a scene)
    validation                validation
    test                      test
    unseen                    unseen (held-out concepts)
    long, long_validation     test, validation

The splits long* hold pairs of scenes, such as long/17a and long/17b, that are alike but for one
object, or for two objects that change places. The descriptions of a pair are equal up to beyond
their 77th token: who reads no further cannot tell them apart.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mmgem_jax.data import array_records, emoji, scene_canvas
from mmgem_jax.data.scene_maker import Drawing, SceneMaker
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer
from mmgem_jax.errors import UserError

SOURCES = {
    "train": "train",
    "validation": "validation",
    "test": "test",
    "unseen": "unseen",
    "long": "test",
    "long_validation": "validation",
}
CHANGES = (
    "The drawings were then resized and composed into scenes, on canvases drawn for these scenes."
)


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """How many scenes each split has; in the splits long*, how many pairs of scenes."""

    scenes: dict[str, int] = dataclasses.field(default_factory=dict)


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of several emoji with boxes and texts; read without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (tfds reads a plain class attribute)
        ScenesConfig(
            name="things",
            description="Scenes of `emoji/things`.",
            scenes=dict(zip(SOURCES, (8000, 300, 500, 100, 200, 100), strict=True)),
        ),
        ScenesConfig(
            name="fixture",
            description="A few scenes of `emoji/fixture`, for tests.",
            scenes=dict(zip(SOURCES, (24, 8, 8, 8, 4, 4), strict=True)),
        ),
    ]

    def __init__(self, *, drawings: Path | None = None, seed: int = 0, **kwargs):
        """`drawings`: folder of the built emoji data set, to build; None to read."""
        self._drawings = drawings
        self._seed = seed
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        side = scene_canvas.SIDE
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{__doc__}\n{self.builder_config.description}",
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="jpeg"),
                    "regions": tfds.features.Sequence(
                        {"bbox": tfds.features.BBoxFeature(), "text": text, "category": text}
                    ),
                    "sentence": text,
                    "description": text,
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is fetched
        tokenizer = load_tokenizer(str(self._drawings / "tokenizer"))
        # tfds gives this folder its final name when all is written: half-built never looks built.
        folder = Path(self.data_dir)
        tokenizer.save_pretrained(folder / "tokenizer")
        page = (self._drawings / "ATTRIBUTION.md").read_text()
        (folder / "ATTRIBUTION.md").write_text(f"{page}\n{CHANGES}\n")
        self.info.metadata.update(
            seed=self._seed,
            scenes=self.builder_config.scenes,
            tokenizer=fingerprint(tokenizer),
        )
        makers = {
            source: SceneMaker(read_drawings(self._drawings, source), tokenizer)
            for source in set(SOURCES.values())
        }
        return {
            split: self._generate_examples(split, number, makers[source])
            for number, (split, source) in enumerate(SOURCES.items())
        }

    def _generate_examples(self, split, number, maker):
        for index in range(self.builder_config.scenes[split]):
            # A generator for each scene: none depends on how many come before it.
            rng = np.random.default_rng([self._seed, number, index])
            if split.startswith("long"):
                scenes = zip("ab", maker.pair(rng), strict=True)
            else:
                scenes = [("", maker.scene(rng))]
            for letter, scene in scenes:
                key = f"{split}/{index}{letter}"
                yield key, _record(key, scene)


def _record(key, scene):
    regions = [
        {
            "bbox": tfds.features.BBox(*thing.box),
            "text": thing.name,
            "category": drawing.subgroup,
        }
        for drawing, thing in zip(scene.drawings, scene.things, strict=True)
    ]
    return {
        "id": key,
        # A file object: tfds needs TensorFlow to encode an array.
        "image": io.BytesIO(scene_canvas.encode(scene.image)),
        "regions": regions,
        "sentence": scene.sentence,
        "description": scene.description,
    }


def read_drawings(folder: Path, split: str) -> dict[str, list[Drawing]]:
    """The drawings of a split of the emoji by concept, in an order of their own."""
    builder = read_only_builder.builder_from_directory(folder)
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split=split, decoders=decoders)
    by_concept = {}
    for record in sorted(records, key=lambda record: (record["concept"], record["vendor"])):
        concept, name, subgroup = (record[key].decode() for key in ("concept", "name", "subgroup"))
        drawing = Drawing(concept, name, subgroup, scene_canvas.trim(record["image"]))
        by_concept.setdefault(concept, []).append(drawing)
    return by_concept


def data_folder(data_dir: str, config: str) -> Path:
    """Where `build` puts the data set; the folder exists only when the data are built."""
    if config not in EmojiScenes.builder_configs:
        raise UserError(
            f"config: found {config!r}, expected one of {sorted(EmojiScenes.builder_configs)}"
        )
    return Path(data_dir) / "emoji_scenes" / config / str(EmojiScenes.VERSION)


def build(data_dir: str, config: str, seed: int = 0) -> Path:
    """Build the scenes where they are not built yet, of the drawings in the same `data_dir`.

    Returns the folder of the built data set. UserError where the drawings are not built, or the
    scenes were built with another `seed`.
    """
    if seed < 0:
        raise UserError(f"seed: found {seed}, expected 0 or more")
    folder, drawings = data_folder(data_dir, config), emoji.data_folder(data_dir, config)
    if folder.exists():
        built = read_only_builder.builder_from_directory(folder).info.metadata["seed"]
        if built != seed:
            raise UserError(
                f"seed: {folder} was built with {built}, found {seed}; delete that folder or give "
                "another data_dir"
            )
        return folder
    if not drawings.exists():
        raise UserError(
            f"data_dir: found no drawings in {drawings}; expected those of python "
            f"tools/build_emoji.py --data_dir {data_dir} --config {config}"
        )
    builder = EmojiScenes(data_dir=data_dir, config=config, drawings=drawings, seed=seed)
    array_records.write(builder)
    return folder
