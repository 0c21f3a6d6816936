"""What is true of a scene, in words: the statements from which the tiny base learns to read its own eyes and ears.

No statement is an instruction, a question or an answer of a task, and none carries a tag (base.py).
"""
import random

from crab_min.answers import mask_box
from crab_min.tasks import TASKS
from crab_min.world.folders import clip_rows
from crab_min.world.questions import (
    EARLIER,
    LONGER,
    MOVES,
    NUMBERS,
    ORDERS,
    PLACES_TO_CHOOSE,
    at,
    compared,
    found,
    hears,
    length,
    listing,
    named,
    only,
    placed,
    placed_at,
    sentence,
    sounding,
    sounds,
)
from crab_min.world.scenes import Object, Renderer, Scene
from crab_min.world.things import SECONDS, SIZE

FUNCTION_WORDS = {"the", "a", "is", "are", "be", "can", "at", "in", "on", "from", "to", "and", "of", "for", "next"}
COMMONPLACE = {"heard", "seen", "person", "feels", "place", "video", "audio", "has"}       # words that tell of no statement what it is about

Facts = dict[str, list[str]]                           # clauses by form: what is looked up by name (side, span ...), or the name by it (all, there, ranked)


def amount(count: int, what: str) -> str:
    return f"{NUMBERS[count]} {what} is" if count == 1 else f"{NUMBERS[count]} {what}s are"


def eyes(renderer: Renderer, scene: Scene, visible: list[Object], seen_at: float | None) -> Facts:
    """What the frame at second `seen_at` shows, or the whole clip: things, movement, sides, boxes on the 224 grid, seconds."""
    facts = {"": [f"{amount(len(visible), 'thing')} seen"], "all": [f"{named(visible)} can be seen"]}
    if scene.movement:
        thing = renderer.things[scene.objects[0].thing]
        facts["movement"] = [f"the movement is {scene.movement}", f"the {thing.label} {MOVES[scene.movement]}", f"the action is {thing.action}"] * (seen_at is None)
        return facts
    facts["side"] = [f"the {o.label} is {at(o.side)}" for o in visible]
    facts["there"] = [f"{at(o.side)} is the {o.label}" for o in visible]
    if seen_at is None:
        facts["seen"] = ["the {} is seen from {} to {}".format(o.label, *o.seen[0]) for o in visible]
    else:
        boxes = [(o.label, mask_box(renderer.mask(scene, o, seen_at))) for o in visible]
        facts["height"] = [f"the {o.label} is {'high' if o.y < SIZE / 2 else 'low'}" for o in visible]
        facts["box"] = ["the {} is at {} {} {} {}".format(label, *box) for label, box in boxes if box]
    return facts


def ears(audible: list[Object], known: list[Object], whole: bool, rng: random.Random) -> Facts:
    """What is heard, and of a whole sound track when, and which of the things `known` (seen, or else heard) longer or earlier than which."""
    facts = {"": [f"{amount(len(audible), 'sound')} heard"], "all": [f"{named(audible)} can be heard"]}
    if not whole:
        return facts
    facts["span"] = [hears(o) for o in audible]
    facts[""] += [f"at {second} {named([o for o in audible if o.heard_at(second)])} can be heard" for second in rng.sample(range(SECONDS), 2)]
    facts[""] += [listing([*map(hears, audible)])] * (len(audible) > 1)
    best = {order: o for order, key in ORDERS.items() if (o := only(audible, key))}
    facts["order"] = [f"the {o.label} is heard {order}" for order, o in best.items()]
    facts["ranked"] = [f"heard {order} is the {o.label}" for order, o in best.items()]
    pairs = [(a, b) for a in known for b in known if a.label != b.label]
    longer = [(a, b, LONGER) for a, b in pairs if length(a) != length(b)]
    earlier = [(a, b, EARLIER) for a, b in pairs if a.heard and b.heard and a.heard[0][0] != b.heard[0][0]]
    facts["compare"] = [listing([hears(a), hears(b), compared(a, b, *how)]) for a, b, how in longer + earlier]
    return facts


def together(visible: list[Object], audible: list[Object], seconds: range, still: bool) -> Facts:
    """What only eyes and ears together know: what is both seen and heard, and where something sounds."""
    both = [o for o in visible if o in audible]
    facts = {"off": [f"the {o.label} is {PLACES_TO_CHOOSE['']}" for o in audible if o not in visible], "both": [f"the {o.label} is seen and heard" for o in both]}
    if not still:
        return facts
    facts["sounds"] = [sounds(o, o in audible) for o in visible]
    facts["shown"] = [f"the {o.label} is {PLACES_TO_CHOOSE[o.side if o in visible else '']}" for o in audible]
    facts[""] = [sounding(both)] * bool(both) + [listing(facts["sounds"])] * (len(visible) > 1)
    if len(seconds) == SECONDS:
        facts["placed"] = [placed(o) for o in visible]
        facts["found"] = [found(o) for o in visible]
        facts[""] += [listing([*map(hears, visible)])] * (len(visible) > 1)
    elif len(seconds) == 1:
        facts["placed"] = [placed_at(o, seconds[0] + .5) for o in visible]
    return facts


