"""True statements about a scene.

From this text the tiny base learns what its encoders report.

No statement is an instruction, a question or an answer of a task, and none carries a tag (make.py).
A statement is a sentence made of one clause. Clauses are grouped by form: a form tells one thing by
the name of another, so a lesson of pretrain_lm.py can practise one kind of lookup at a time.

    form             clause
    ""               two things are seen; at 3 the dog can be heard     (no lookup, never a lesson)
    all              the dog and the cat can be seen
    place, movement  the place is beach; the movement is spinning
    side, there      the dog is on the left; on the left is the dog
    height, box      the dog is high; the dog is at 10 20 60 80         (pixels on the 224 grid)
    seen, span       the dog is seen from 2 to 7; the dog is heard from 2 to 7           (seconds)
    order, ranked    the dog is heard first; heard first is the dog
    compare          (both spans) and next to the cat the dog is heard longer
    off, both        the dog is not in the picture; the dog is seen and heard
    sounds           the dog is silent                                  (of each thing seen)
    shown            the dog is not in the picture                      (of each thing heard)
    placed, found    the dog is on the left and is silent; on the left is the dog, silent
    which            the dog is in video one
"""

import itertools
import random
from collections import defaultdict

from crab_min.answers import mask_box
from crab_min.model import ASSETS
from crab_min.tasks import TASKS
from crab_min.world.clauses import (
    EARLIER,
    LONGER,
    MOVES,
    NOT_IN_PICTURE,
    NUMBERS,
    ORDERS,
    at_position,
    clause_at_position,
    clause_compared,
    clause_heard,
    clause_if_heard,
    clause_sound_sources,
    clause_where,
    clause_where_heard,
    clause_where_heard_at,
    during,
    join_with_and,
    list_of_names,
    sentence,
    unique_minimum,
)
from crab_min.world.clip_rows import clip_rows
from crab_min.world.rendering import Renderer
from crab_min.world.scenes import Object, Scene
from crab_min.world.things import SECONDS, SIZE

Facts = dict[str, list[str]]  # form -> clauses

FUNCTION_WORDS = set("the a is are be can at in on from to and of for next".split())
# words that do not tell which statement is meant, so they are no keywords
UNSPECIFIC_WORDS = set("heard seen person feels place video audio has".split())


# --- clauses of one scene -------------------------------------------------------------------------
def visual_facts(
    renderer: Renderer, scene: Scene, visible: list[Object], frame_at: float | None
) -> Facts:
    """Collect what one frame or the whole clip shows.

    Args:
        visible: the objects in the frame or clip, from left to right.
        frame_at: the second of the frame, None for the whole clip.
    """
    facts = {
        "": [f"{counted(len(visible), 'thing')} seen"],
        "all": [f"{list_of_names(visible)} can be seen"],
    }
    if scene.movement:
        # the only object of this kind of scene moves about, so its side and box say nothing
        thing = renderer.things[scene.objects[0].thing]
        facts["movement"] = [
            f"the movement is {scene.movement}",
            f"the {thing.label} {MOVES[scene.movement]}",
            f"the action is {thing.action}",
        ]
        return facts
    facts["side"] = [clause_where(obj) for obj in visible]
    facts["there"] = [f"{at_position(obj.position)} is the {obj.label}" for obj in visible]

    # the whole clip tells when an object is seen, one frame exactly where
    if frame_at is None:
        facts["seen"] = [f"the {obj.label} is seen {during(obj.seen)}" for obj in visible]
        return facts
    facts["height"], facts["box"] = [], []
    for obj in visible:
        height = "high" if obj.y < SIZE / 2 else "low"
        x1, y1, x2, y2 = mask_box(renderer.mask(scene, obj, frame_at))
        facts["height"].append(f"the {obj.label} is {height}")
        facts["box"].append(f"the {obj.label} is at {x1} {y1} {x2} {y2}")
    return facts


def audio_facts(
    audible: list[Object], known: list[Object], whole: bool, rng: random.Random
) -> Facts:
    """Collect what is heard, and from a whole sound track also when.

    Args:
        audible: the objects that are heard, in the order in which they begin.
        known: the objects to compare: those seen, or without a picture those heard.
        whole: all ten seconds are heard.
    """
    facts = {
        "": [f"{counted(len(audible), 'sound')} heard"],
        "all": [f"{list_of_names(audible)} can be heard"],
    }
    if not whole:
        return facts

    # spans, and what is heard at two random seconds
    facts["span"] = [clause_heard(obj) for obj in audible]
    for second in rng.sample(range(SECONDS), 2):
        heard_now = [obj for obj in audible if obj.heard_at(second)]
        facts[""].append(f"at {second} {list_of_names(heard_now)} can be heard")
    if len(audible) > 1:
        facts[""].append(join_with_and(facts["span"]))

    # what is heard first, last and longest, where this is one object
    facts["order"], facts["ranked"] = [], []
    for order, key in ORDERS.items():
        obj = unique_minimum(audible, key)
        if obj is not None:
            facts["order"].append(f"the {obj.label} is heard {order}")
            facts["ranked"].append(f"heard {order} is the {obj.label}")

    facts["compare"] = comparisons(known)
    return facts


