"""Your own clips: from a table to a run, and questions to it, one by one and many."""

import csv
import importlib
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import infer
import train
from crab_min.cli import parse_train
from crab_min.config import DataConfig, Settings, with_values
from crab_min.data import Sample, data_sources, form_of, read_samples, read_splits
from crab_min.errors import DataError, RunError
from crab_min.evaluation.page import write_card, write_page
from crab_min.evaluation.report import Evaluation
from crab_min.evaluation.scores import score_all
from crab_min.features import Mixer
from crab_min.recipes.presets import PRESETS
from crab_min.runs.asking import asking_command, asking_words
from crab_min.runs.log import LogRow, open_log
from crab_min.sources.own import conversation_parts, form_row, question_form, read_own_rows
from crab_min.tools import check
from crab_min.tools.fit import fit, memory_of, smaller_settings
from crab_min.tools.loading import SHIPPED, LoadedRun, load_asked, load_run
from crab_min.tools.many import read_question_file
from crab_min.tools.plan import plan
from crab_min.tools.questions import clips_of, question_sample, split_positional

ROOT = Path(__file__).parents[1]
# names as people give them
NAMES = ["a b.mp4", "Übung.mp4", "-dash.mp4", 'it\'s "x".mp4']
SMALL = ["--steps", "2", "--batch-size", "2", "--no-cache-features", "--workers", "0"]


@pytest.fixture(scope="module")
def clips(small_world, tmp_path_factory):
    """A folder with a table of 8 clips of the world and two labels, and class folders of them."""
    folder = tmp_path_factory.mktemp("my clips")
    rows = json.loads((small_world / "ks" / "train.json").read_text())[:8]
    lines = []
    for index, row in enumerate(rows):
        name = NAMES[index] if index < len(NAMES) else f"{index}.mp4"
        label = ("a dog", "rain")[index % 2]
        video = os.path.normpath(small_world / "ks" / "video" / row["video_path"])
        shutil.copyfile(video, folder / name)
        (folder / "classes" / label).mkdir(parents=True, exist_ok=True)
        os.link(folder / name, folder / "classes" / label / name)
        lines.append({"clip": name, "label": label})
    write_table(folder / "labels.csv", lines)
    return folder


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def splits(path: Path, **config) -> tuple[list, list]:
    return read_splits(DataConfig(**config), str(path), [], None, 0)


# --- one reader -----------------------------------------------------------------------------------


def test_a_table_and_class_folders_give_the_same_rows(clips, capsys):
    table = read_own_rows(clips / "labels.csv")
    folders = read_own_rows(clips / "classes")
    contents = {row["messages"][0]["content"] for row in [*table, *folders]}
    assert contents == {"video: <video>\naudio: <audio>\nWhich of these is it: a dog, rain?"}
    for rows in (table, folders):
        answers = [row["messages"][1]["content"] for row in rows]
        assert sorted(answers) == ["<answer> a dog</answer>"] * 4 + ["<answer> rain</answer>"] * 4
        assert all(row["options"] == ["a dog", "rain"] for row in rows)
    assert {Path(row["videos"][0]).name for row in table} >= set(NAMES)

    # what is no clip of a class is named
    (clips / "classes" / "rain" / "more").mkdir()
    (clips / "classes" / "rain" / "more" / "x.mp4").touch()
    (clips / "classes" / "rain" / "x.txt").touch()
    assert read_own_rows(clips / "classes") == folders
    unused = os.path.join("rain", "more", "x.mp4") + ", " + os.path.join("rain", "x.txt")
    assert f"files that are not used: {unused}\n" in capsys.readouterr().err
    shutil.rmtree(clips / "classes" / "rain" / "more")
    (clips / "classes" / "rain" / "x.txt").unlink()

    # the folder of the table itself has no classes, whatever lies beside it
    with pytest.raises(DataError, match="a table such as labels.csv"):
        read_samples(clips, ["ave"], "train")


