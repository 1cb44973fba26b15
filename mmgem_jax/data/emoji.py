"""The emoji data set: the same concepts drawn by six vendors, with human-written names.

Train on four vendors, choose settings on a fifth, test once on a sixth that was never seen:

    split              vendors                             concepts
    train              noto, noto-v1, twemoji, openmoji    not held out
    validation         emojione                            not held out
    test               fluent-emoji-flat                   not held out
    unseen             fluent-emoji-flat                   held out
    unseen_validation  emojione                            held out
"""

import dataclasses
import hashlib
import io
import re
import tempfile
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from mmgem_jax.data import array_records, emoji_sources, tokenizer
from mmgem_jax.data.emoji_sources import Concept, Package
from mmgem_jax.errors import UserError

SIZE = 64
TRAIN_VENDORS = ("noto", "noto-v1", "twemoji", "openmoji")
VALIDATION_VENDOR = "emojione"
TEST_VENDOR = "fluent-emoji-flat"
THINGS = ("Objects", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities")


@dataclasses.dataclass
class EmojiConfig(tfds.core.BuilderConfig):
    """Which concepts are in, how many are held out, and how many drawings each vendor must give."""

    groups: tuple[str, ...] | None = None  # None: all
    without_subgroups: tuple[str, ...] = ()
    unseen: int = 0
    drawings: dict[str, int] = dataclasses.field(default_factory=dict)


def _drawings(*counts: int) -> dict[str, int]:
    return dict(zip(emoji_sources.VENDORS, counts, strict=True))


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Drawings of emoji with names, keywords and subgroups; read without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (tfds reads a plain class attribute)
        EmojiConfig(
            name="things",
            description="Objects, animals, food, places and activities, without clock faces.",
            groups=THINGS,
            without_subgroups=("time",),
            unseen=80,
            drawings=_drawings(830, 617, 830, 830, 618, 822),
        ),
        EmojiConfig(
            name="all",
            description="Every emoji but flags.",
            unseen=150,
            drawings=_drawings(1643, 1208, 1643, 1643, 1079, 1585),
        ),
        EmojiConfig(
            name="fixture",
            description="A few concepts of `things`, for tests.",
            groups=THINGS,
            without_subgroups=("time",),
            unseen=6,
            drawings=_drawings(40, 40, 40, 40, 40, 40),
        ),
    ]

    def __init__(self, *, packages: str | None = None, vocab_size: int = 2048, **kwargs):
        """`packages`: a local folder of the npm packages, fetched when None."""
        self._packages = packages
        self._vocab_size = vocab_size
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{__doc__}\n{self.builder_config.description}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 4), encoding_format="png"),
                    "name": text,
                    "keywords": tfds.features.Sequence(text),
                    "subgroup": text,
                    "group": text,
                    "concept": text,
                    "vendor": text,
                    "licence": text,
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # the packages come by npm, which verifies their checksums itself
        concepts, icons, sources = self._pair()
        held = held_out(icons[TEST_VENDOR], self.builder_config.unseen)
        concepts = without_names(concepts, {c.name for c in concepts if c.code in held})
        self._write_beside(concepts, icons, held, sources)
        licences = {source["role"]: source["licence"] for source in sources}

        def drawings(vendors, unseen=False):
            for vendor in vendors:
                for concept in concepts:
                    icon = icons[vendor].get(concept.code)
                    if icon is not None and (concept.code in held) == unseen:
                        yield vendor, licences[vendor], concept, icon

        return {
            "train": self._generate_examples(drawings(TRAIN_VENDORS)),
            "validation": self._generate_examples(drawings([VALIDATION_VENDOR])),
            "test": self._generate_examples(drawings([TEST_VENDOR])),
            "unseen": self._generate_examples(drawings([TEST_VENDOR], unseen=True)),
            "unseen_validation": self._generate_examples(
                drawings([VALIDATION_VENDOR], unseen=True)
            ),
        }

    def _pair(self) -> tuple[list[Concept], dict[str, dict], list[dict[str, str]]]:
        """The concepts, each vendor's icons by concept, and where all of it comes from."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(self._packages or scratch)
            if not self._packages:
                emoji_sources.fetch_packages(folder)
            packages = emoji_sources.open_packages(folder)
            every = emoji_sources.read_concepts(packages)
            concepts = select_concepts(every, self.builder_config)
            slugs = {concept.slug for concept in every}
            icons = {
                vendor: emoji_sources.find_icons(concepts, packages[vendor], slugs)
                for vendor in emoji_sources.VENDORS
            }
            sources = [describe_source(key, package) for key, package in packages.items()]
        for vendor, expected in self.builder_config.drawings.items():
            if len(icons[vendor]) != expected:
                raise UserError(
                    f"{vendor}: found {len(icons[vendor])} drawings for {len(concepts)} concepts, "
                    f"expected {expected} (config {self.builder_config.name!r})"
                )
        return concepts, icons, sources

    def _write_beside(self, concepts, icons, held: set[str], sources) -> None:
        """Attribution, metadata and the tokenizer of the training texts, beside the records."""
        # tfds gives this folder its final name when all is written: half-built never looks built.
        folder = Path(self.data_dir)
        change = (
            f"The drawings were rasterised to {SIZE}x{SIZE} pixels and are otherwise unchanged."
        )
        (folder / "ATTRIBUTION.md").write_text(attribution(sources, change))
        seen = {code for vendor in TRAIN_VENDORS for code in icons[vendor]} - held
        texts = [t for c in concepts if c.code in seen for t in (c.name, *c.keywords, c.subgroup)]
        tokenizer.train_bpe(texts, self._vocab_size).save_pretrained(folder / "tokenizer")
        self.info.metadata.update(
            sources=sources, held_out=sorted(held), vocab_size=self._vocab_size
        )

    def _generate_examples(self, drawings):
        for vendor, licence, concept, icon in drawings:
            yield (
                f"{vendor}/{concept.code}",
                {
                    # A file object: tfds needs TensorFlow to encode an array.
                    "image": io.BytesIO(emoji_sources.rasterise(icon, SIZE)),
                    "name": concept.name,
                    "keywords": concept.keywords,
                    "subgroup": concept.subgroup,
                    "group": concept.group,
                    "concept": concept.code,
                    "vendor": vendor,
                    "licence": licence,
                },
            )


def held_out(codes, count: int) -> set[str]:
    """The concepts kept from training for every vendor: the first `count` by sha256 of their id."""
    return set(sorted(codes, key=lambda c: hashlib.sha256(c.encode()).hexdigest())[:count])


def select_concepts(concepts: list[Concept], config: EmojiConfig) -> list[Concept]:
    """The config's concepts; UserError where two share a name."""
    chosen = [
        c
        for c in concepts
        if (config.groups is None or c.group in config.groups)
        and c.subgroup not in config.without_subgroups
    ]
    name, times = Counter(c.name for c in chosen).most_common(1)[0]
    if times > 1:
        raise UserError(f"names: {name!r} found {times} times, expected one concept a name")
    return chosen


