"""CHAIR: how many of the objects that captions name are not in the pictures.

named_objects("a man and two dogs on a sofa")         # ["person", "dog", "couch"]
chair(captions, references, objects_of(image_ids, "annotations/instances_val2017.json"))

Caption Hallucination Assessment with Image Relevance (Rohrbach et al., 2018, arXiv:1809.02156). The
objects are the 80 categories of COCO. An object is in a picture if COCO's instances or one of the
reference captions say so. The word lists are this project's own.
"""

import json
from pathlib import Path

from captioning.base.tokens import tokenize
from captioning.data.coco import DataError

# Category: the words and phrases that name it, in the singular.
WORDS = {
    "person": "person, man, woman, boy, girl, child, kid, baby, toddler, infant, guy, lady, adult, "
    "gentleman, teenager, player, skier, snowboarder, surfer, skateboarder, skater, biker, rider, "
    "bicyclist, cyclist, motorcyclist, batter, pitcher, catcher, umpire, swimmer, pedestrian, "
    "officer, policeman, chef, waiter, waitress, farmer, worker, driver, passenger, soldier, "
    "bride, groom, couple, crowd, family, people, mother, father, daughter, son, brother, sister",
    "bicycle": "bicycle, bike",
    "car": "car, automobile, sedan, suv, van, minivan, taxi, cab, jeep",
    "motorcycle": "motorcycle, motorbike, motor bike, dirt bike, dirtbike, scooter, moped",
    "airplane": "airplane, plane, aeroplane, jet, jetliner, airliner, aircraft, biplane, seaplane",
    "bus": "bus, double decker, double-decker, double decker bus, double-decker bus, minibus",
    "train": "train, locomotive, subway train, tram, trolley, freight train, passenger train",
    "truck": "truck, lorry, pickup, pick-up, fire engine, firetruck, semi truck, tow truck",
    "boat": "boat, ship, sailboat, canoe, kayak, ferry, yacht, rowboat, gondola, raft, motorboat",
    "traffic light": "traffic light, traffic signal, stoplight, stop light",
    "fire hydrant": "fire hydrant, hydrant",
    "stop sign": "stop sign",
    "parking meter": "parking meter, meter",
    "bench": "bench",
    "bird": "bird, duck, goose, pigeon, seagull, gull, parrot, owl, swan, eagle, hawk, ostrich, "
    "hen, chicken, rooster, penguin, pelican, peacock, flamingo, sparrow, crow, heron, duckling",
    "cat": "cat, kitten, kitty",
    "dog": "dog, puppy, pup, poodle, beagle, bulldog, dalmatian, labrador, terrier, dachshund",
    "horse": "horse, pony, foal, stallion, mare, colt",
    "sheep": "sheep, lamb, ram, ewe",
    "cow": "cow, cattle, calf, bull, ox",
    "elephant": "elephant",
    "bear": "bear, panda, polar bear, grizzly bear",
    "zebra": "zebra",
    "giraffe": "giraffe",
    "backpack": "backpack, back pack, knapsack, rucksack",
    "umbrella": "umbrella, parasol",
    "handbag": "handbag, hand bag, purse",
    "tie": "tie, necktie, bow tie, bowtie",
    "suitcase": "suitcase, luggage, briefcase",
    "frisbee": "frisbee, disc",
    "skis": "ski, skis",
    "snowboard": "snowboard",
    "sports ball": "ball, football, basketball, volleyball, soccer ball, tennis ball",
    "kite": "kite, parasail",
    "baseball bat": "baseball bat, bat",
    "baseball glove": "baseball glove, catcher's mitt, baseball mitt, mitt",
    "skateboard": "skateboard, skate board, longboard",
    "surfboard": "surfboard, surf board",
    "tennis racket": "tennis racket, tennis racquet, racket, racquet",
    "bottle": "bottle",
    "wine glass": "wine glass, wineglass, glass of wine, glasses of wine, champagne glass",
    "cup": "cup, mug, teacup, glass of water, glass of milk, glass of juice, paper cup",
    "fork": "fork",
    "knife": "knife",
    "spoon": "spoon",
    "bowl": "bowl",
    "banana": "banana",
    "apple": "apple",
    "sandwich": "sandwich, burger, hamburger, cheeseburger",
    "orange": "oranges, orange slice, tangerine, clementine, mandarin",
    "broccoli": "broccoli",
    "carrot": "carrot",
    "hot dog": "hot dog, hotdog, chili dog",
    "pizza": "pizza",
    "donut": "donut, doughnut",
    "cake": "cake, cupcake, cheesecake, birthday cake",
    "chair": "chair, armchair, stool, recliner",
    "couch": "couch, sofa, loveseat, futon",
    "potted plant": "potted plant, houseplant, house plant, pot plant, potted flower",
    "bed": "bed, bunk bed",
    "dining table": "table, desk, tabletop, table top",
    "toilet": "toilet, commode, urinal",
    "tv": "tv, television, television set, tv set, flat screen, flatscreen",
    "laptop": "laptop, laptop computer, notebook computer, macbook",
    "mouse": "mouse, computer mouse",
    "remote": "remote, remote control, wii remote, wii controller, game controller",
    "keyboard": "keyboard",
    "cell phone": "cell phone, cellphone, phone, smartphone, mobile phone, iphone",
    "microwave": "microwave, microwave oven",
    "oven": "oven, stove, stovetop",
    "toaster": "toaster",
    "sink": "sink, washbasin, wash basin",
    "refrigerator": "refrigerator, fridge, freezer",
    "book": "book, novel, textbook",
    "clock": "clock",
    "vase": "vase",
    "scissors": "scissors, scissor, shears",
    "teddy bear": "teddy bear, teddy, stuffed bear",
    "hair drier": "hair drier, hair dryer, hairdryer, blow dryer",
    "toothbrush": "toothbrush, tooth brush",
}
# Phrases that contain such a word but name no such object.
OTHER_PHRASES = (
    "train track, train station, train platform, bus stop, bus station, car park, table cloth, "
    "bird house, bird feeder, bird bath, dog house, cat food, dog food, pizza box, pizza cutter, "
    "cake pan, book shelf, book case, toilet paper, toilet brush, rocking horse, stuffed animal"
)
PLURALS = {
    **{"man": "men", "woman": "women", "gentleman": "gentlemen", "policeman": "policemen"},
    **{"child": "children", "lady": "ladies", "goose": "geese", "calf": "calves", "ox": "oxen"},
    **{"knife": "knives", "person": "persons", "mouse": "mice"},
}