def test_training_and_test_rows_list_the_labels_of_both(tmp_path):
    row = {"clip": "x.mp4"}
    write_table(tmp_path / "t.csv", [row | {"label": label} for label in ("dog", "rain")])
    write_table(tmp_path / "test.csv", [row | {"label": label} for label in ("dog", "wind")])
    asked = {"video: <video>\naudio: <audio>\nWhich of these is it: dog, rain, wind?"}
    for test in ("", str(tmp_path / "test.csv")):  # beside the data, and named
        train_samples, test_samples = splits(tmp_path / "t.csv", test=test)
        questions = [sample.row["messages"][0]["content"] for sample in train_samples]
        assert {*questions, *(s.row["messages"][0]["content"] for s in test_samples)} == asked
        assert test_samples[0].row["options"] == ["dog", "rain", "wind"]

    # a run asks another table as it was trained
    form = form_of(train_samples)
    write_table(tmp_path / "new.csv", [row | {"label": "rain"}])
    [sample] = read_samples(tmp_path / "new.csv", [], "test", labels=form.options)
    assert {sample.row["messages"][0]["content"]} == asked
    _, [row] = read_question_file(tmp_path / "new.csv", form.options)
    assert {row["messages"][0]["content"]} == asked


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_of_a_table(tmp_path, delimiter):
    row = {"Clip": "x.mp4", "question": "Who, and when?", "answer": "A dog barks and then it runs."}
    row |= {"split": "test", "start": "1.5", "end": "4", "audio": "x.wav"}
    write_table(tmp_path / "t.csv", [row, row | {"split": "train"}], delimiter)
    train_samples, [sample] = splits(tmp_path / "t.csv")
    assert len(train_samples) == 1 and sample.task.metric == "rouge_l"  # no label: too long
    video, sound = sample.media
    assert (video.start, video.end) == (sound.start, sound.end) == (1.5, 4.0)
    assert sound.path == str(tmp_path / "x.wav") and sample.parts[-1].text.endswith("and when?")
    short = {"clip": "x.mp4", "question": "Who?", "answer": "The dog"}
    write_table(tmp_path / "short.csv", [short], delimiter)
    [sample] = read_samples(tmp_path / "short.csv", [], "train")
    assert sample.task.metric == "accuracy" and sample.gold.choice == "The dog"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("clip,lable\nx.mp4,dog\n", "columns clip, lable; expected clip,label"),
        ("clip,label\nx.mp4,\n", "line 2: no label"),
        ("clip,label,split\nx.mp4,dog,dev\n", "line 2: split 'dev'; expected train or test"),
        ("clip,label,start\nx.mp4,dog,soon\n", "line 2: start 'soon'; expected seconds"),
        ("clip,label,start,end\nx.mp4,dog,5,4\n", "line 2: start 5 and end 4"),
        ("clip,label\n", "no lines"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, text, reason):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_samples(tmp_path / "t.csv", [], "train")


