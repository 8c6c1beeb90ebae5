"""The demo's sentences: `python -m unipelt.demo.sentences FOLDER` writes `train.tsv` and `test.tsv`.

Each sentence names a living thing and an object, and says that one of them was sold. The label is 1 if the living
thing was sold. No animal and no object of the test file is in the train file, so a model must know the meaning of the
words. Every word is in sentences of both labels, so a model must also read which thing was sold.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from unipelt.files.atomic import write_whole

ANIMALS = {
    "train": (
        "dog horse goat rabbit hen pig parrot donkey turtle hamster sheep lizard pony snake swan ferret kitten llama "
        "crab duck monkey bull canary salmon frog mouse raven"
    ),
    "test": "cat cow pigeon calf lamb puppy tortoise camel lobster chicken squirrel deer fox goose",
}
OBJECTS = {
    "train": (
        "hammer lamp bicycle table kettle saw guitar wagon clock ladder piano mirror tractor camera drum bucket sofa "
        "tent radio boat rope shovel printer wheelbarrow desk bench helmet"
    ),
    "test": "chair drill violin lorry pan carpet scooter laptop needle barrow stove wardrobe trumpet bottle",
}
PEOPLE = (
    "the farmer",
    "my aunt",
    "our neighbour",
    "the old man",
    "her brother",
    "the teacher",
    "a friend of mine",
    "the new owner",
    "my sister",
    "the baker",
)
FRAMES = (
    "{person} sold the {sold} and kept the {kept}.",
    "{person} kept the {kept} and sold the {sold}.",
    "{person} sold the {sold}, but not the {kept}.",
    "It was the {sold}, not the {kept}, that {person} sold.",
    "Instead of the {kept}, {person} sold the {sold}.",
    "{person} sold the {sold} and still has the {kept}.",
)
ROWS = {"train": 400, "test": 200}


def sentences(split: str) -> list[tuple[str, int]]:
    """Return the sentences of `train` or `test` with their labels, all different, in a fixed random order."""
    draw = random.Random(split)
    animals, objects = ANIMALS[split].split(), OBJECTS[split].split()
    drawn: dict[str, int] = {}
    while len(drawn) < ROWS[split]:
        label = len(drawn) % 2
        animal, thing = draw.choice(animals), draw.choice(objects)
        sold, kept = (animal, thing) if label else (thing, animal)
        text = draw.choice(FRAMES).format(person=draw.choice(PEOPLE), sold=sold, kept=kept)
        drawn.setdefault(text[0].upper() + text[1:], label)
    return draw.sample(list(drawn.items()), len(drawn))


def main(arguments: Sequence[str]) -> None:
    """Write both files into the folder `arguments[0]`, which must exist."""
    for split in ROWS:
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences(split))]
        write_whole(Path(arguments[0]) / f"{split}.tsv", "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
