"""Compare a detector's tags with the captions that people wrote of the same photos.

    python -m tools.tag_agreement DATASET DETECTOR [--append FILE] [--list]

DATASET: as `safelight prepare` makes it, of photos with captions. DETECTOR: as for `safelight caption
--tags-from-detector`, for the classes of COCO. Two figures for each least confidence:

- named: of the tags, how many the caption names: by the class's name, a synonym or kind of it (NAMES), or a word for
  what it belongs to (PARENTS). A caption need not name everything that can be seen, so this is less than how many are
  right.
- found: of the classes that captions name, by name, synonym or kind, how many became tags. Words such as orange, which
  are mostly a colour, are left out (COLOURS).

The tags of the dataset are written as the command writes them; --list prints each tag that its caption does not name.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from safelight.bench.core.results import append, make_record
from safelight.data.photo import Photo
from safelight.trainer.captioning.journal import Journal
from safelight.trainer.tagging.boxes import Box
from safelight.trainer.tagging.categories import DEFAULT_CATEGORIES
from safelight.trainer.tagging.tag_dataset import tag_dataset
from safelight.trainer.tagging.taggers import open_detector
from safelight.trainer.tagging.weights import tags_of_boxes
from safelight.trainer.tagging.yolox import COCO_NAMES

CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7)
# synonyms and kinds of COCO's classes, in the singular, where the plural has an s
NAMES = {
    "person": "person|people|human|man|men|woman|women|boy|girl|child|children|kid|baby|lady|guy|couple|family|crowd|"
    "model|player|surfer|skier|rider|cyclist|musician|dancer|worker|bride|groom|face|portrait|hand|tourist|hiker|"
    "pedestrian|astronaut|swimmer|climber|silhouette|someone|passenger|fisherman|farmer|monk|runner",
    "bicycle": "bicycle|bike",
    "car": "car|suv|van|taxi|convertible|sedan|beetle|jeep|limousine|coupe",
    "motorcycle": "motorcycle|motorbike|scooter|moped",
    "airplane": "airplane|aeroplane|plane|aircraft|jet|biplane",
    "bus": "bus|buses|coach",
    "train": "train|locomotive|tram|tramcar",
    "truck": "truck|lorry|lorries|pickup|tractor",
    "boat": "boat|ship|sailboat|yacht|canoe|kayak|gondola|ferry|ferries|dinghy|vessel|raft",
    "bird": "bird|parrot|macaw|owl|eagle|duck|swan|goose|geese|gull|seagull|hen|rooster|cockerel|chick|chicken|penguin|"
    "pigeon|peacock|flamingo|heron|sparrow|robin|hawk|falcon|crow|hummingbird|pelican|stork|turkey|toucan|finch|"
    "kingfisher|ostrich|ostriches",
    "cat": "cat|kitten|tabby",
    "dog": "dog|puppy|puppies|corgi|retriever|terrier|poodle|husky|huskies|dachshund|labrador|"
    "spaniel|beagle|collie|pug",
    "horse": "horse|pony|ponies|foal|mare|stallion",
    "sheep": "sheep|lamb|ram|ewe",
    "cow": "cow|cattle|bull|calf|calves|ox|oxen|bison|buffalo",
    "bear": "bear|panda|grizzly",
    "bench": "bench|benches",
    "stop sign": "stop sign",
    "backpack": "backpack|rucksack|knapsack|bag",
    "umbrella": "umbrella|parasol",
    "handbag": "handbag|purse|bag|tote",
    "tie": "tie|necktie|bow tie|bowtie",
    "suitcase": "suitcase|luggage|briefcase|trunk",
    "sports ball": "ball|football|basketball|baseball|volleyball|soccer ball|tennis ball",
    "skis": "ski|skis",
    "bottle": "bottle|flask",
    "wine glass": "wine glass|wine glasses|glass of wine|glasses of wine|goblet|champagne glass|glass|glasses",
    "cup": "cup|mug|teacup|tumbler|coffee|tea|latte|cappuccino|espresso|tankard",
    "knife": "knife|knives",
    "bowl": "bowl|dish|dishes",
    "sandwich": "sandwich|sandwiches|burger|hamburger|toast|bagel|panini",
    "hot dog": "hot dog|hotdog|sausage",
    "cake": "cake|cupcake|cheesecake|gateau|tart|muffin|pastry|pastries",
    "donut": "donut|doughnut",
    "chair": "chair|armchair|stool|seat|recliner",
    "couch": "couch|couches|sofa|settee|loveseat",
    "potted plant": "potted plant|plant|houseplant|flowerpot|plant pot|succulent|cactus|cacti|pot|bonsai",
    "bed": "bed|mattress|bedding|duvet",
    "dining table": "table|tabletop|desk|countertop",
    "tv": "tv|television|monitor|screen",
    "laptop": "laptop|notebook computer|computer|macbook",
    "mouse": "computer mouse|mouse|mice",
    "remote": "remote|remote control",
    "keyboard": "keyboard",
    "cell phone": "phone|smartphone|cellphone|mobile|iphone",
    "refrigerator": "refrigerator|fridge",
    "book": "book|notebook|magazine|album",
    "clock": "clock|watch|watches|alarm clock",
    "vase": "vase|urn|jug|pitcher|amphora",
    "scissors": "scissors",
    "teddy bear": "teddy bear|teddy|plush|plushie|stuffed animal|stuffed toy|soft toy|cuddly toy|stuffed",
    "hair drier": "hair drier|hair dryer|hairdryer",
    "toothbrush": "toothbrush|toothbrushes",
    "orange": "orange|tangerine|mandarin|clementine|satsuma",
}
PARENTS = {
    **dict.fromkeys(
        ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"), "animal|pet"
    ),
    **dict.fromkeys(("car", "bus", "truck", "motorcycle", "bicycle", "train"), "vehicle|traffic"),
    **dict.fromkeys(("banana", "apple", "orange"), "fruit|food"),
    **dict.fromkeys(("broccoli", "carrot"), "vegetable|food|salad"),
    **dict.fromkeys(("sandwich", "hot dog", "pizza", "donut", "cake"), "food|meal|dessert|snack|breakfast"),
    **dict.fromkeys(("chair", "couch", "bed", "dining table"), "furniture"),
    **dict.fromkeys(("fork", "knife", "spoon"), "cutlery|silverware"),
    **dict.fromkeys(("cup", "bowl", "bottle"), "tableware|crockery|drink"),
    "teddy bear": "toy|doll",
    "airplane": "vehicle",
    "potted plant": "flower|greenery",
}
COLOURS = {"orange"}


def mentions(text: str, names: str) -> bool:
    """Return whether a text has one of the names, or its plural in s, as a word."""
    return bool(names) and re.search(rf"\b(?:{names})s?\b", text.lower()) is not None


def agreement(photos: Iterable[Photo], boxes_of: dict[str, list[Box]], confidence: float) -> tuple[dict, list[str]]:
    """Return (figures, a line for each tag that its caption does not name)."""
    tags, named, categories, right_categories, said, found = (Counter() for _ in range(6))
    unnamed = []
    for photo in photos:
        text = " ".join(photo.captions)
        classes = {box.name for box in boxes_of[photo.sha256] if box.confidence >= confidence}
        hits = {name for name in COCO_NAMES if mentions(text, NAMES.get(name, name))}
        for name in classes:
            tags[name] += 1
            named[name] += (is_named := name in hits or mentions(text, PARENTS.get(name, "")))
            if not is_named:
                unnamed.append(f"{photo.source}\t{name}\t{text}")
        for tag in tags_of_boxes(boxes_of[photo.sha256], DEFAULT_CATEGORIES, confidence):
            if tag.name in DEFAULT_CATEGORIES.things:
                words = [name for name in DEFAULT_CATEGORIES.things[tag.name] if name in COCO_NAMES]
                parents = "|".join(filter(None, (tag.name, *(PARENTS.get(word, "") for word in words))))
                categories[tag.name] += 1
                right_categories[tag.name] += bool(hits.intersection(words)) or mentions(text, parents)
        for name in hits - COLOURS:
            said[name] += 1
            found[name] += name in classes
    figures = {
        "tags": tags.total(),
        "tags_named_in_caption": named.total(),
        "named": round(named.total() / max(1, tags.total()), 4),
        "category_tags": categories.total(),
        "category_named": round(right_categories.total() / max(1, categories.total()), 4),
        "classes_in_captions": said.total(),
        "classes_found": found.total(),
        "found": round(found.total() / max(1, said.total()), 4),
        "by_class": {name: [num, named[name], said[name], found[name]] for name, num in tags.most_common(12)},
    }
    return figures, unnamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("detector")
    parser.add_argument("--append", type=Path, help="append the figures to this file of result lines")
    parser.add_argument("--note", default="", help="stands in the result line")
    parser.add_argument("--list", action="store_true", help="print the tags at 0.5 that captions do not name")
    options = parser.parse_args()
    device = torch.device("cpu")
    summary = tag_dataset(options.dataset, open_detector(options.detector), DEFAULT_CATEGORIES, 0.5, device)
    with open_detector(options.detector) as source:
        boxes_of = Journal(options.dataset, source.record, summary.photos, source.form).said
    photos = [photo for photo in summary.photos if photo.sha256 in boxes_of and any(photo.captions)]
    figures: dict = {}
    for confidence in CONFIDENCES:
        figures[f"at_{confidence}"], unnamed = agreement(photos, boxes_of, confidence)
        shown = {name: value for name, value in figures[f"at_{confidence}"].items() if name != "by_class"}
        print(f"at least {confidence}: {shown}")
        if options.list and confidence == 0.5:
            print("\n".join(unnamed))
    config = {"detector": Path(options.detector).name, "photographs": len(photos)}
    if options.append:
        append(options.append, make_record("tag_agreement", config, figures, device, options.note))


if __name__ == "__main__":
    main()