def test_a_line_of_another_split_is_an_error_and_not_left_out(tmp_path):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}
    lines = [row | {"split": "train"}, row | {"split": "dev"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="line 2: .*split 'dev'; expected train or test"):
        splits(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["labels.csv", "classes"])
def test_the_check_counts_labels_files_seconds_and_tokens(clips, tmp_path, capsys, name):
    files = ["--out", str(tmp_path / "check.json"), "--figure", str(tmp_path / "check.png")]
    command = ["--data", str(clips / name), *files, "--workers", "0", "--model", "crab_plus-tiny"]
    assert check.main(command) == 0
    printed = capsys.readouterr().out
    assert "labels of own/train: a dog 3, rain 3" in printed
    assert "labels of own/test: " in printed
    assert "8 files, 0 of them missing or unreadable" in printed
    assert "tokens of a prompt for crab_plus-tiny" in printed
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["tasks"]["own/train"]["seconds"] == [pytest.approx(10, abs=0.2)] * 3


def test_the_check_reads_what_a_run_reads_and_writes_nothing_unasked(
    clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "t.csv", [{"clip": str(clips / "5.mp4"), "label": "dog"}])
    flags = ["--headers", "--workers", "0"]
    assert check.main(["--data", f"{clips / 'labels.csv'}:0.7,t.csv:0.3", *flags]) == 0
    printed = capsys.readouterr().out
    assert "labels of own/train: a dog 3, rain 3, dog 1" in printed
    assert check.main(["--data", str(clips / "labels.csv"), "--test", "t.csv", *flags]) == 0
    printed = capsys.readouterr().out
    assert "labels of own/train: a dog 4, rain 4" in printed
    assert "labels of own/test: dog 1" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


# --- training and test rows -----------------------------------------------------------------------


def test_a_fifth_of_the_clips_of_each_label_is_for_testing_and_clips_stay_together(tmp_path):
    rows = []
    for clip in range(30):
        for question in ("What is it?", "What is it called?"):
            label = "dog" if clip < 20 else "rain"
            rows.append({"clip": f"{clip}.mp4", "question": question, "answer": label})
    write_table(tmp_path / "t.csv", rows)
    train_samples, test_samples = splits(tmp_path / "t.csv")
    assert [s.row["clip"] for s in test_samples] == [
        s.row["clip"] for s in splits(tmp_path / "t.csv")[1]
    ]
    labels = [sample.gold.choice for sample in test_samples]
    assert (labels.count("dog"), labels.count("rain")) == (8, 4)
    tested = {sample.row["clip"] for sample in test_samples}
    assert not tested & {sample.row["clip"] for sample in train_samples}

    # a label of a single clip is learned; free answers are split as one group
    lines = [{"clip": f"{n}.mp4", "question": "?", "answer": f"{n}"} for n in range(5)]
    for answer, counts in (("", [5, 0]), (" and so it goes on and on", [4, 1])):
        write_table(tmp_path / "t.csv", [row | {"answer": row["answer"] + answer} for row in lines])
        assert [len(part) for part in splits(tmp_path / "t.csv")] == counts


def test_test_rows_come_from_where_they_are_named(tmp_path):
    row = {"clip": "x.mp4", "label": "dog"}
    write_table(tmp_path / "mine.csv", [row] * 4)
    write_table(tmp_path / "other.csv", [row] * 3)
    assert [len(part) for part in splits(tmp_path / "mine.csv")] == [4, 0]  # one clip alone
    named = splits(tmp_path / "mine.csv", test=str(tmp_path / "other.csv"))
    assert [len(part) for part in named] == [4, 3]
    write_table(tmp_path / "test.csv", [row] * 2)
    assert [len(part) for part in splits(tmp_path / "mine.csv")] == [4, 2]

    # a limit takes rows of all labels, also where a table is sorted by them
    labels = ["dog"] * 6 + ["rain"] * 2 + ["wind"] * 4
    write_table(tmp_path / "test.csv", [row | {"label": label} for label in labels])
    _, limited = splits(tmp_path / "mine.csv", test_rows=4)
    assert [sample.gold.choice for sample in limited] == ["dog", "dog", "rain", "wind"]


def test_sources_have_their_shares(tmp_path, small_world):
    write_table(tmp_path / "mine.csv", [{"clip": f"{i}.mp4", "label": "dog"} for i in range(10)])
    named = f"{tmp_path / 'mine.csv'}:0.7,{small_world}:0.3"
    train_samples, _ = read_splits(DataConfig(), named, ["ks", "ave"], None, 0)
    assert len({sample.id for sample in train_samples}) == len(train_samples)
    batches = iter(Mixer(train_samples, 50, seed=0))
    drawn = [sample for _ in range(40) for sample in next(batches)]
    own = sum(sample.task.name == "own" for sample in drawn) / len(drawn)
    assert own == pytest.approx(0.7, abs=0.03)
    with pytest.raises(DataError, match="'much' is no share"):
        data_sources("a.csv:much,b.csv")
    many = [(f"labels_of_the_recording_{i:03}.csv", 0.1) for i in range(10)]
    assert data_sources(",".join(f"{path}:{share}" for path, share in many)) == many


# --- conversations --------------------------------------------------------------------------------


def test_every_turn_is_learned_with_its_role(tmp_path, tiny_model):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>What is it?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "On the left."},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": messages, "videos": ["x.mp4"]}))
    first, second = read_samples(path, [], "train")
    assert (first.target, second.target) == ("A dog.", "On the left.")
    assert [part.role for part in first.parts] == ["system", "", ""]
    assert [part.role for part in second.parts] == ["system", "", "", "assistant", ""]

    no_media = [part for part in second.parts if part.kind == "text"]
    text = tiny_model.tokenizer.decode(tiny_model.prompt_ids(no_media, []))
    assert text.index("brief") < text.index("What is it") < text.index("dog") < text.index("Where")


