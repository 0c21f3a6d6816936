"""Worked examples of the briefs: a row of each task without its media, and a text for its label.

They are ours: scenes of the built-in world. Each must pass its own verification (tests).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A row of a task, without its media, and a text that leads to its label."""

    row: dict
    text: str


def matching(given: str, other: str, first: str, second: str, right: int, text: str) -> Example:
    """Return an example of a2v or v2a: two events, and which of the two media is right."""
    events = {f"{other}1_event": first, f"{other}2_event": second}
    sought = (first, second)[right - 1]
    row = {f"{given}_event": sought, **events, f"correct_{other}": right}
    return Example(row, text)


def emotions(field: str) -> tuple[Example, ...]:
    """Return the examples of a data set of emotions, whose label is in `field`."""
    texts = {
        "angry": "The brows are pulled down over the eyes and the voice is loud and low.",
        "surprise": "The eyes and the mouth are wide open, and the voice jumps up.",
        "sad": "The corners of the mouth hang down while the voice is slow and falls.",
    }
    return tuple(
        Example({field: label}, f"{text} So <answer> {label}</answer>.")
        for label, text in texts.items()
    )


def av_row(audio: str, visual: str) -> dict:
    return {"event": f"audio: {audio} visual: {visual}"}


# fmt: off
EXAMPLES: dict[str, tuple[Example, ...]] = {
    "a2v": (
        matching("audio", "video", "frog", "bird", 1,
                 "A croak is heard. The frog that makes it is in video one, video two has a bird. "
                 "So <answer> one</answer>."),
        matching("audio", "video", "clock", "drum", 2,
                 "The sound is a beat. The drum in video two fits it, the clock does not. "
                 "So <answer> two</answer>."),
    ),
    "v2a": (
        matching("video", "audio", "drum", "cat", 1,
                 "A drum is in the picture. The beat is in audio one, audio two is a meow. "
                 "So <answer> one</answer>."),
        matching("video", "audio", "bell", "whistle", 2,
                 "The picture has a whistle, and its high tone is in audio two. "
                 "So <answer> two</answer>."),
    ),
    "ks": (
        Example({"action": "making a frog croak"},
                "A frog sits in the picture and its croak is heard. "
                "So <answer> making a frog croak</answer>."),
        Example({"action": "blowing a whistle"},
                "A whistle is seen, and its high tone is the only sound. "
                "So <answer> blowing a whistle</answer>."),
    ),
    "ucf": (
        Example({"label": "Bouncing"},
                "The thing in the picture goes up and comes down again. "
                "So <answer> bouncing</answer>."),
        Example({"label": "Spinning"},
                "The thing stays where it is and turns round itself. "
                "So <answer> spinning</answer>."),
    ),
    "meld": emotions("Emotion"),
    "mer24": emotions("discrete"),
    "cremad": emotions("emotion"),
    "mafw": emotions("emotion"),
    "dfew": emotions("emotion"),
    "avqa": (
        Example({"question": "Is the thing on the left heard?", "answer": "no"},
                "The thing on the left makes no sound. So <answer> no</answer>."),
        Example({"question": "How many sounds are heard?", "answer": "two"},
                "Two different sounds can be told apart. So <answer> two</answer>."),
    ),
    "avqa_thu": (
        Example({"question_text": "Where is the thing that is heard last?", "answer": 1,
                 "multi_choice": ["in the middle", "on the left", "not in the picture"]},
                "The last sound comes from the thing on the left. "
                "So <answer> on the left</answer>."),
        Example({"question_text": "What barks?", "answer": 0,
                 "multi_choice": ["the dog", "the cat", "the bell"]},
                "The barking goes with the dog in the picture. So <answer> the dog</answer>."),
    ),
    "nextqa": (
        Example({"question": "Why does the dog run?", "answer": 1,
                 "multi_choice": ["it is tired", "to fetch the ball", "it is afraid"]},
                "A ball rolls away and the dog goes after it. "
                "So <answer> to fetch the ball</answer>."),
        Example({"question": "What does the cat do at the end?", "answer": 0,
                 "multi_choice": ["lie down", "jump", "eat"]},
                "The cat lowers itself to the floor and stays there. "
                "So <answer> lie down</answer>."),
    ),
    "ave": (
        Example({"event": "bell", "start_time": 2, "end_time": 8},
                "A bell is in the picture, and its ring is heard from 2 to 8. "
                "So <event> bell, (2 8)</event>."),
        Example({"event": "dog", "start_time": 0, "end_time": 10},
                "The dog is seen and barks from the first second to the last. "
                "So <event> dog, (0 10)</event>."),
    ),
    "unav": (
        Example({"label_content": "<event> cat, (2 7)</event> <event> car, (5 10)</event>"},
                "The cat meows from 2 to 7. The car drives past from 5 to 10. "
                "So <event> cat, (2 7)</event> <event> car, (5 10)</event>."),
        Example({"label_content": "<event> drum, (0 3)(6 9)</event>"},
                "The drum is played from 0 to 3, rests, and is played again from 6 to 9. "
                "So <event> drum, (0 3)(6 9)</event>."),
    ),
    "avvp": (
        Example(av_row("drum,(1 7)", "violin,(0 10)"),
                "A violin is in sight all the time. The drum is only heard, from 1 to 7. "
                "So <visual_event> violin, (0 10)</visual_event> "
                "<audio_event> drum, (1 7)</audio_event>."),
        Example(av_row("cat,(1 6)", "cat,(0 8)"),
                "The cat is seen from 0 to 8 and meows from 1 to 6. "
                "So <visual_event> cat, (0 8)</visual_event> "
                "<audio_event> cat, (1 6)</audio_event>."),
    ),
    "s4": (
        Example({"a_obj": "bell",
                 "label_content": "[93,138,145,198] [103,165],[113,166],[122,173]"},
                "A ring is heard, and the bell stands low in the middle. It is at "
                "[93,138,145,198] [103,165],[113,166],[122,173]."),
        Example({"a_obj": "cat", "label_content": "[9,21,72,84] [29,52],[40,52],[54,52]"},
                "The cat in the upper left corner meows. It is at "
                "[9,21,72,84] [29,52],[40,52],[54,52]."),
    ),
    "arig": (
        Example({"a_obj": "bell", "label_content": "[93,138,145,198]"},
                "A ring is heard, and the bell stands low in the middle. It is at "
                "[93,138,145,198]."),
        Example({"a_obj": "cat", "label_content": "[9,21,72,84]"},
                "The cat in the upper left corner meows. It is at [9,21,72,84]."),
    ),
    "lvis": (
        Example({"name": "bell", "label_content": "[93,138,145,198]"},
                "The bell stands low in the middle. It is at [93,138,145,198]."),
        Example({"name": "cat", "label_content": "[9,21,72,84]"},
                "The cat is in the upper left corner. It is at [9,21,72,84]."),
    ),
    "ref_avs": (
        Example({"description": "the thing that is silent",
                 "output": "<answer> true</answer> [9,21,72,84] [29,52],[40,52],[54,52]"},
                "One thing in the image makes no sound, the one in the upper left corner. "
                "So <answer> true</answer> [9,21,72,84] [29,52],[40,52],[54,52]."),
        Example({"description": "the drum", "output": "<answer> false</answer>"},
                "No drum is anywhere in the image. So <answer> false</answer>."),
    ),
}
# fmt: on
EXAMPLES["ms3"] = EXAMPLES["avss"] = EXAMPLES["s4"]