def plural(phrase: str) -> str:
    *before, noun = phrase.split()
    regular = noun + "s"
    if noun.endswith(("s", "sh", "ch", "x")):
        regular = noun + "es"
    elif noun.endswith("y") and noun[-2] not in "aeou":
        regular = noun[:-1] + "ies"
    return " ".join([*before, PLURALS.get(noun, regular)])


def _phrases() -> dict[tuple[str, ...], str | None]:
    """{words of a phrase: its category, or None if it names none of the 80}."""
    found = {}
    for category, text in [*WORDS.items(), (None, OTHER_PHRASES)]:
        for phrase in text.split(", "):
            for form in (phrase, plural(phrase)):
                found[tuple(tokenize(form))] = category
    return found


PHRASES = _phrases()
LONGEST = max(map(len, PHRASES))


def named_objects(caption: str) -> list[str]:
    """The categories that a caption names, in order, as often as it names them.

    Of phrases that overlap, the longest one counts: "hot dog" names no dog. A young animal ("a baby
    elephant") is no person.
    """
    words, found, start = tokenize(caption), [], 0
    while start < len(words):
        lengths = range(min(LONGEST, len(words) - start), 0, -1)
        length = next((n for n in lengths if tuple(words[start : start + n]) in PHRASES), 0)
        category = PHRASES[tuple(words[start : start + length])] if length else None
        young = words[start] in ("baby", "adult")
        if not (young and PHRASES.get(tuple(words[start + 1 : start + 2])) not in (None, "person")):
            found += [category] if category else []
        start += max(length, 1)
    return found


def objects_of(image_ids, instances_file) -> list[set[str]]:
    """The categories that COCO's instance annotations have for each image.

    Raises DataError for a file of another kind, or without one of the images.
    """
    try:
        content = json.loads(Path(instances_file).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        found = {image["id"]: set() for image in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].add(names[annotation["category_id"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a file of COCO's instance annotations ({type(error).__name__}: {error})"
        raise DataError(f"{instances_file} {problem}") from error
    missing = [image_id for image_id in image_ids if image_id not in found]
    if missing:
        raise DataError(f"{instances_file} lacks {len(missing)} images, such as {missing[0]}")
    return [found[image_id] for image_id in image_ids]


def chair(captions, references, objects) -> dict:
    """The share of captions, and of the objects that they name, with what is not in the picture.

    captions: one per image. references, objects: for each image, its reference captions and the
    categories that are annotated. "CHAIRi" is 0 if no caption names an object.
    """
    wrong, named, captions_wrong = 0, 0, 0
    for caption, texts, annotated in zip(captions, references, objects, strict=True):
        present = annotated.union(*map(named_objects, texts))
        found = named_objects(caption)
        absent = [category for category in found if category not in present]
        wrong, named = wrong + len(absent), named + len(found)
        captions_wrong += bool(absent)
    return {"CHAIRs": captions_wrong / len(captions), "CHAIRi": wrong / max(named, 1)}