def test_a_system_text_and_turns_stand_where_qwen_has_them():
    from crab_min.backbones.load import load_model
    from crab_min.config import BackboneConfig
    from crab_min.interface import PromptPart, text_part

    model = load_model(BackboneConfig("omni", weights="tiny-random"))
    parts = [
        PromptPart("text", text="Be brief.", role="system"),
        text_part("What is it?"),
        PromptPart("text", text="A dog.", role="assistant"),
        text_part("Where?"),
    ]
    assert model.tokenizer.decode(model.prompt_ids(parts, [])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# --- the form of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, form",
    [
        ("<video><audio>What barks?", "<video><audio>{question}"),
        ("What barks?", "<video><audio>{question}"),
        ("What barks? <video> <audio>", "{question} <video> <audio>\n"),
        ("See: <video>\nhear: <audio>\nWhat barks?", "See: <video>\nhear: <audio>\n{question}"),
    ],
)
def test_a_question_is_put_as_the_rows_put_theirs(content, form):
    files = {"video": ["/x.mp4"], "audio": ["/x.wav"]}
    row = {"messages": [{"role": "user", "content": content}]}
    row |= {f"{kind}s": paths for kind, paths in files.items()}
    found = question_form([row], is_label=False)
    assert (found.text, found.question) == (form, "What barks?")
    assert conversation_parts(form_row(found, "What barks?", files)) == conversation_parts(row)
    with pytest.raises(DataError, match="1 <audio>"):
        form_row(found, "What barks?", {"video": ["/x.mp4"]})


