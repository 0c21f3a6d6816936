"""What people really bring: odd flags, values, texts, rows, paths, names and things.

Each is used as it is meant, or refused in one line that names it.
"""

import ast
import json
import subprocess
import sys
import wave as wavefile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
import train
from crab_min.cli import flags_of, parse_infer, parse_train
from crab_min.config import INFER, RECIPES, Settings, groups_of
from crab_min.data import load_media, read_samples
from crab_min.errors import DataError, MediaError, ModelError, RunError
from crab_min.evaluation.pictures import draw_answer
from crab_min.interface import PromptPart, QuestionForm, load_prompts, text_part
from crab_min.media.arrays import read_array, read_points
from crab_min.media.read import read_audio, read_image, read_video
from crab_min.media.write import write_audio
from crab_min.recipes.crab import add_mask_tokens
from crab_min.runs.folder import Progress, SavedRun, choose_folder, load_saved_run, save_checkpoint
from crab_min.sources.av_uie import mask_path, read_list
from crab_min.sources.own import conversation_parts, form_row, read_own_rows
from crab_min.tasks import TASKS
from crab_min.tools.many import read_question_file
from crab_min.tools.reply import default_picture
from crab_min.world.things import load_things

ROOT = Path(__file__).parents[1]


# --- flags and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["--plan --fit crab-7b", "--fit 24 crab-7b --plan", "--fit=24 --plan crab-7b"]
)
def test_a_preset_may_follow_a_flag_that_takes_a_number(command):
    given, _ = parse_train(command.split())
    assert given.preset == "crab-7b" and given.fit == (24 if "24" in command else 0)


@pytest.mark.parametrize(
    "command", ["--steps 2 nosuch", "nosuch --plan", "--fit 24 nosuch", "crab-tiny nosuch"]
)
def test_a_preset_that_is_not_there_is_refused_wherever_it_stands(command, capsys):
    with pytest.raises(SystemExit):
        parse_train(command.split())
    assert "nosuch" in capsys.readouterr().err


def test_words_of_infer_may_stand_between_flags():
    assert parse_infer(["a.mp4", "--demo", "b.mp4", "What?"]).clip == ["a.mp4", "b.mp4", "What?"]
    assert parse_infer(["--demo", "--", "-a.mp4", "What?"]).clip == ["-a.mp4", "What?"]


@pytest.mark.parametrize(
    "command", ["-PE8geTWt-g.mp4", "clip.mp4 --audio -x.wav", "--image -y.png clip.mp4"]
)
def test_a_file_that_reads_like_a_flag_gets_a_hint(command, capsys):
    with pytest.raises(SystemExit):
        infer.main(command.split())
    file = next(word for word in command.split() if word.startswith("-") and "." in word)
    assert f"write ./{file} for the file" in capsys.readouterr().err


def number_flags() -> list[tuple[str, str]]:
    found = set()
    groups = [groups_of(recipe) for recipe in RECIPES.values()]
    for preset, recipe in zip(("crab-tiny", "", "crema-tiny", "pave-tiny", "tiny-base"), groups):
        flags = flags_of(recipe).items()
        found |= {(f"{preset} --{name}", f.type, *f.metadata["range"]) for name, f in flags}
    infer_flags = flags_of(INFER).items()
    found |= {(f"infer --{name}", f.type, *f.metadata["range"]) for name, f in infer_flags}
    return sorted(item for item in found if item[1] in (int, float))


def test_every_number_out_of_its_range_is_refused(capsys):
    flags = number_flags()
    assert len(flags) > 100
    for command, kind, least, most in flags:
        values = [str(least - 1), "many", *(["nan", "inf"] if kind is float else ["1.5"])]
        for value in [*values, *([str(most + 1)] if most == 1 else [])]:
            words = [*command.split(), value]
            with pytest.raises(SystemExit):
                parse_infer(words[1:]) if words[0] == "infer" else parse_train(words)
            assert f"{words[-2]}: " in capsys.readouterr().err