def without_names(concepts: list[Concept], names: set[str]) -> list[Concept]:
    """The concepts, less the keywords that are held-out names: "tiger" is one of "tiger face"."""
    return [
        dataclasses.replace(c, keywords=tuple(k for k in c.keywords if k not in names))
        for c in concepts
    ]


def describe_source(role: str, package: Package) -> dict[str, str]:
    """Title, author and licence of a package, as it states them itself."""
    source = {"role": role, "package": f"{package.name}@{package.version}"}
    if role in emoji_sources.VENDORS:
        info = package.json("info.json")
        return source | {
            "title": info["name"],
            "author": f"{info['author']['name']} ({info['author']['url']})",
            "licence": info["license"]["spdx"],
            "licence_url": info["license"]["url"],
        }
    manifest = package.json("package.json")
    return source | {
        "title": manifest["name"],
        "author": manifest["author"],
        "licence": manifest["license"],
        "licence_url": re.sub(
            r".*github\.com[:/](.+?)(\.git)?$",
            r"https://github.com/\1",
            manifest["repository"]["url"],
        ),
    }


def attribution(sources: list[dict[str, str]], change: str) -> str:
    """A Markdown page that names every source, its author and its licence, and what was changed."""
    columns = ("role", "package", "title", "author", "licence", "licence_url")
    rows = [" | ".join(source[column] for column in columns) for source in sources]
    return "\n".join(
        [
            "# Attribution",
            "",
            f"{change} Each drawing keeps its vendor's licence. Names, keywords and subgroups come "
            "from the last three packages.",
            "",
            "| vendor or role | package | title | author | licence | licence text or project |",
            "|---|---|---|---|---|---|",
            *(f"| {row} |" for row in rows),
            "",
        ]
    )


def data_folder(data_dir: str, config: str) -> Path:
    """Where `build` puts the data set; the folder exists only when the data are built."""
    if config not in Emoji.builder_configs:
        raise UserError(
            f"config: found {config!r}, expected one of {sorted(Emoji.builder_configs)}"
        )
    return Path(data_dir) / "emoji" / config / str(Emoji.VERSION)


def build(data_dir: str, config: str, packages: str | None = None, vocab_size: int = 2048) -> Path:
    """Build the data set where it is not built yet; returns the folder of the built data set.

    `packages`: a local folder of the npm packages; None fetches them. UserError where packages are
    missing or not as expected, or the data were built with another `vocab_size`.
    """
    folder = data_folder(data_dir, config)
    builder = Emoji(data_dir=data_dir, config=config, packages=packages, vocab_size=vocab_size)
    if folder.exists():
        if (built := builder.info.metadata["vocab_size"]) != vocab_size:
            raise UserError(
                f"vocab_size: {folder} was built with {built}, found {vocab_size}; delete that "
                "folder or give another data_dir"
            )
        return folder
    if config == "fixture" and not packages:
        raise UserError("packages: nothing given, expected the local folder tests/fixture/emoji")
    array_records.write(builder)
    return folder