def jsonl_of(clips: Path, path: Path) -> Path:
    """Write the rows of the table as a .jsonl with words of its own."""
    lines = []
    for row in read_own_rows(clips / "labels.csv"):
        question = {"role": "user", "content": "Watch <video> and listen <audio>\nSo, what?"}
        lines.append(row | {"messages": [question, row["messages"][1]]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


BACKBONES = {
    "tiny": ["crab_plus-tiny"],
    "omni": ["crab_plus-3b", "--weights", "tiny-random", "--r", "4"],
    "llava": ["pave-0.5b", "--weights", "tiny-random", "--r", "4", "--frames", "2"],
    "blip2": ["crema-xl", "--weights", "tiny-random"],
}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_run_is_trained_and_then_asked_by_the_printed_command_with_the_same_prompt(
    clips, tmp_path, monkeypatch, capsys, backbone, form
):
    data = clips / "labels.csv" if form == "csv" else jsonl_of(clips, tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(data), *SMALL, "--batch-size", "2", "--test-rows", "1"]
    assert train.main([*BACKBONES[backbone], *flags, "--device", "cpu", "--out", "run"]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:2] == ["python", "infer.py"]
    assert infer.main([*words[2:], "--device", "cpu", "--max-new-tokens", "4"]) == 0
    assert "answer: " in capsys.readouterr().out

    # the same tokens as in training
    run = load_run("run", "cpu")
    given = infer.parse_infer(words[2:])
    [trained] = run.recipe.prepare_samples(
        read_samples("run/test.jsonl", [], "test"), run.settings
    )[:1]
    question = "" if form == "csv" else "So, what?"
    asked = question_sample(given, run, Path(trained.row["videos"][0]), question)
    assert asked.parts == trained.parts
    assert asked.task is trained.task


def asked_sample(words: list[str], run: LoadedRun) -> Sample:
    """Return the sample that infer.py makes of its words."""
    given = infer.parse_infer(words)
    split_positional(given)
    [clip] = clips_of(given) or [None]
    return question_sample(given, run, clip, given.ask)


def test_every_task_is_asked_as_it_was_trained(small_world):
    run = load_asked(infer.parse_infer(["--demo"]))
    names = [path.parent.name for path in sorted(small_world.glob("*/train.json"))]
    assert len(names) > 15
    for name in names:
        [trained] = read_samples(small_world, [name], "train", limit=1)
        assert asked_sample(asking_words([trained], None), run).parts == trained.parts, name


@pytest.mark.parametrize(
    "files",
    [
        {"videos": ["x.mp4"], "audios": ["other.wav"]},
        {"audios": ["-x.wav", "y.wav"]},
        {"videos": ["x.mp4"], "images": ["x.png"]},
        {"images": ["x.png"]},
        {"videos": ["x.mp4"], "audios": ["x.mp4"], "start": 1.5, "end": 4},
    ],
)
def test_the_printed_command_names_every_file_of_a_row(tmp_path, files):
    user, assistant = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes."}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [user, assistant], **files}))
    for name in {name for kind in ("videos", "audios", "images") for name in files.get(kind, [])}:
        (tmp_path / name).write_bytes(b"x")
    [trained] = read_samples(path, [], "train")
    run = load_asked(infer.parse_infer(["--demo"]))
    run.form = form_of([trained])
    words = asking_words([trained], run.form)
    assert asked_sample(words, run).parts == trained.parts


def test_a_missing_clip_is_named_once_and_not_in_the_printed_command(clips, tmp_path, capsys):
    rows = [(tmp_path / "gone.mp4", "test"), (clips / "5.mp4", "test"), (clips / "4.mp4", "train")]
    lines = [{"clip": str(clip), "label": "dog", "split": split} for clip, split in rows]
    write_table(tmp_path / "t.csv", lines)
    flags = ["--allow-missing", "--no-baseline", "--out", str(tmp_path / "run")]
    assert train.main(["--data", str(tmp_path / "t.csv"), *SMALL, *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("gone.mp4") == 1 and "5.mp4" in printed.splitlines()[-1]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["unreadable_files"] == 1


def test_the_printed_command_names_files_below_the_working_folder_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"clip": f"{folder}-x.mp4", "label": "dog"} for folder in ("", "a/", "../")]
    write_table(tmp_path / "t.csv", rows)
    samples = read_samples(tmp_path / "t.csv", [], "train")
    commands = [asking_command(Path("runs/x"), [sample], form_of([sample])) for sample in samples]
    clips = [shlex.split(command)[2] for command in commands]
    assert clips == ["./-x.mp4", "a/-x.mp4", "../-x.mp4"]


@pytest.mark.parametrize(
    "words, missing",
    [
        (["x.png", "What?"], "takes video and audio; give a video, --audio FILE"),
        (["x.wav", "What?"], "takes video and audio; give a video"),
        (["x.png", "--task", "s4"], "takes image and audio; give --audio FILE"),
        (["x.mp4", "--task", "a2v"], "give --second-video FILE"),
    ],
)
def test_media_that_a_task_takes_and_nobody_gave_are_named(tmp_path, words, missing):
    (tmp_path / words[0]).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{words[0]}: the task .* {missing}, or another --task"):
        asked_sample(
            [str(tmp_path / words[0]), *words[1:]], load_asked(infer.parse_infer(["--demo"]))
        )


def test_odd_names_go_through_all_commands(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clips)
    run = ["--run", str(tmp_path / "run")]
    flags = ["--data", "labels.csv", *SMALL, "--test-rows", "2", "--out", run[1]]
    assert train.main(flags) == 0
    for name in NAMES:
        words = [*run, "--max-new-tokens", "4", "--json", "--", name]
        assert infer.main(words) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert Path(line["clip"]).name == name and Path(line["picture"]).is_file()
    out = str(tmp_path / "answers.csv")
    (tmp_path / "q.txt").write_text("Is it a dog?\nIs it rain?\n")
    questions = ["--questions", str(tmp_path / "q.txt"), "--max-new-tokens", "4", "--out", out]
    write_sound(clips / "4.mp4", str(tmp_path / "alone.wav"))
    others = [str(tmp_path / "alone.wav"), str(tmp_path / "folder")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.mp4").write_text("no video")
    (tmp_path / "folder" / "empty.mp4").touch()
    assert infer.main([*run, *questions, "--", *NAMES, *others]) == 0
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    # what cannot be asked about has an error; the others are answered
    errors = [row["error"] for row in rows[2 * len(NAMES) :]]
    assert "alone.wav: the model was trained on questions with 1 <video>" in errors[0]
    assert "broken.mp4" in errors[2] and "empty.mp4: empty" in errors[4] and len(errors) == 6
    rows = rows[: 2 * len(NAMES)]
    assert [(row["clip"], row["question"]) for row in rows] == [
        (name, question) for name in NAMES for question in ("Is it a dog?", "Is it rain?")
    ]


# --- what a run leaves ----------------------------------------------------------------------------


def test_the_page_counts_confusions_and_is_one_file_without_scripts(tmp_path):
    labels = ["Übung & Spiel", 'rain "x"'] * 2
    rows = [{"clip": f"<{index}>.png", "label": label} for index, label in enumerate(labels)]
    write_table(tmp_path / "t.csv", rows)
    samples = read_samples(tmp_path / "t.csv", [], "test")
    texts = ["<answer>übung & spiel</answer>", "<answer>rain x</answer>", "nothing", "<script>"]
    texts[1] = samples[1].task.format(samples[1].gold)
    scores = score_all(samples, texts)
    assert scores["own"]["metric"] == 0.5
    for result in scores.values():
        result |= {"base": 0.25, "constant": 0.5}
    settings = with_values(Settings(), data=str(tmp_path / "Übung.csv"))
    evaluation = Evaluation(samples, texts, [None] * 4, scores)
    write_page(tmp_path, settings, evaluation, "python infer.py 'a <b>.mp4'", Settings())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert "<script" not in page and "http" not in page and "viewport" in page
    assert "python infer.py &#x27;a &lt;b&gt;.mp4&#x27;" in page and "Übung.csv" in page
    # each label was answered right once, and once without a label
    assert page.count('<td class="right">1</td>') == 2
    assert page.count('<td class="wrong">1</td>') == 2 and "no label" in page
    assert "&lt;2&gt;.png" in page and "&lt;script&gt;" in page and "&lt;0&gt;.png" not in page


def test_the_card_names_base_scores_and_no_path_of_this_machine(tmp_path):
    scores = {"own": {"name": "accuracy", "metric": 0.75, "n": 12}}
    write_card(tmp_path, "Qwen/Qwen2.5-Omni-3B", "python infer.py CLIP.mp4", scores)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "\nbase_model: Qwen/Qwen2.5-Omni-3B\n" in card
    assert "| own | accuracy | 0.750 | 12 |" in card and str(tmp_path) not in card
    write_card(tmp_path, str(tmp_path), "python infer.py CLIP.mp4", scores)
    assert "base_model" not in (tmp_path / "README.md").read_text(encoding="utf-8")


class FakeTracker:
    """A stand-in for a run of wandb, or for tensorboard's SummaryWriter."""

    def __init__(self, *_, **__):
        self.rows, self.closed = [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def log(self, values: dict, step: int) -> None:
        self.rows += [(name, value, step) for name, value in values.items()]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_gets_every_row_and_is_closed(tmp_path, monkeypatch, name):
    tracker = FakeTracker()
    module = SimpleNamespace(init=lambda **_: tracker, SummaryWriter=lambda _: tracker)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with open_log(tmp_path, 0, 2, name) as log:
        for step in (1, 2):
            log(LogRow(step, 0.1, 1.0, 0.0, None, 3.0 / step, 4, 2, 40, 1.0, ""))
    assert ("loss", 3.0, 1) in tracker.rows and ("loss", 1.5, 2) in tracker.rows
    assert tracker.closed and not any(row[0] == "step" for row in tracker.rows)


def test_a_tracker_that_is_not_installed_is_said_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("crab_min.runs.log.find_spec", lambda _: None)
    monkeypatch.setattr("crab_min.backbones.load.load_model", None)
    assert train.main(["--log-to", "wandb"]) == 2
    assert "--log-to wandb: not installed; pip install wandb" in capsys.readouterr().err


def test_a_run_comes_from_the_hub_and_a_model_is_not_fetched_as_one(tmp_path, monkeypatch):
    folders = {"owner/run": SHIPPED, "owner/model": tmp_path}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    fetched = []

    def fetch(name: str) -> str:
        fetched.append(name)
        return str(folders[name])

    monkeypatch.setattr("crab_min.tools.loading.snapshot_download", fetch)
    monkeypatch.setattr(
        "crab_min.tools.loading.hf_hub_download", lambda name, file: str(folders[name] / file)
    )
    assert load_run("owner/run", "cpu").folder == SHIPPED
    with pytest.raises(RunError, match="owner/model: a model and no run; ask it with --model"):
        load_run("owner/model", "cpu")
    assert fetched == ["owner/run"]


# --- --fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "crab_plus-7b",
        pytest.param("pave-7b", marks=pytest.mark.slow),
        pytest.param("crab-7b", marks=pytest.mark.slow),
    ],
)
def test_fit_chooses_settings_that_the_plan_says_fit(name):
    given, settings = parse_train([name])
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[name].recipe}")
    chosen, text = fit(recipe, settings, 24)
    assert memory_of(plan(recipe, chosen)).fits(24)
    assert not memory_of(plan(recipe, settings)).fits(24) and "estimated" in text
    before, after = settings.training, chosen.training
    assert before.batch_size * before.grad_accum == after.batch_size * after.grad_accum


def test_fit_refuses_with_the_gpu_that_would_do(monkeypatch):
    needed = {"needed": 20.2}
    memory = SimpleNamespace(fits=lambda gigabytes: False, **needed)
    result = SimpleNamespace(memory={"bfloat16": memory, "4-bit LM": memory})
    monkeypatch.setattr("crab_min.tools.fit.plan", lambda *_: result)
    _, settings = parse_train(["crab_plus-7b"])
    with pytest.raises(RunError, match="--fit 8: .* 20.2 GB; a GPU of 24 GB would do"):
        fit(None, settings, 8)


def test_batches_shrink_by_their_divisors():
    _, settings = parse_train(["crab_plus-7b", "--batch-size", "24", "--grad-accum", "2"])
    result = SimpleNamespace(memory={})
    values = [values for _, values in smaller_settings(settings, result)]
    sizes = [(v["batch_size"], v["grad_accum"]) for v in values if "batch_size" in v]
    assert sizes == [(12, 4), (6, 8), (3, 16), (1, 48)]


def test_clips_and_the_question_stand_anywhere_among_the_flags():
    given = infer.parse_infer(["x.mp4", "--start", "2", "What?", "--json", "--", "-y.mp4"])
    assert given.clip == ["x.mp4", "What?", "-y.mp4"] and given.start == 2 and given.json


# --- without a run --------------------------------------------------------------------------------


def test_without_a_model_the_ways_are_named(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip = str(clips / "4.mp4")
    assert infer.main([clip, "What is it?"]) == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("--model", "--run", "train.py", "--demo"))
    assert infer.main([clip, "What is it?", "--demo", "--max-new-tokens", "4"]) == 0
    assert "knows the built-in synthetic world alone" in capsys.readouterr().err
    assert infer.main([clip, "What is it?", "--demo", "--run", "x"]) == 2
    assert "--run and --demo: give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["omni", "llava", "blip2", "base"])
def test_a_pretrained_model_is_asked_without_training(clips, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    folder = saved_model(name, tmp_path / "model")
    flags = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "4", "--json"]
    assert infer.main([str(clips / "4.mp4"), "What is it?", *flags]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["question"] == "What is it?" and line["text"] == line["parsed"].get("text", "")
    picture = line["picture"]
    assert infer.main([picture, "What is drawn?", *flags]) == 0
    sound = str(clips / "4.wav")
    write_sound(clips / "4.mp4", sound)
    answered = infer.main([sound, "What is heard?", *flags])
    if name in ("omni", "base"):
        assert answered == 0
    else:
        assert answered == 2 and "takes pictures and no sound alone" in capsys.readouterr().err


def saved_model(name: str, folder: Path) -> Path:
    """Save a tiny random model as a hub would hold it, or name the shipped base."""
    from crab_min.backbones import tiny_random
    from crab_min.model import ASSETS

    if name == "base":
        return ASSETS / "base"
    make = {"omni": tiny_random.tiny_omni, "llava": tiny_random.tiny_llava}
    if name == "blip2":
        model, processor = tiny_random.tiny_blip2("<video>")
    else:
        model, processor = make[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_sound(clip: Path, out: str) -> None:
    """Write the sound of a clip to a .wav."""
    import wave

    import numpy as np

    from crab_min.media.read import read_audio

    sound = read_audio(clip).wave
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


# --- one after the other, and many ----------------------------------------------------------------


def asking(clips: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "infer.py"), str(clips / "4.mp4"), "--demo"]
    return [*command, "--max-new-tokens", "6"]


def test_questions_come_line_by_line_through_a_terminal(clips, tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        asking(clips), cwd=tmp_path, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = ""

    def read_until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(leader, 4096).decode()

    for number in range(3):
        read_until("question: ")
        shown = shown.replace("question: ", "asked: ")
        os.write(leader, f"How many things are seen, {number}?\n".encode())
    read_until("question: ")
    os.write(leader, b"\x04")  # Ctrl-D
    assert process.wait(120) == 0
    os.close(leader)
    assert shown.count("Ctrl-D ends") == 1 and shown.count("asked: ") == 3


def test_questions_come_through_a_pipe(clips, tmp_path):
    done = subprocess.run(
        asking(clips),
        cwd=tmp_path,
        input="How many things are seen?\nWhat is heard?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 2

    # an answer about each of several clips has its name in front
    done = subprocess.run(
        [*asking(clips), str(clips / "5.mp4")],
        cwd=tmp_path,
        input="What is heard?\n",
        capture_output=True,
        text=True,
    )
    assert [line[:7] for line in done.stdout.splitlines()] == ["4.mp4: ", "5.mp4: "]


@pytest.mark.slow
def test_many_questions_that_were_stopped_continue_with_the_same_answers(
    clips, tmp_path, monkeypatch
):
    from crab_min.evaluation import answering

    names = [str(path) for path in sorted(clips.glob("[4-7].mp4"))]
    questions = tmp_path / "q.jsonl"
    texts = [f"How many things are seen, {i}?" for i in range(125)]
    questions.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    flags = ["--demo", "--questions", str(questions), "--max-new-tokens", "3"]

    whole, stopped = tmp_path / "whole.csv", tmp_path / "stopped.csv"
    assert infer.main([*names, *flags, "--out", str(whole)]) == 0
    calls = []
    answer_batch = answering.answer_batch

    def stop_after_three(*arguments):
        calls.append(arguments[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr(answering, "answer_batch", stop_after_three)
    assert infer.main([*names, *flags, "--out", str(stopped)]) == 130
    assert not stopped.exists()
    assert infer.main([*names, *flags, "--out", str(stopped)]) == 0
    assert stopped.read_bytes() == whole.read_bytes()
    answered = [sample.id for i, batch in enumerate(calls) if i != 3 for sample in batch]
    assert len(answered) == len(set(answered)) == 500
    assert infer.main([*names, *flags, "--out", str(stopped)]) == 2  # finished answers stay
    assert not list(tmp_path.glob(".*partial"))