def test_no_epochs_leave_the_steps_of_the_preset():
    assert parse_train(["pave-tiny", "--epochs", "0"])[1].training.steps == 400
    assert parse_train(["pave-tiny", "--epochs", "1"])[1].training.steps == 0


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, change",
    [("data", {"workers": 9}), ("data", {"cache_features": False}), ("run", {"device": "cpu"})],
)
def test_flags_that_change_no_result_continue_the_same_run(tmp_path, monkeypatch, group, change):
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    SavedRun("x", "crab_plus", settings).save(folder)
    changed = replace(settings, **{group: replace(getattr(settings, group), **change)})
    assert choose_folder(changed, "x") == Path("runs/x")
    other = replace(settings, training=replace(settings.training, lr=1.0))
    assert choose_folder(other, "x") == Path("runs/x-2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path, value):
    class Model(torch.nn.Linear):
        llm = None

        def parts_to_save(self):
            return []

    def writer(write):
        write()

    model = Model(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path, Progress(1), model, optimizer, 1, writer)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(RunError, match="step 2: bias has weights that are not finite"):
        save_checkpoint(tmp_path, Progress(2), model, optimizer, 1, writer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


# --- media ----------------------------------------------------------------------------------------


def write_float_wave(path: Path, wave: np.ndarray, rate: int = 16000) -> None:
    """Write a WAV of 32-bit floats."""
    data = wave.astype("<f4").tobytes()
    form = b"fmt " + (16).to_bytes(4, "little") + (3).to_bytes(2, "little")
    form += (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
    form += (
        (4 * rate).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    )
    body = b"WAVE" + form + b"data" + len(data).to_bytes(4, "little") + data
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize("value", [np.nan, np.inf, -32768.0])
def test_an_unusable_value_of_a_sound_is_named_with_its_second(tmp_path, value):
    wave = np.zeros(32000, np.float32)
    write_float_wave(tmp_path / "a.wav", wave + 0.5)
    assert read_audio(tmp_path / "a.wav").wave[100] == pytest.approx(0.5)
    wave[24000] = value
    write_float_wave(tmp_path / "a.wav", wave)
    with pytest.raises(MediaError, match=r"a.wav: .* at 1.5\d? s; full scale is -1 to 1"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_an_unusable_value_of_an_array_is_named(tmp_path, value):
    features = np.zeros((4, 8), np.float32)
    features[2, 3] = value
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(MediaError, match="a.npy: .* not finite in half precision"):
        read_array(str(tmp_path / "a.npy"), 4, 8)
    np.savez(tmp_path / "a.npz", xyz=np.zeros((4, 3)), features=features)
    with pytest.raises(MediaError, match="a.npz: points with values that are not finite"):
        read_points(str(tmp_path / "a.npz"))


DEEP = {
    "I;16": ("png", np.uint16, 65535),
    "I;16B": ("tif", ">u2", 65535),
    "I": ("tif", np.int32, 65535),
    "F": ("tif", np.float32, 1),
}


@pytest.mark.parametrize("mode", DEEP)
def test_deep_pictures_are_scaled(tmp_path, mode):
    ending, kind, full = DEEP[mode]
    (tmp_path / "depth").mkdir()
    path = tmp_path / "depth" / f"0.{ending}"
    Image.fromarray((np.tile([0, 0.25, 0.5, 1], (4, 1)) * full).astype(kind)).save(path)
    picture = read_image(path, None)
    assert np.abs(picture[0, :, 0] - np.array([0, 64, 128, 255])).max() <= 1
    if ending == "png":
        assert (read_video(tmp_path / "depth", 1, None).frames[0] == picture).all()


@pytest.mark.parametrize("value", [-1, 65536, np.nan])
def test_a_deep_picture_of_unknown_meaning_is_refused(tmp_path, value):
    kind = np.float32 if np.isnan(value) else np.int32
    Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="a.tif: .* with values"):
        read_image(tmp_path / "a.tif")


def test_long_media_are_refused_before_they_take_memory(tmp_path):
    with wavefile.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(b"\x80" * 8000 * 660)
    part = PromptPart("audio", path=str(tmp_path / "talk.wav"))
    with pytest.raises(MediaError, match="talk.wav: pieces of 66 s of sound, 60 s at most"):
        load_media(part, 96)
    waves, seconds = load_media(replace(part, start=600, end=640), 96)
    assert len(waves) == 10 and seconds == 40
    with pytest.raises(MediaError, match="1000000 frames of 224 pixels are over 2 GB"):
        read_video(tmp_path, 1_000_000, 224)


def test_a_prompt_longer_than_the_lm_is_refused(tiny_model):
    tiny_model.collate([[text_part("a " * 900)]], [[]])
    with pytest.raises(ModelError, match="of 2.* tokens, the LM takes 1024; .* the text"):
        tiny_model.collate([[text_part("a " * 2000)]], [[]])


# --- text files -----------------------------------------------------------------------------------

TABLE = 'Clip,Question,Answer\nä.mp4,"Who,\nand when?",The dog\nb.mp4,Where?,In a house\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_text_files_as_tools_write_them(tmp_path, encoding, line_end):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.replace("\n", line_end).encode(encoding))
        return path

    rows = read_own_rows(write("a.csv", TABLE))
    assert [Path(row["clip"]).name for row in rows] == ["ä.mp4", "b.mp4"]
    assert "Who,\nand when?" in rows[0]["messages"][0]["content"]
    assert rows[1]["where"].endswith("line 4")  # as an editor counts
    assert read_list(write("m.csv", TABLE))[0]["clip"] == "ä.mp4"
    assert read_list(write("m.json", '[{"a": "ä"}]\n')) == [{"a": "ä"}]
    assert load_prompts(str(write("p.json", '{"ks":\n "Was für?"}'))) == {"ks": "Was für?"}
    questions = read_question_file(write("q.txt", "Was?\u2028\n\nWer?\n"))[0]
    assert questions == ["Was?", "Wer?"]
    messages = conversation("Was?", "ein Hünd")["messages"]
    lines = "\n".join(json.dumps({"messages": messages}, ensure_ascii=False) for _ in range(2))
    assert [r["where"][-6:] for r in read_own_rows(write("a.jsonl", lines))] == ["line 1", "line 2"]
    SavedRun("x", "crab_plus", Settings()).save(tmp_path)
    write("config.json", (tmp_path / "config.json").read_text(encoding="utf-8"))
    assert load_saved_run(tmp_path).preset == "x"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("clip,label\na.mp4,dog\nb.mp4,Übung\n".encode("cp1252"), "line 3: byte 0xdc is not UTF-8"),
        ("clip,label\na.mp4,dog\n".encode("utf-16-le"), "null characters; save it .* in UTF-8"),
        (b'clip,label\na.mp4,dog\nb.mp4,"cat\n', "line 3: broken CSV"),
        (b"clip,label\na.mp4,dog, or cat\n", "line 2: broken CSV .3 cells, 2 columns"),
        (b"clip,label,label\na.mp4,dog,cat\n", "each name may stand there once"),
    ],
)
def test_a_text_file_that_cannot_be_read_says_where_and_why(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"a.csv.*{reason}"):
        read_own_rows(tmp_path / "a.csv")


# --- markup ---------------------------------------------------------------------------------------


def conversation(question: str, answer: str = "A dog.", **fields) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def test_a_tag_in_a_cell_of_a_table_is_text(tmp_path):
    table = (
        "clip,question,answer\na.mp4,What is <video> or \\<audio>?,It is <image> and so on here\n"
    )
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    [sample] = read_samples(tmp_path / "a.csv", [], "train")
    assert [part.kind for part in sample.media] == ["video", "audio"]
    assert sample.parts[-1].text == "\nWhat is <video> or \\<audio>?"
    assert sample.target == "It is <image> and so on here"


def test_a_tag_or_a_slot_in_a_question_on_the_command_line_is_text():
    form = QuestionForm(text="video: <video>\n{question}")
    question = "Is <image> a {question} for <video>?"
    row = form_row(form, question, {"video": ["/a.mp4"]})
    [(parts, _)] = conversation_parts(row)
    assert [part.kind for part in parts] == ["text", "video", "text"]
    assert parts[-1].text == f"\n{question}"


def test_a_tag_of_a_jsonl_can_be_escaped_and_else_needs_its_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(conversation("What is \\<video>?")), encoding="utf-8")
    [sample] = read_samples(path, [], "train")
    assert not sample.media and sample.parts[0].text == "What is <video>?"
    path.write_text(json.dumps(conversation("What is <video>?")), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"line 1: .*1 <video> .* 0 in videos; \\<video> is the word"
    ):
        read_own_rows(path)


