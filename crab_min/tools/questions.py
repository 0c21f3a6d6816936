"""The questions of infer.py: clips and texts of the command line -> samples in a run's form."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from crab_min.answers import Answer
from crab_min.config import with_values
from crab_min.data import OWN_LABELS, OWN_TEXTS, Sample, own_samples, pick_tasks, read_samples
from crab_min.errors import DataError, RunError
from crab_min.interface import PromptPart, build_prompt, load_prompts, text_part
from crab_min.media.kinds import media_files, media_kind
from crab_min.media.read import has_sound
from crab_min.media.tracks import check_file
from crab_min.side_channels import add_side_channels
from crab_min.sources.own import MEDIA_TAG, class_folders, count_tags, form_row
from crab_min.tasks import TASKS, Task
from crab_min.tools.loading import LoadedRun

# field of a row -> how the command line names its file
MEDIA_FLAGS = {
    "video_path": "a video",
    "video1_path": "a video",
    "video2_path": "--second-video FILE",
    "audio_path": "--audio FILE",
    "audio1_path": "--audio FILE",
    "audio2_path": "a second --audio FILE",
    "image_path": "--image FILE",
}

# --- the command line -----------------------------------------------------------------------------


def split_positional(given: Namespace) -> None:
    """Sort the words of the command line into clips, a sound or image alone, and a question.

    The last word is the question if it is no file and is not named like a medium.
    """
    words = list(given.clip)
    if words and not given.ask:
        last = words[-1]
        if not os.path.exists(last) and not media_kind(last):
            given.ask = words.pop()
    given.clip = words


def clips_of(given: Namespace) -> list[Path]:
    """Return the clips of the command line; a folder stands for the media in it.

    So does a folder of class folders. A folder of pictures is one clip, its frames.
    """
    clips = []
    for word in map(Path, given.clip):
        files = []
        for folder in [word, *class_folders(word)] if word.is_dir() else []:
            files += media_files(folder)
        kinds = {media_kind(file) for file in files}
        clips += [word] if not files or kinds == {"image"} else files
    return clips


def check_media(given: Namespace) -> None:
    """Raise MediaError for a file of the command line that is missing or empty.

    With many questions those in a folder have errors of their own.
    """
    clips = given.clip if given.questions else clips_of(given)
    for path in [*clips, *given.audio, given.image, given.second_video]:
        if path and not os.path.isdir(path):
            check_file(path)


def samples_of(given: Namespace, run: LoadedRun) -> list[Sample]:
    """Return one sample per clip of the command line, in the form of the run.

    Without a clip it is a test sample of the built-in world.

    Raises:
        DataError: no clip, and the run did not learn the built-in world; or no question.
    """
    if given.clip or given.image or given.audio:
        clips = clips_of(given) or [None]
        return [question_sample(given, run, clip, given.ask) for clip in clips]

    # a sample of the built-in world, with its own question
    if given.ask or not run.learned_the_world:
        reason = f"for {given.ask!r}" if given.ask else f"{run.folder} learned rows of your own"
        raise DataError(f'which clip? {reason}; give a file: python infer.py CLIP.mp4 "..."')
    root = built_in_data(run, given.things, given.seed, "test")
    task = chosen_task(given, default="s4" if run.model.predicts_masks else "avqa")
    split = "test" if "test" in task.splits else "train"
    samples = read_samples(root, [task.name], split, limit=1 + given.index, layout=run.model.layout)
    if given.index >= len(samples):
        raise DataError(f"--index {given.index}: {task.name} has {len(samples)} {split} rows")
    sample = samples[given.index]
    if not given.json:
        print(f"no clip given: {sample.id} of the built-in world, {sample.media[0].path}")
    return prepare([sample], given, run)


def question_sample(
    given: Namespace, run: LoadedRun, clip: Path | None, question: str, id: str = ""
) -> Sample:
    """Make the sample of a question about a clip, in the form in which the run was trained.

    Args:
        question: "" for that of the run, if all of its rows asked the same, or of --task.
        id: of the sample.
    """
    if given.task or run.form is None:
        task = run.model.layout.adapt(chosen_task(given, question))
        prompts = load_prompts(given.prompts) if given.prompts else run.saved.prompts
        row = row_of(given, clip, question)
        check_task_media(task, row, clip or given.image or given.audio[0])
        parts = build_prompt(task, row, "", prompts, run.model.layout)
        sample = Sample(id, task, parts, "", Answer(), {})
    else:
        question = question or run.form.question
        if not question:
            raise DataError(f'what about {clip}? python infer.py {clip} "..."')
        row = form_row(run.form, question, files_of(given, run, clip))
        task = OWN_LABELS if run.form.is_label else OWN_TEXTS
        sample = replace(own_samples([row], "test", task)[0], id=id)
    return prepare([within(sample, given.start, given.end)], given, run)[0]


def files_of(given: Namespace, run: LoadedRun, clip: Path | None) -> dict[str, list[str]]:
    """Return the files of a question by kind; a video comes with its own sound.

    A run that learned questions without sound gets none.
    """
    files: dict[str, list[str]] = {}
    if clip:
        kind = media_kind(clip) or "video"
        files[kind] = [os.path.abspath(clip)]
    if given.image:
        files["image"] = [*files.get("image", []), os.path.abspath(given.image)]
    if given.audio:
        files["audio"] = [*files.get("audio", []), *map(os.path.abspath, given.audio)]
    elif "video" in files and "audio" not in files:
        # a folder of frames has no sound
        asks_for_it = count_tags(run.form.text, "audio") > 0 and not os.path.isdir(
            files["video"][0]
        )
        if asks_for_it or (not MEDIA_TAG.search(run.form.text) and has_sound(files["video"][0])):
            files["audio"] = list(files["video"])
    return files


def within(sample: Sample, start: float, end: float) -> Sample:
    """Return a sample that is asked about a part of its clip, in seconds."""
    if not start and not end:
        return sample
    if end and end <= start:
        raise DataError(f"--start {start:g} --end {end:g}: the end comes later than the start")
    parts = []
    for part in sample.parts:
        timed = part.kind in ("video", "audio")
        parts.append(replace(part, start=start, end=end) if timed else part)
    return replace(sample, parts=parts)


def next_question(sample: Sample, answer: str, question: str, id: str) -> Sample:
    """Return the sample of a further question in a conversation.

    Args:
        sample: of the question before.
        answer: to it.
    """
    given_before = PromptPart("text", text=answer, role="assistant")
    return replace(sample, id=id, parts=[*sample.parts, given_before, text_part(question)])


# --- the form of the run -------------------------------------------------------------------------


def prepare(samples: list[Sample], given: Namespace, run: LoadedRun) -> list[Sample]:
    """Put samples into the form of the run, with the side channels of --side.

    Raises:
        RunError: the model has no such side channel.
    """
    if not given.side:
        return silent(run.recipe.prepare_samples(samples, run.settings), run)

    # NAME, NAME=FILE or none
    names: list[str] = []
    files: dict[str, str] = {}
    for side in given.side:
        name, _, file = side.partition("=")
        if name != "none":
            names.append(name)
        if file:
            files[name] = file
    for name in names:
        if name not in run.model.side_names:
            raise RunError(
                f"--side {name}: the model has no such patch or modality, but "
                f"{', '.join(run.model.side_names) or 'none'}; a patch is loaded with --patch FILE"
            )

    # rows name the files of their side channels, which go before the run's folders
    settings = run.settings
    if files:
        samples = [with_side_files(sample, names, files) for sample in samples]
        folders = settings.data.feature_folders
        kept = [f"{name}={folder}" for name, folder in folders.items() if name not in files]
        settings = with_values(settings, features=",".join(kept))
    return run.recipe.prepare_samples(samples, settings, names)


def silent(samples: list[Sample], run: LoadedRun) -> list[Sample]:
    """Take the sounds out of prompts if the model takes none there; side channels stay.

    Raises:
        RunError: nothing is left to ask about.
    """
    if "audio" in run.model.media_tokens:
        return samples
    silenced = []
    for sample in samples:
        sounds = [part for part in sample.media if part.kind == "audio" and not part.side]
        if sounds:
            [sample] = add_side_channels([sample], [])
        if not sample.media:
            raise RunError(f"{sounds[0].path}: {run.folder} takes pictures and no sound alone")
        silenced.append(sample)
    return silenced


def with_side_files(sample: Sample, names: list[str], files: dict[str, str]) -> Sample:
    """Name the files of side channels in a sample's row.

    By default they are its own sound or video.
    """
    sides = {}
    for name in names:
        kind = "audio" if name == "audio" else "video"
        default = next((part.path for part in sample.media if part.kind == kind), None)
        sides[name] = files.get(name, default)
    return replace(sample, row={**sample.row, "sides": sides})


def check_task_media(task: Task, row: dict, name: str | Path) -> None:
    """Raise DataError where a task takes media that the command line does not name."""
    fields = [medium.fields[0] for medium in task.media]
    missing = [flag for field, flag in MEDIA_FLAGS.items() if field in fields and field not in row]
    if missing:
        kinds = " and ".join(medium.marker for medium in task.media)
        raise DataError(
            f"{Path(name).name}: the task {task.name} takes {kinds}; give {', '.join(missing)}, or "
            "another --task (python infer.py --help)"
        )


def row_of(given: Namespace, clip: Path | None, question: str) -> dict:
    """Make an annotation row from the command line.

    build_prompt reports what is missing.
    """
    # by default the sound is that of the clip; an image or a sound may stand in its place, and a
    # folder of frames has none
    kind = media_kind(clip) if clip else None
    sounds = given.audio
    if not sounds and clip and kind != "image" and not os.path.isdir(clip):
        sounds = [clip]
    image = given.image or (clip if kind == "image" else "")
    video = None if kind in ("audio", "image") else clip
    paths = {
        "video_path": video,
        "video1_path": video,
        "video2_path": given.second_video,
        "image_path": image,
        "audio_path": sounds[0] if sounds else None,
        "audio1_path": sounds[0] if sounds else None,
        "audio2_path": sounds[1] if len(sounds) > 1 else None,
    }
    row = {name: os.path.abspath(path) for name, path in paths.items() if path}

    # every field in which a task looks for its question
    if question:
        row |= dict.fromkeys(["question", "question_text", "description"], question)
    row |= {slot: getattr(given, slot) for slot in ("dialogue", "situation", "name")}
    row = {name: value for name, value in row.items() if value}
    if given.options:
        row["multi_choice"] = given.options.split(",")
    return {**row, "frame_idx": given.frame_index}


def built_in_data(run: LoadedRun, things: str, seed: int, split: str) -> Path:
    """Build the built-in world of a run, and return the path of the data of a split.

    Args:
        things: as for train.py; "" for those of the run.
    """
    settings = run.settings
    world = replace(settings.world, things=things or settings.world.things)
    training = replace(settings.training, seed=seed)
    root = run.recipe.built_in_data(replace(settings, world=world, training=training))
    # with side channels there is a file per split, else one folder
    return root.with_name(f"{split}.jsonl") if root.suffix == ".jsonl" else root


def chosen_task(given: Namespace, question: str = "", default: str = "avqa") -> Task:
    """Return the task of --task.

    Args:
        question: what is asked, "" for nothing.
        default: task of a question without --task.

    Raises:
        DataError: --task names several tasks, or a clip has neither a question nor a task.
    """
    if given.task:
        names = pick_tasks(given.task)
        if len(names) != 1:
            raise DataError(f"--task takes one task, got {given.task!r}; with --eval use --tasks")
        return TASKS[names[0]]
    file = given.clip[0] if given.clip else given.image
    if file and not (question or given.ask):
        raise DataError(
            f'what about {file}? give --ask "..." or --task, one of: {", ".join(TASKS)}'
        )
    return TASKS[default]
