"""Your own clips: from a table to a run, and questions to it, one by one and many."""

import csv
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import train
from crab_min.config import DataConfig
from crab_min.data import data_sources, read_samples, read_splits
from crab_min.errors import DataError
from crab_min.features import Mixer
from crab_min.sources.own import conversation_parts, form_row, question_form, read_own_rows
from crab_min.tools.loading import load_run
from crab_min.tools.questions import question_sample

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


def test_a_table_and_class_folders_give_the_same_rows(clips):
    table = read_own_rows(clips / "labels.csv")
    folders = read_own_rows(clips / "classes")
    contents = {row["messages"][0]["content"] for row in [*table, *folders]}
    assert contents == {"video: <video>\naudio: <audio>\nWhich of these is it: a dog, rain?"}
    for rows in (table, folders):
        answers = [row["messages"][1]["content"] for row in rows]
        assert sorted(answers) == ["<answer> a dog</answer>"] * 4 + ["<answer> rain</answer>"] * 4
        assert all(row["options"] == ["a dog", "rain"] for row in rows)
    assert {Path(row["videos"][0]).name for row in table} >= set(NAMES)


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


def test_test_rows_come_from_where_they_are_named(tmp_path):
    row = {"clip": "x.mp4", "label": "dog"}
    write_table(tmp_path / "mine.csv", [row] * 4)
    write_table(tmp_path / "other.csv", [row] * 3)
    assert [len(part) for part in splits(tmp_path / "mine.csv")] == [4, 0]  # one clip alone
    named = splits(tmp_path / "mine.csv", test=str(tmp_path / "other.csv"))
    assert [len(part) for part in named] == [4, 3]
    write_table(tmp_path / "test.csv", [row] * 2)
    assert [len(part) for part in splits(tmp_path / "mine.csv")] == [4, 2]


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
    assert infer.main([*run, *questions, "--", *NAMES]) == 0
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clip"], row["question"]) for row in rows] == [
        (name, question) for name in NAMES for question in ("Is it a dog?", "Is it rain?")
    ]


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
    subprocess_sound(clips / "4.mp4", sound)
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


def subprocess_sound(clip: Path, out: str) -> None:
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
