"""Cut a small set of the emoji packages, in the packages' own format, for tests without a network.

python tools/make_fixture.py --packages DIR --out tests/fixture/emoji

Takes concepts of `things` that every vendor draws, shortest drawings first, two a subgroup.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from mmgem_jax.data import emoji, emoji_sources

CONCEPTS = 40
A_SUBGROUP = 2
ALWAYS = "frog"  # emojione draws it under an alias
TO_BE_DROPPED = ("flag Japan", "keycap #", "nine-thirty")  # what the builder leaves out


def choose_concepts(packages) -> list[emoji_sources.Concept]:
    config = emoji.Emoji.builder_configs["things"]
    every = emoji_sources.read_concepts(packages)
    slugs = {concept.slug for concept in every}
    concepts = emoji.select_concepts(every, config)
    icons = [emoji_sources.find_icons(concepts, packages[v], slugs) for v in emoji_sources.VENDORS]
    drawn = [c for c in concepts if all(c.code in found for found in icons)]
    drawn.sort(key=lambda c: (c.name != ALWAYS, sum(len(found[c.code]["body"]) for found in icons)))
    taken, chosen = Counter(), []
    for concept in drawn:
        if taken[concept.subgroup] < A_SUBGROUP and len(chosen) < CONCEPTS:
            taken[concept.subgroup] += 1
            chosen.append(concept)
    return chosen


def trim_vendor(package, concepts) -> dict[str, dict]:
    icon_set, chars = package.json("icons.json"), package.json("chars.json")
    chars = {c.code: chars[c.code] for c in concepts if c.code in chars}
    keys = {c.slug for c in concepts} | set(chars.values())
    aliases = {k: v for k, v in icon_set.get("aliases", {}).items() if k in keys}
    keys |= {alias["parent"] for alias in aliases.values()}
    icons = {k: v for k, v in icon_set["icons"].items() if k in keys}
    info = package.json("info.json")
    return {
        "icons.json": {**icon_set, "icons": icons, "aliases": aliases},
        "chars.json": chars,
        "info.json": {key: info[key] for key in ("name", "author", "license")},
    }


def trim_names(packages, concepts) -> dict[str, dict[str, dict]]:
    codes = {c.code for c in concepts}
    names = {
        k: v
        for k, v in packages["names"].json("data-by-emoji.json").items()
        if emoji_sources.code_points(k) in codes or v["name"] in TO_BE_DROPPED
    }
    keywords = packages["keywords"].json("dist/emoji-en-US.json")
    kept = {emoji_sources.code_points(k) for k in names}
    details = [
        d
        for d in packages["subgroups"].json("en/data.json")
        if emoji_sources.code_points(d["emoji"]) in kept
    ]
    return {
        "names": {"data-by-emoji.json": names},
        "keywords": {"dist/emoji-en-US.json": {k: keywords[k] for k in names if k in keywords}},
        "subgroups": {
            "en/data.json": details,
            "meta/groups.json": packages["subgroups"].json("meta/groups.json"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    packages = emoji_sources.open_packages(args.packages)
    concepts = choose_concepts(packages)
    trimmed = trim_names(packages, concepts)
    trimmed |= {v: trim_vendor(packages[v], concepts) for v in emoji_sources.VENDORS}
    for key, files in trimmed.items():
        package = packages[key]
        manifest = package.json("package.json")
        fields = ("name", "version", "author", "license", "repository")
        files["package.json"] = {k: manifest[k] for k in fields if k in manifest}
        for inner, content in files.items():
            path = args.out / emoji_sources.package_stem(package.name, package.version) / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n")
    sources = [emoji.describe_source(key, package) for key, package in packages.items()]
    (args.out / "ATTRIBUTION.md").write_text(
        emoji.attribution(sources, "A few icons and entries of each package, otherwise unchanged.")
    )


if __name__ == "__main__":
    main()
