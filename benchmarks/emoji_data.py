"""Make the captioned emoji that the text-to-image student is trained on: pictures of Noto Emoji, phrases for each.

The phrases come from the names and aliases of the Python package `emoji` and from the names and keywords of Unicode's
CLDR. One phrase of every picture that has enough of them is held out: nobody trains on it, so that it tells whether
a model has learnt words or lines.

Run: npm pack cldr-annotations-full cldr-annotations-derived-full, unpack both into FOLDER/, pip install emoji, then
     python -m benchmarks.emoji_data --images noto_emoji_64.npz --cldr FOLDER --out benchmarks/data/noto_emoji_64.npz
"""

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import click
import numpy as np

# Ways to say the same. A phrase gets one of them, by a seeded draw; the plain phrase is always there.
TEMPLATES = ("an emoji of {}", "a picture of {}", "an icon of {}", "a drawing of {}", "{} on white")
# Most phrases of one picture: names first, then keywords. A few pictures have fifty keywords.
MOST = 14
# Pictures that may share a phrase which stands alone.
MOST_SHARED = 3
# A picture gives a phrase away to the held-out set when it has at least this many.
ENOUGH = 4


@click.command()
@click.option(
    "--images", type=click.Path(exists=True, path_type=Path), required=True, help="Pictures and codepoints."
)
@click.option(
    "--cldr", type=click.Path(exists=True, path_type=Path), required=True, help="Unpacked CLDR packages."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .npz to write.")
def main(images: Path, cldr: Path, out: Path) -> None:
    """Write pictures, labels and captions into one file."""
    with np.load(images) as file:
        arrays = {name: file[name] for name in ("images", "labels", "class_names", "codepoints")}
    annotations = read_annotations(cldr)
    texts = [as_text(codepoints) for codepoints in arrays["codepoints"]]
    groups = [str(arrays["class_names"][label]) for label in arrays["labels"]]
    captions, held_out = make_captions(texts, groups, annotations)
    del arrays["codepoints"]
    np.savez_compressed(out, **arrays, captions=captions, held_out_captions=held_out)
    phrases, given_away = np.count_nonzero(captions != ""), np.count_nonzero(held_out != "")
    click.echo(f"{out}: {len(texts)} pictures, {phrases} captions, {given_away} held out")


def read_annotations(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """CLDR's English name and keywords of every emoji, by the emoji without variation selectors."""
    found = {}
    for file in sorted(folder.rglob("en/annotations.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        annotations = body.get("annotations") or body["annotationsDerived"]
        for text, entry in annotations["annotations"].items():
            name = entry.get("tts", [""])[0]
            found[text.replace("\ufe0f", "")] = (name, entry.get("default", []))
    if not found:
        raise click.UsageError(f"{folder} holds no en/annotations.json; unpack the two CLDR packages there")
    return found


def as_text(codepoints: str) -> str:
    """The emoji of codepoints in hexadecimal, joined by underscores."""
    return "".join(chr(int(code, 16)) for code in codepoints.split("_"))


def make_captions(texts, groups, annotations) -> tuple[np.ndarray, np.ndarray]:
    """Phrases to train on (N, P), with "" where a picture has fewer, and one to test on (N,), or ""."""
    named = [phrases(text, annotations) for text in texts]
    counts = Counter(phrase.lower() for phrases_of_one in named for phrase in phrases_of_one)
    draw = random.Random(0)
    rows, held_out = [], []
    for phrases_of_one, group in zip(named, groups, strict=True):
        # What many pictures are called ("face") says too little alone; two or three such words together do.
        telling = [phrase for phrase in phrases_of_one if counts[phrase.lower()] <= MOST_SHARED]
        telling = telling or phrases_of_one[:1]
        vague = [phrase for phrase in phrases_of_one if phrase not in telling]
        test = ""
        if len(telling) >= ENOUGH:
            # Not the first, which is what the picture is called.
            alone = [phrase for phrase in telling[1:] if counts[phrase.lower()] == 1]
            test = draw.choice(alone) if alone else ""
        kept = [phrase for phrase in telling if phrase != test][:MOST]
        spoken = [draw.choice(TEMPLATES).format(with_article(phrase)) for phrase in kept[:3]]
        words = [phrase for phrase in kept[1:] + vague if " " not in phrase]
        joined = (
            [" ".join(draw.sample(words, min(3, len(words)))) for _ in range(2)] if len(words) > 1 else []
        )
        rows.append([*kept, *spoken, *joined, with_article(kept[0]), f"{kept[0]}, {group.lower()}"])
        held_out.append(test)
    captions = np.full((len(rows), max(map(len, rows))), "", f"<U{max(len(c) for row in rows for c in row)}")
    for row, given in zip(captions, rows, strict=True):
        row[: len(given)] = given
    return captions, np.array(held_out)


def with_article(phrase: str) -> str:
    """The phrase as one thing: "an apple"; as it is where it begins with no letter or looks like many."""
    if not phrase[0].isalpha() or phrase.endswith("s"):
        return phrase
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def phrases(text: str, annotations) -> list[str]:
    """What an emoji is called, the most usual name first, each once."""
    name, keywords = annotations.get(text, ("", []))
    entry = package_entries().get(text, {"en": ""})
    aliases = [as_phrase(alias) for alias in [entry["en"], *entry.get("alias", [])]]
    given = [name, *aliases, *keywords]
    found: dict[str, str] = {}  # in lower case -> as written first
    for phrase in given:
        phrase = re.sub(r"\s+", " ", re.sub("[“”]", "", phrase)).strip()
        if any(letter.isalnum() for letter in phrase):
            found.setdefault(phrase.lower(), phrase)
    return list(found.values())


@cache
def package_entries() -> dict[str, dict]:
    """The entries of the package `emoji`, by the emoji without variation selectors."""
    import emoji

    return {text.replace("\ufe0f", ""): entry for text, entry in emoji.EMOJI_DATA.items()}


def as_phrase(name: str) -> str:
    """`:red_apple:` as words."""
    return re.sub(r"[_:\-]+", " ", name).strip()


if __name__ == "__main__":
    main()