def av_facts(visible: list[Object], audible: list[Object], seconds: range, fixed: bool) -> Facts:
    """Collect what only picture and sound together tell.

    This is what is seen and heard, and where it sounds.

    Args:
        seconds: the seconds of the sound that is heard.
        fixed: each object keeps its position, so that it can be told.
    """
    seen_and_heard = [obj for obj in visible if obj in audible]
    off_screen = [obj for obj in audible if obj not in visible]
    facts = {
        "off": [f"the {obj.label} is {NOT_IN_PICTURE}" for obj in off_screen],
        "both": [f"the {obj.label} is seen and heard" for obj in seen_and_heard],
    }
    if not fixed:
        return facts
    facts["sounds"] = [clause_if_heard(obj, obj in audible) for obj in visible]
    facts["shown"] = [shown_clause(obj, obj in visible) for obj in audible]
    facts[""] = []
    if seen_and_heard:
        facts[""].append(clause_sound_sources(seen_and_heard))
    if len(visible) > 1:
        facts[""].append(join_with_and(facts["sounds"]))

    # with all of the sound: when; with one second of it: heard or silent in this second
    if len(seconds) == SECONDS:
        facts["placed"] = [clause_where_heard(obj) for obj in visible]
        facts["found"] = [clause_at_position(obj) for obj in visible]
        if len(visible) > 1:
            facts[""].append(join_with_and([clause_heard(obj) for obj in visible]))
    elif len(seconds) == 1:
        facts["placed"] = [clause_where_heard_at(obj, seconds[0] + 0.5) for obj in visible]
    return facts


def counted(count: int, noun: str) -> str:
    """Return "one thing is" or "two things are"."""
    return f"{NUMBERS[count]} {noun}{' is' if count == 1 else 's are'}"


def shown_clause(obj: Object, visible: bool) -> str:
    where = at_position(obj.position) if visible else NOT_IN_PICTURE
    return f"the {obj.label} is {where}"


def comparisons(objects: list[Object]) -> list[str]:
    """Compare every two objects by how long and how early they are heard.

    The lengths come first.
    """
    heard = [obj for obj in objects if obj.heard]
    clauses = []
    for comparison, comparable in ((LONGER, objects), (EARLIER, heard)):
        for a, b in itertools.permutations(comparable, 2):
            if comparison.key(a) != comparison.key(b):
                judgement = clause_compared(a, b, comparison)
                clauses.append(join_with_and([clause_heard(a), clause_heard(b), judgement]))
    return clauses


def scene_facts(
    renderer: Renderer,
    scene: Scene,
    rng: random.Random,
    video: bool = True,
    frame_at: float | None = None,
    audio: range | None = None,
) -> list[Facts]:
    """Collect what is true of what is shown of one scene, sense by sense.

    Args:
        video: frames are shown.
        frame_at: the second of the only frame; None: frames of the whole clip.
        audio: the seconds of the sound that is heard; None: no sound.
    """
    if scene.kind == "face":
        return [face_facts(scene, video, audio is not None)]
    visible, audible = [], []
    if video:
        visible = [obj for obj in scene.seen if frame_at is None or obj.seen_at(frame_at)]
    if audio:
        audible = [obj for obj in scene.heard if any(map(obj.heard_at, audio))]

    # the order of the groups decides what a seed samples
    groups: list[Facts] = []
    if video:
        groups.append({"place": [f"the place is {scene.place}"]})
        groups.append(visual_facts(renderer, scene, visible, frame_at))
    if audio:
        groups.append(audio_facts(audible, visible or audible, len(audio) == SECONDS, rng))
    if video and audio:
        groups.append(av_facts(visible, audible, audio, fixed=not scene.movement))
    return groups


def face_facts(scene: Scene, video: bool, audio: bool) -> Facts:
    """Collect what a face, its voice, or both tell."""
    told = {
        f"the place is {scene.place}": video,
        f"the face is {scene.emotion}": video and not scene.masked,
        f"the voice is {scene.emotion}": audio,
        f"the person is {'masked' if scene.masked else 'not masked'}": video,
        f"the person feels {scene.emotion}": audio,
    }
    return {"": [clause for clause, is_told in told.items() if is_told]}


# --- statements -----------------------------------------------------------------------------------
def scene_statements(
    renderer: Renderer, scene: Scene, rng: random.Random, forms: tuple[str, ...] = (), **shown
) -> list[str]:
    """Sample true statements about what is shown of one scene.

    Args:
        forms: state all that is true in one of these forms, as far as there is any; (): a mixture.
        shown: see `scene_facts`.
    """
    groups = scene_facts(renderer, scene, rng, **shown)
    if scene.kind == "face":
        return sample_statements(groups, forms, rng, fewest=1, most=3)
    return sample_statements(groups, forms, rng)