def test_a_label_has_no_tag(tmp_path):
    (tmp_path / "a.csv").write_text("clip,label\na.mp4,a</answer>b\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: label 'a</answer>b'"):
        read_own_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("backbone", ["omni", "llava_onevision", "blip2"])
def test_no_text_becomes_a_special_token(backbone):
    from crab_min.backbones.load import load_model
    from crab_min.config import BackboneConfig

    model = load_model(BackboneConfig(backbone, weights="tiny-random"))
    special = {marks.placeholder for marks in model.media_tokens.values()}
    special |= {*model.tokenizer.all_special_ids, *model.stop_ids}
    for text in [*model.tokenizer.get_added_vocab(), "<video>", "</s>"]:
        assert not special & set(model.encode_text(f"a {text} b"))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reason",
    [
        (conversation("What?", video=["a.mp4"]), "unknown key 'video', did you mean 'videos'"),
        (conversation("What?", clip_file="a.mp4"), "unknown key 'clip_file'"),
        (conversation("What?", videos="a.mp4"), "'videos' is 'a.mp4'; expected list"),
        (conversation("What?", videos=[""]), "'videos' is .*; expected a list of paths"),
        (conversation("What?", options="a,b"), "'options' is 'a,b'; expected list"),
        (conversation("What?", " "), "an empty answer"),
        (conversation("What?", start=float("nan")), "start nan; expected seconds"),
        (conversation("What?", start=True), "'start' is True"),
        (conversation("What?", end=-1), "end -1; expected seconds"),
        (conversation("What?", split="dev"), "split 'dev'; expected train or test"),
        (conversation("What?", sides={"depth": 3}), "TypeError"),
        (conversation("What \ud800?"), "surrogates"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, row, reason):
    lines = [json.dumps(conversation("What?")), json.dumps(row)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{reason}"):
        read_own_rows(tmp_path / "a.jsonl")


def test_keys_and_columns_that_are_not_used_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(conversation("What?", id=3)), encoding="utf-8")
    (tmp_path / "a.csv").write_text("clip,label,lable\na.mp4,dog,x\n", encoding="utf-8")
    read_own_rows(tmp_path / "a.jsonl")
    read_own_rows(tmp_path / "a.csv")
    notes = capsys.readouterr().err
    assert "keys that are not used: id" in notes and "columns that are not used: lable" in notes


def test_a_path_as_windows_writes_it_is_found(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "a.csv").write_text("clip,label\nclips\\a.mp4,dog\n", encoding="utf-8")
    [row] = read_own_rows(tmp_path / "a.csv")
    assert row["videos"] == [str(tmp_path / "clips" / "a.mp4")]


def test_rows_without_media_are_trained_and_evaluated(tmp_path, capsys):
    rows = [conversation(f"What is {i}?", f"<answer>{i % 2}</answer>") for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = tmp_path / "run"
    flags = ["--data", str(path), "--steps", "2", "--batch-size", "2", "--out", str(run)]
    assert train.main([*flags, "--workers", "0"]) == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tasks"]["own"]["n"] == 2
    split = ["--eval", "--run", str(run), "--data", str(path), "--split", "train"]
    assert infer.main(split) == 0
    assert "own" in capsys.readouterr().out


# --- paths and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_one_folder_of_a_path_is_exchanged_for_masks(task):
    frame = Path("/data/frames/AVS/v1/x/frames/3.jpg")
    assert mask_path(frame, task, {}) == Path("/data/frames/AVS/v1/x/labels_rgb/3.png")
    with pytest.raises(DataError, match="no mask goes with it"):
        mask_path(Path("/data/AVS/3.jpg"), task, {})
    row = {"vid": "x", "fid": 2, "frame_idx": 3}
    shown = Path("/frames/REFAVS/media/x/frames/3.jpg")
    expected = Path("/frames/REFAVS/gt_mask/x/fid_2/00003.png")
    assert mask_path(shown, "ref_avs", row) == expected
    with pytest.raises(DataError, match="'fid'"):
        mask_path(shown, "ref_avs", {"vid": "x"})


def test_one_folder_of_a_path_is_exchanged_for_points(tmp_path):
    names = [f"voxelized_{name}_sam_nonzero_preprocess" for name in ("features", "voxels")]
    root = tmp_path / names[0] / "data"
    for name in names:
        (root / name).mkdir(parents=True)
    torch.save(torch.ones(4, 8), root / names[0] / "a.pt")
    np.save(root / names[1] / "a.npy", np.zeros((4, 3)))
    xyz, features = read_points(str(root / names[0] / "a.pt"))
    assert xyz.shape == (1, 4, 3) and features.shape == (1, 4, 8)


@pytest.mark.parametrize("kind", ["table", "windows", "jsonl", "llava"])
def test_a_path_too_long_for_the_system_is_a_missing_file(tmp_path, kind):
    name = "x" * 5000 + ".mp4"
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    texts = {
        "table": ("x.csv", f"clip,label\n{name},dog\n"),
        "windows": ("x.csv", f"clip,label\nclips\\{name},dog\n"),
        "jsonl": ("x.jsonl", json.dumps({"messages": messages, "videos": [name]})),
        "llava": ("x.jsonl", json.dumps({"id": 1, "video": name, "conversations": turns})),
    }
    file, text = texts[kind]
    (tmp_path / file).write_text(text)
    [sample] = read_samples(tmp_path / file, [], "train")
    assert sample.media[0].path.endswith(name)
    with pytest.raises(MediaError, match="no such file"):
        load_media(sample.media[0], 32)


def test_masks_that_are_gone_are_named_in_training(small_world, tmp_path):
    samples = read_samples(small_world, ["s4"], "train")
    moved = []
    for sample in samples:
        image = PromptPart("image", path=str(tmp_path / "frames" / "0.jpg"))
        moved.append(replace(sample, parts=[image, *sample.parts]))
    with pytest.raises(DataError, match=f"{len(samples)} masks are missing, .*labels_rgb/0.png"):
        add_mask_tokens(moved)


def test_pictures_of_clips_of_one_name_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "x.png")
        row = form_row(QuestionForm(), "What?", {"image": [str(tmp_path / folder / "x.png")]})
        from crab_min.data import own_samples

        [sample] = own_samples([row], "test")
        files.append(default_picture(sample))
        draw_answer(files[-1], sample, sample.task.parse("A dog."), "A dog.")
    assert len(set(files)) == 3 and all(file.is_file() for file in files)


# --- answers as models write them -----------------------------------------------------------------

OPTIONS = ["guitar", "drums", "a violin"]


@pytest.mark.parametrize(
    "text, score",
    [
        ("(B) drums", 1),
        ("B. drums", 1),
        ("b) Drums.", 1),
        ("B: drums", 1),
        ("**B**", 1),
        ("(C) a violin", 1),
        ("A violin", 1),
        ("(A) drums", 0),
        ("B. guitar", 0),
        ("D. drums", 0),
    ],
)
def test_a_choice_with_its_letter(text, score):
    from crab_min.evaluation.metrics import accuracy

    task = TASKS["avqa_thu"]
    gold = 2 if "violin" in text else 1
    answer = task.gold_answer({"answer": gold, "multi_choice": OPTIONS})
    assert accuracy(task.parse(f"So <answer>{text}</answer>"), answer)["metric"] == score


@pytest.mark.parametrize(
    "times", ["(0 3)", "(0.2, 3.4)", "(0:00-0:03)", "(0s to 3s)", "(00:00, 00:03)", "(0 – 3 sec)"]
)
def test_times(times):
    answer = TASKS["ave"].parse(f"<event>dog bark, {times}</event>")
    assert answer.events == [("dog bark", [(0, 3)])]


@pytest.mark.parametrize(
    "box", ["[56, 28, 112, 84]", "[56.2,28.0,111.9,84.4]", "[[0.25, 0.125, 0.5, 0.375]]"]
)
def test_boxes(box):
    assert TASKS["arig"].parse(f"It is {box}.").boxes == [(56, 28, 112, 84)]


# --- machines and things --------------------------------------------------------------------------

UNGUARDED = """
import sys
print("started")
from crab_min.config import WorldConfig
from crab_min.data import decode_ahead
from crab_min.interface import PromptPart
from crab_min.media.workers import start_method
from crab_min.world.folders import build_world
from PIL import Image
sys.platform = "darwin"
assert start_method() is None
build_world(WorldConfig(world_clips=8, world_test=1), 0, "world", still=True)
Image.new("RGB", (8, 8)).save("a.png")
[[medium]] = decode_ahead([[PromptPart("image", path="a.png")]], 8, workers=2)
assert not medium.error
"""
GUARDED = """
import multiprocessing
import sys
from crab_min.data import decode_ahead
from crab_min.interface import PromptPart
from crab_min.media.workers import start_method
print("started", __name__)
if __name__ == "__main__":
    sys.platform = "darwin"
    assert start_method() == "spawn"
    [[medium]] = decode_ahead([[PromptPart("image", path="no.png")]], 8, workers=1)
    assert "no.png: no such file" in medium.error
"""
WITHOUT_UNIX = """
import sys
import psutil  # it needs resource on Linux
sys.modules["fcntl"] = sys.modules["resource"] = None
from crab_min.recipes import crab_plus
from crab_min.runs.folder import lock_run
from crab_min.runs.log import memory
from pathlib import Path
lock_run(Path("run")).close()
assert memory() == 0
print("started")
"""


@pytest.mark.parametrize("script", [UNGUARDED, GUARDED, WITHOUT_UNIX])
def test_scripts_where_processes_are_spawned(tmp_path, script):
    (tmp_path / "page.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "page.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("started")]
    assert len(lines) == (2 if script is GUARDED else 1)


def test_every_text_file_is_opened_in_utf_8():
    found = []
    for file in [*(ROOT / "crab_min").rglob("*.py"), *ROOT.glob("*.py"), *ROOT.glob("tutorials/*")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_open = isinstance(node.func, ast.Name) and name == "open"
            modes = [a.value for a in node.args[1:] if isinstance(a, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            encoded = any(keyword.arg == "encoding" for keyword in node.keywords)
            own_reader = isinstance(node.func, ast.Name) and name == "read_text"
            opens = name in ("read_text", "write_text") or is_open
            if opens and not binary and not encoded and not own_reader:
                found.append(f"{file}:{node.lineno}")
    assert not found


def write_thing(folder: Path, name: str, picture: Image.Image, wave: np.ndarray) -> None:
    picture.save(folder / f"{name}.png")
    write_audio(folder / f"{name}.wav", wave)


def test_things_that_cannot_be_used_are_all_named_before_the_world_is_built(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.2, 32000).astype(np.float32)
    square = Image.new("RGBA", (80, 60), (200, 30, 30, 255))
    for name in ("a dog", "bell_2", "Cat", "horn"):
        write_thing(tmp_path, name, square, noise)
    (tmp_path / "Cat.png").rename(tmp_path / "Cat.PNG")
    write_thing(tmp_path, "pole", Image.new("RGBA", (20, 400), (9, 9, 9, 255)), noise[:4000])
    labels = {thing.label for thing in load_things(str(tmp_path))}
    assert labels == {"a dog", "bell 2", "Cat", "horn", "pole"}

    write_thing(tmp_path, "faint", Image.new("RGBA", (40, 40), (9, 9, 9, 60)), noise)
    hidden = Image.new("RGBA", (400, 400), (0, 0, 0, 1))
    hidden.paste((9, 9, 9, 255), (0, 0, 3, 3))
    write_thing(tmp_path, "speck", hidden, noise)
    write_thing(tmp_path, "silent", square, 0 * noise)
    write_thing(tmp_path, "click", square, noise[:400])
    write_thing(tmp_path, "bell 2", square, noise)
    square.save(tmp_path / "mute.png")
    with pytest.raises(DataError) as error:
        load_things(str(tmp_path))
    for name in ("faint.png", "speck.png", "silent.wav", "click.wav", "mute.png: no sound"):
        assert name in str(error.value)
    assert "another thing is called 'bell 2'" in str(error.value)
