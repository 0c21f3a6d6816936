"""What is true of a scene, in words: the statements from which the tiny base learns to read its own eyes and ears.

No statement is an instruction, a question or an answer of a task, and none carries a tag (base.py).
"""
import random

from crab_min.interface import TASKS, mask_box
from crab_min.world import SECONDS, Renderer, Scene
from crab_min.world_tasks import ORDERS, at, clip_rows, only, placed

NUMBERS = ("no", "one", "two", "three", "four")


def words(labels: list[str]) -> str:
    return " and ".join(f"the {label}" for label in labels) if labels else "nothing"


def statements(renderer: Renderer, scene: Scene, rng: random.Random, seen_at: float | None, sees: bool, hears: range | None) -> list[str]:
    """True sentences about what was shown: the frame at second `seen_at` or the whole clip, and the seconds `hears`."""
    facts, objects = [], scene.objects
    if sees:
        facts.append(f"the place is {scene.place}.")
    if scene.kind == "face":
        facts += [f"the face is {scene.emotion}."] * (sees and not scene.masked) + [f"the voice is {scene.emotion}."] * (hears is not None)
        facts += [f"the person is {'masked' if scene.masked else 'not masked'}."] * sees + [f"the person feels {scene.emotion}."] * (hears is not None)
        return rng.sample(facts, rng.randint(1, min(3, len(facts))))
    visible = [o for o in objects if (o.seen_at(seen_at) if seen_at is not None else o.seen)] if sees else []
    audible = [o for o in objects if hears is not None and any(s < hears.stop and e > hears.start for s, e in o.heard)]
    if sees:
        facts += [f"{NUMBERS[len(visible)]} things are seen.", f"{words([o.label for o in sorted(visible, key=lambda o: (o.x, o.y))])} can be seen."]
        if scene.movement:
            facts += [f"the movement is {scene.movement}.", f"the {objects[0].label} is {scene.movement}."] * (seen_at is None)
        for o in visible if not scene.movement else []:
            facts += [f"the {o.label} is {at(o.side)}.", f"{at(o.side)} is the {o.label}."]
            if seen_at is not None and (box := mask_box(renderer.mask(scene, o, seen_at))):
                facts += [f"the {o.label} is at {box[0]} {box[1]} {box[2]} {box[3]}."] * 3
            elif seen_at is None:
                facts.append("the {} is seen from {} to {}.".format(o.label, *o.seen[0]))
    if hears is not None:
        order = sorted(audible, key=lambda o: o.heard[0])
        facts += [f"{NUMBERS[len(audible)]} sounds are heard.", f"{words([o.label for o in order])} can be heard."]
        if len(hears) == SECONDS:
            facts += [f"at {second} {words([o.label for o in order if o.heard_at(second)])} can be heard." for second in rng.sample(range(SECONDS), 2)]
            facts += ["the {} is heard from {} to {}.".format(o.label, *o.heard[0]) for o in audible] * 2
            facts += [f"the {best.label} is heard {order}." for order, key in ORDERS.items() if (best := only(audible, key))]
    if sees and hears is not None:
        facts += [f"the {o.label} is {'' if o in visible else 'not '}seen and {'' if o in audible else 'not '}heard." for o in objects if o in visible + audible]
        if len(hears) == SECONDS and not scene.movement:
            facts += [placed(o) + "." for o in visible] * 2
        elif not scene.movement:
            facts += [f"the {o.label} is {at(o.side)} and is heard." for o in visible if o in audible]
    return list(dict.fromkeys(rng.sample(facts, rng.randint(3, min(9, len(facts))))))


def pair_statements(scenes: list[Scene], kind: str, rng: random.Random) -> list[str]:
    """True sentences about two media of one kind ("video", "audio"), the first and the second."""
    facts, verb = [], {"video": "shows", "audio": "has"}[kind]
    labels = [[o.label for o in s.objects if (o.seen if kind == "video" else o.heard)] for s in scenes]
    for order, mine, other in zip(("first", "second"), labels, labels[::-1]):
        facts += [f"the {order} {kind} {verb} {words(mine)}."] + [f"only the {order} {kind} {verb} the {label}." for label in mine if label not in other] * 2
    return rng.sample(facts, rng.randint(2, min(5, len(facts))))


COMMON = """a man a woman a boy a girl people someone child children baby face voice hand eyes mouth speech speaking talking singing laughing crying
walking running standing sitting dancing playing performing holding looking moving driving riding cutting cooking washing eating drinking music song
instrument guitar piano flute drum violin saxophone accordion cello trumpet stage street road house kitchen room garden field forest tree water river sea
beach rain wind storm fire engine motor machine truck train bus boat airplane helicopter motorcycle bicycle siren alarm horn chainsaw lawn mower hammer
animal dog cat horse cow sheep goat pig chicken rooster duck bird lion elephant black white red green blue yellow brown dark bright small large big little
old young long short high low loud quiet soft sharp happy sad angry surprised afraid disgusted neutral joy sadness anger fear first second third last left
right middle top bottom before after while during then when where which what who how many more less than between from until always never only both other
another picture image video audio sound sounds clip scene camera background there is are was were has have the this that these those with without and or
but not of in on at to for by its their his her it they he she making produces heard seen shown continues starts ends begins time range object event""".replace("\n", " ")


def corpus(renderer: Renderer, seed: int) -> list[str]:
    """What the tokenizer (not the model) learns its merges from: statements, and the words that tasks are put and answered in."""
    rng = random.Random(seed)                                                 # COMMON: English a user's own annotations may need
    scenes = {kind: [renderer.scene("base", kind, i, seed) for i in range(300)] for kind in ("one", "many", "action", "face")}
    lines = [" ".join(statements(renderer, s, rng, None, True, range(SECONDS))) for group in scenes.values() for s in group]
    rows = clip_rows(renderer, scenes, rng, 100)
    return lines + [row["text"] for task in rows.values() for row in task] + [row.get("question", "") for row in rows["avqa"]] + [task.ask for task in TASKS.values()] + [COMMON] * 3