def pair_statements(
    scenes: list[Scene],
    third: Scene,
    kind: str,
    rng: random.Random,
    forms: tuple[str, ...] = (),
) -> list[str]:
    """Sample true statements about two media of one kind and a third of the other.

    Args:
        scenes: the two scenes; their media are numbered one and two.
        third: the scene of the medium of the other kind.
        kind: "video" or "audio", the kind of the two.
        forms: see `scene_statements`.
    """
    if kind == "video":
        first, second = [scene.seen for scene in scenes]
        others, sense = third.heard, "heard"
    else:
        first, second = [scene.heard for scene in scenes]
        others, sense = third.seen, "seen"
    first_labels = [obj.label for obj in first]
    second_labels = [obj.label for obj in second]

    # what each medium has, and which things are in one of the two only, or in neither
    mixed = [f"{kind} one has {list_of_names(first)}", f"{kind} two has {list_of_names(second)}"]
    which = [f"the {name} is in {kind} one" for name in first_labels if name not in second_labels]
    which += [f"the {name} is in {kind} two" for name in second_labels if name not in first_labels]
    for obj in others:
        if obj.label not in first_labels + second_labels:
            which.append(f"the {obj.label} is in neither")
    mixed += [f"the {name} is in both" for name in first_labels if name in second_labels]

    # the third medium, and two of the lookups in one statement
    mixed.append(f"{list_of_names(others)} can be {sense}")
    if sense == "heard":
        mixed += [clause_heard(obj) for obj in others]
    lookups = rng.sample(which, min(2, len(which)))
    if lookups:
        mixed.append(join_with_and(lookups))
    return sample_statements([{"": mixed, "which": which}], forms, rng)


def sample_statements(
    groups: list[Facts],
    forms: tuple[str, ...],
    rng: random.Random,
    fewest: int = 3,
    most: int = 8,
) -> list[str]:
    """Sample clauses of one form or of any form, as sentences.

    They are at most four of one form, or `fewest` to `most` of any form. One of `forms` is used if
    any of them has clauses, otherwise all forms are.
    """
    by_form, mixture = defaultdict(list), []
    for group in groups:
        for form, clauses in group.items():
            by_form[form] += clauses
            # those that look something up stand there twice, so they are sampled twice as often
            mixture += 2 * clauses if form else clauses

    usable = [form for form in forms if by_form[form]]
    if usable:  # a lesson
        clauses = by_form[rng.choice(usable)]
        sampled = rng.sample(clauses, min(4, len(clauses)))
    else:
        count = rng.randint(min(fewest, len(mixture)), min(most, len(mixture)))
        sampled = dict.fromkeys(rng.sample(mixture, count))  # each one once
    return [sentence(clause) for clause in sampled]


def content_words(statement: str) -> list[str]:
    """Return dog, heard, 2, 7 of "The dog is heard from 2 to 7."."""
    words = statement.lower().replace(",", "").strip(".").split()
    return [word for word in words if word not in FUNCTION_WORDS]


def with_keywords_or_recap(statements: list[str], rng: random.Random) -> tuple[str, str]:
    """Return (the end of the prompt, the target) for some statements.

    Half of the time the prompt ends with one keyword per statement. Half of the time the target
    ends with the content words of some statements. Both make the LM look at words, not only at
    media tokens.
    """
    prompt_end, target = "", " ".join(statements)
    if rng.random() < 0.5:
        keywords = []
        for statement in statements:
            specific = [word for word in content_words(statement) if word not in UNSPECIFIC_WORDS]
            keywords.append(rng.choice(specific))
        prompt_end = "\n" + "; ".join(keywords)
    if rng.random() < 0.5:
        count = rng.randint(1, min(4, len(statements)))
        repeated = sorted(rng.sample(range(len(statements)), count))
        recaps = [" ".join(content_words(statements[i])) for i in repeated]
        target += f" In short: {', '.join(recaps)}."
    return prompt_end, target


# --- the tokenizer's corpus -----------------------------------------------------------------------
COMMON_ENGLISH = ASSETS / "common_english.txt"  # words that users' own annotations may need


def corpus(renderer: Renderer, seed: int) -> list[str]:
    """Return the lines from which the tokenizer, not the model, learns its merges.

    They are statements, and the words in which the tasks are put and answered.
    """
    rng = random.Random(seed)
    scenes = {}
    for kind in ("one", "many", "action", "face"):
        scenes[kind] = [renderer.scene("base", kind, index, seed) for index in range(300)]

    # statements about whole clips, and about three clips at a time
    lines = []
    for scene in itertools.chain(*scenes.values()):
        statements = scene_statements(renderer, scene, rng, audio=range(SECONDS))
        lines.append(" ".join(with_keywords_or_recap(statements, rng)))
    first, second, third = (scenes["one"][start::3] for start in range(3))
    for kind in ("video", "audio"):
        for a, b, c in zip(first, second, third):
            lines.append(" ".join(pair_statements([a, b], c, kind, rng)))

    # answers, questions and instructions of the tasks
    rows = clip_rows(renderer, scenes, rng, 100)
    for task_rows in rows.values():
        lines += [row["text"] for row in task_rows]
    lines += [row.get("question", "") for row in rows["avqa"]]
    lines += [task.instruction for task in TASKS.values() if task.v2]
    return lines + [" ".join(COMMON_ENGLISH.read_text(encoding="utf-8").split())] * 3