def statements(renderer: Renderer, scene: Scene, rng: random.Random, seen_at: float | None, sees: bool, seconds: range | None,
               forms: tuple[str, ...] = ()) -> list[str]:
    """True sentences about what was shown: the frame at second `seen_at` or the whole clip, and the sound of `seconds`.

    forms: say all that is true in one of these forms, as far as there is any ("side": where each thing is), instead of a mixture.
    """
    hears_it = seconds is not None
    if scene.kind == "face":
        facts = [f"the place is {scene.place}"] * sees
        facts += [f"the face is {scene.emotion}"] * (sees and not scene.masked) + [f"the voice is {scene.emotion}"] * hears_it
        facts += [f"the person is {'masked' if scene.masked else 'not masked'}"] * sees + [f"the person feels {scene.emotion}"] * hears_it
        return [sentence(fact) for fact in rng.sample(facts, rng.randint(1, min(3, len(facts))))]
    visible = [o for o in scene.seen if seen_at is None or o.seen_at(seen_at)] if sees else []
    audible = [o for o in scene.heard if hears_it and any(start < seconds.stop and end > seconds.start for start, end in o.heard)]
    groups = [{"place": [f"the place is {scene.place}"]}] * sees
    if sees:
        groups.append(eyes(renderer, scene, visible, seen_at))
    if hears_it:
        groups.append(ears(audible, visible or audible, len(seconds) == SECONDS, rng))
    if sees and hears_it:
        groups.append(together(visible, audible, seconds, not scene.movement))
    return drawn(groups, forms, rng)


def pair_statements(scenes: list[Scene], third: Scene, kind: str, rng: random.Random, forms: tuple[str, ...] = ()) -> list[str]:
    """True sentences about two media of one kind ("video", "audio"), numbered one and two, and the third scene's medium of the other kind."""
    facts, (sense, alone) = {"": [], "which": []}, {"video": ("seen", "heard"), "audio": ("heard", "seen")}[kind]
    labels = [[o.label for o in getattr(scene, sense)] for scene in scenes]
    for number, scene, mine, other in zip(NUMBERS[1:], scenes, labels, labels[::-1]):
        facts[""].append(f"{kind} {number} has {named(getattr(scene, sense))}")
        facts["which"] += [f"the {label} is in {kind} {number}" for label in mine if label not in other]
    facts["which"] += [f"the {o.label} is in neither" for o in getattr(third, alone) if o.label not in labels[0] + labels[1]]
    facts[""] += [f"the {label} is in both" for label in labels[0] if label in labels[1]]
    facts[""] += [f"{named(getattr(third, alone))} can be {alone}"] + [hears(o) for o in third.heard] * (alone == "heard")
    facts[""] += [listing(some) for some in [rng.sample(facts["which"], min(2, len(facts["which"])))] if some]
    return drawn([facts], forms, rng)


def drawn(groups: list[Facts], forms: tuple[str, ...], rng: random.Random) -> list[str]:
    """Three to eight sentences of any form, those to be looked up twice as often; or all of one form of `forms`, in any order, if there are any."""
    usable = [form for form in forms if any(group.get(form) for group in groups)]
    if usable:
        form = rng.choice(usable)
        facts = [fact for group in groups for fact in group.get(form, [])]
        return [sentence(fact) for fact in rng.sample(facts, min(4, len(facts)))]
    facts = [fact for group in groups for form, some in group.items() for fact in some * (2 if form else 1)]
    return [sentence(fact) for fact in dict.fromkeys(rng.sample(facts, rng.randint(min(3, len(facts)), min(8, len(facts)))))]


def in_short(statement: str) -> list[str]:
    """The words of a statement that carry its meaning: dog, heard, 2, 7 of "The dog is heard from 2 to 7."."""
    return [word for word in statement.lower().replace(",", "").strip(".").split() if word not in FUNCTION_WORDS]


def annotated(said: list[str], rng: random.Random) -> tuple[str, str]:
    """(end of the prompt, target) for some statements.

    Half of the time the prompt ends with a keyword of each, and half of the time the target ends with some of them in short.
    """
    keywords, target = "", " ".join(said)
    if rng.random() < .5:
        keywords = "\n" + "; ".join(rng.choice([w for w in in_short(one) if w not in COMMONPLACE]) for one in said)
    if rng.random() < .5:
        kept = sorted(rng.sample(range(len(said)), rng.randint(1, min(4, len(said)))))
        target += f" In short: {', '.join(' '.join(in_short(said[i])) for i in kept)}."
    return keywords, target


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
    lines = [" ".join(annotated(statements(renderer, s, rng, None, True, range(SECONDS)), rng)) for group in scenes.values() for s in group]
    lines += [" ".join(pair_statements([a, b], c, kind, rng)) for kind in ("video", "audio")
              for a, b, c in zip(*(scenes["one"][start::3] for start in range(3)))]
    rows = clip_rows(renderer, scenes, rng, 100)
    return lines + [row["text"] for task in rows.values() for row in task] + [row.get("question", "") for row in rows["avqa"]] + [task.ask for task in TASKS.values() if task.v2] + [COMMON] * 3
