"""Rows, features and the order of samples; real clips where they are (CRAB_MEDIA)."""

import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import infer
import train
from crab_min import data
from crab_min.data import Sample, load_media, pick_tasks, read_samples
from crab_min.errors import DataError
from crab_min.features import Features, Mixer
from crab_min.side_channels import limit_frames
from crab_min.tasks import TASKS
from crab_min.tools import check


def ids_of(batches) -> list[list[str]]:
    return [[sample.id for sample in batch] for batch in batches]


def assert_features_close(ours: list[list], theirs: list[list]) -> None:
    """Compare the features of the media of several samples."""
    pairs = zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine.features, other.features, atol=2e-3, rtol=2e-3)


# --- rows -----------------------------------------------------------------------------------------


def test_all_real_rows_are_read_and_their_media_load(real_media):
    for split in ("train", "test"):
        samples = read_samples(real_media, list(TASKS), split)
        expected = {name for name, task in TASKS.items() if task.v2 and split in task.splits}
        assert {sample.task.name for sample in samples} == expected
        for part in itertools.chain(*(sample.media for sample in samples)):
            arrays, _ = load_media(part, 96)
            if part.kind == "audio":
                assert all(wave.ndim == 1 and len(wave) > 1000 for wave in arrays)
            else:
                assert arrays.shape[1:] == (96, 96, 3)


@pytest.mark.parametrize("task", ["ave", "avqa", "s4", "avvp"])
def test_label_target_is_the_tags_alone(small_world, task):
    long = read_samples(small_world, [task], "train", "reasoning")[0]
    short = read_samples(small_world, [task], "train", "label")[0]
    assert short.target in long.target or len(short.target) < len(long.target)
    assert short.gold == long.gold


def test_a_training_row_without_a_text_teaches_its_label(small_world, tmp_path):
    rows = json.loads((small_world / "ks" / "train.json").read_text())
    for row in rows:
        del row["label"]
    (tmp_path / "ks").mkdir()
    (tmp_path / "ks" / "train.json").write_text(json.dumps(rows))
    bare = read_samples(tmp_path, ["ks"], "train", "label")
    whole = read_samples(small_world, ["ks"], "train", "label")
    assert [sample.target for sample in bare] == [sample.target for sample in whole]
    assert all(sample.target for sample in bare)


def test_fewer_frames_are_those_of_videos(small_world):
    samples = limit_frames(read_samples(small_world, ["ave", "s4"], "train", limit=1), 3)
    parts = [part for sample in samples for part in sample.media]
    assert {part.frames for part in parts if part.kind == "video"} == {3}
    assert {"video", "audio", "image"} == {part.kind for part in parts}
    assert limit_frames(samples, 0) is samples


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "broken JSON"),
        ("{}", "expected a list"),
        ('[{"video_path": "x.mp4"}]', "audio_path"),
        ('[{"video_path": "x.mp4", "audio_path": "x.mp3"}]', "event"),
    ],
)
def test_a_bad_annotation_file_names_the_file_and_the_field(tmp_path, content, message):
    (tmp_path / "ave").mkdir()
    (tmp_path / "ave" / "train.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_samples(tmp_path, ["ave"], "train")
    assert "ave/train.json" in str(error.value)


def test_missing_folder_and_unknown_task(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_samples(tmp_path / "nothing", ["ave"], "train")
    with pytest.raises(DataError, match="no train.json"):
        read_samples(tmp_path, ["ave"], "train")
    with pytest.raises(DataError, match="unknown task 'avee'"):
        pick_tasks("ave,avee")


# --- which samples make a batch -------------------------------------------------------------------


def mixed(samples: list[Sample], batch_size: int, seed: int, stop: int, **options):
    """Return the first `stop` batches."""
    return list(itertools.islice(Mixer(samples, batch_size, seed, **options), stop))


def test_order_depends_on_seed_and_step_alone(small_world):
    samples = read_samples(small_world, ["ave", "avqa", "ks"], "train")
    names = ids_of(mixed(samples, 8, seed=3, stop=30))
    resumed = ids_of(itertools.islice(Mixer(samples, 8, seed=3), 20, 30))
    assert names[20:] == resumed
    assert names[:10] != ids_of(mixed(samples, 8, seed=4, stop=10))


def test_every_row_of_a_task_comes_once_before_any_comes_twice(small_world):
    samples = read_samples(small_world, ["ave"], "train")
    drawn = list(itertools.chain(*ids_of(mixed(samples, 1, seed=0, stop=2 * len(samples)))))
    assert set(Counter(drawn).values()) == {2}
    assert len(set(drawn[: len(samples)])) == len(samples)


def test_batches_of_about_one_length(small_world):
    samples = read_samples(small_world, ["ave", "s4"], "train")
    lengths = {sample.id: len(sample.target) for sample in samples}

    def spread(batches: list[list[str]]) -> int:
        """Sum the difference of the longest and the shortest sample of each batch."""
        return sum(
            max(lengths[name] for name in batch) - min(lengths[name] for name in batch)
            for batch in batches
        )

    plain = ids_of(mixed(samples, 4, 0, stop=32))
    grouped = ids_of(mixed(samples, 4, 0, stop=32, lengths=lengths))
    assert spread(grouped) < 0.5 * spread(plain)
    assert {len(batch) for batch in grouped} == {4}
    assert sorted(itertools.chain(*grouped)) == sorted(itertools.chain(*plain))
    resumed = itertools.islice(Mixer(samples, 4, 0, lengths=lengths), 20, 24)
    assert ids_of(resumed) == grouped[20:24]


def test_lines_of_a_jsonl_are_counted_as_an_editor_does_and_media_keep_their_order(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {
        "messages": [
            {"role": "user", "content": "Why?\u2028Tell me."},
            {"role": "assistant", "content": "<answer>so</answer>"},
        ],
        "videos": ["a.mp4"],
        "audios": ["a.wav"],
    }
    line = json.dumps(row, ensure_ascii=False)  # with a separator that is no end of line
    path.write_text(f"{line}\n\n{{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match="x.jsonl, line 3: "):
        read_samples(path, [], "train")
    path.write_text(line, encoding="utf-8")
    [sample] = read_samples(path, [], "train")
    assert [part.kind for part in sample.media] == ["video", "audio"]


def test_a_test_row_may_name_its_image_as_training_rows_do(small_world, tmp_path):
    shutil.copytree(small_world, tmp_path / "data", symlinks=True)
    file = tmp_path / "data" / "s4" / "test.json"
    rows = json.loads(file.read_text())
    before = read_samples(small_world, ["s4"], "test")
    for row in rows:
        row["image_path"] = row.pop("visual_path")
    file.write_text(json.dumps(rows))
    after = read_samples(tmp_path / "data", ["s4"], "test")
    assert [sample.gold for sample in after] == [sample.gold for sample in before]


# --- features -------------------------------------------------------------------------------------


def test_features_are_computed_once_and_are_the_same_alone(small_world, tiny_model, monkeypatch):
    samples = read_samples(small_world, ["ave", "a2v", "s4", "meld"], "train", limit=3)
    kept = Features(tiny_model)
    kept.prepare(samples)
    monkeypatch.setattr(data, "load_media", None)  # nothing may be decoded again
    together = kept(samples)
    monkeypatch.undo()
    single = Features(tiny_model, keep=False)
    alone = [single([sample])[0] for sample in samples]
    assert_features_close(together, alone)
    assert not single.cache


def test_unreadable_training_files_are_listed_skipped_and_stop_above_the_share(
    small_world, tiny_model, tmp_path
):
    shutil.copytree(small_world / "ave", tmp_path / "ave")
    rows = json.loads((tmp_path / "ave" / "train.json").read_text())
    for row in rows[:2]:
        (tmp_path / "ave" / "video" / row["video_path"]).write_text("this is no video")
    samples = read_samples(tmp_path, ["ave"], "train", limit=6)
    with pytest.raises(DataError, match=rows[0]["video_path"]):
        Features(tiny_model).prepare(samples)
    lenient = Features(tiny_model, max_bad=0.5)
    assert lenient.prepare(samples, strict=False) == samples[2:]
    assert len(lenient.unreadable) == 2
    with pytest.raises(DataError, match="--max-bad"):
        Features(tiny_model, max_bad=0.01).prepare(samples, strict=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_decoded_ahead_are_those_that_are_kept(small_world, tiny_model, workers):
    """In the same order with any number of workers, and nothing stays in memory."""
    samples = read_samples(small_world, ["ave", "a2v", "s4"], "train")
    plan = mixed(samples, 4, seed=0, stop=4)
    kept = Features(tiny_model)
    ahead = Features(tiny_model, keep=False, workers=workers)
    for features in (kept, ahead):
        features.prepare(list(itertools.chain(*plan)))
    batches = zip(ahead.batches(plan), kept.batches(plan), strict=True)
    for number, ((ours, media), (theirs, kept_media)) in enumerate(batches):
        assert ids_of([ours, theirs]) == ids_of([plan[number]]) * 2
        assert_features_close(media, kept_media)
    assert not ahead.cache


def test_an_unreadable_file_is_left_out_of_a_batch_and_counted(small_world, tiny_model):
    first, second, third = read_samples(small_world, ["ks"], "train", limit=3)
    parts = [part if part.kind == "text" else replace(part, path=__file__) for part in first.parts]
    lost = replace(first, parts=parts)
    ahead = Features(tiny_model, keep=False, max_bad=0.5, workers=0)
    ahead.prepare([second, third])
    batches = [samples for samples, _ in ahead.batches([[lost, second], [third]], strict=False)]
    assert ids_of(batches) == [[second.id], [third.id]]
    assert {part.path for part in ahead.unreadable} == {__file__}
    with pytest.raises(DataError, match="test_data.py"):
        list(Features(tiny_model, keep=False, workers=0).batches([[lost]]))


# --- a file of one's own --------------------------------------------------------------------------


def write_own_file(path: Path, world: Path, count: int, tag: bool) -> list[dict]:
    """Write a .jsonl of rows of the world's ks, with tags around the answers or without."""
    lines = []
    for row in json.loads((world / "ks" / "train.json").read_text())[:count]:
        answer = f"<answer>{row['action']}</answer>" if tag else f"It is {row['action']}."
        video = world / "ks" / "video" / row["video_path"]
        audio = (world / "ks" / "audio" / row["audio_path"]).resolve()
        question = "<video>\nListen: <audio>\nWhat is it?"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        videos = [os.path.relpath(video, path.parent)]
        lines.append({"messages": messages, "videos": videos, "audios": [str(audio)]})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return lines


@pytest.mark.parametrize("tag, metric", [(True, "accuracy"), (False, "rouge_l")])
def test_a_file_of_ones_own_trains_and_is_scored_like_a_task(
    small_world, tmp_path, capsys, tag, metric
):
    write_own_file(tmp_path / "train.jsonl", small_world, 4, tag)
    write_own_file(tmp_path / "test.jsonl", small_world, 2, tag)
    sample = read_samples(tmp_path / "train.jsonl", [], "train")[0]
    assert [part.kind for part in sample.parts] == ["video", "text", "audio", "text"]
    assert sample.task.metric == metric

    run = tmp_path / "run"
    command = ["--data", str(tmp_path / "train.jsonl"), "--steps", "2", "--batch-size", "2"]
    assert train.main([*command, "--out", str(run)]) == 0
    own = json.loads((run / "metrics.json").read_text())["tasks"]["own"]
    assert own["name"] == metric and own["n"] == 2 and own["all"]
    capsys.readouterr()
    split = ["--eval", "--data", str(tmp_path / "test.jsonl"), "--run", str(run)]
    assert infer.main(split) == 0
    assert f"own       {metric}" in capsys.readouterr().out


def test_a_line_of_ones_own_that_does_not_fit_is_named(small_world, tmp_path):
    path = tmp_path / "x.jsonl"
    first, second = write_own_file(path, small_world, 2, True)
    for broken, reason in (
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps(second | {"messages": second["messages"][:1]}), "must be the assistant's"),
        (json.dumps(second | {"audios": []}), "1 <audio> in the text, 0 in audios"),
    ):
        path.write_text(json.dumps(first) + "\n" + broken)
        with pytest.raises(DataError, match=f"x.jsonl, line 2: not .*{reason}"):
            read_samples(path, [], "train")
    path.write_text("\n")
    with pytest.raises(DataError, match="no lines"):
        read_samples(path, [], "train")


def test_media_without_a_tag_come_first(tmp_path):
    messages = [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "yes"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": messages, "images": ["a.png"]}))
    sample = read_samples(path, [], "train")[0]
    assert [part.kind for part in sample.parts] == ["image", "text"]
    assert sample.media[0].path == str(tmp_path / "a.png") and sample.target == "yes"


# --- the check of a copy --------------------------------------------------------------------------


def test_check_says_what_is_there_and_what_is_wrong(small_world, tmp_path, capsys):
    root = tmp_path / "AVUIE_2"
    for task in ("ave", "ks"):
        shutil.copytree(small_world / task, root / task)
    rows = json.loads((root / "ave" / "train.json").read_text())
    lost, broken = (root / "ave" / "video" / row["video_path"] for row in rows[:2])
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:3000])
    del rows[2]["event"]
    (root / "ave" / "train.json").write_text(json.dumps(rows))

    out = tmp_path / "check.json"
    files = ["--out", str(out), "--figure", str(tmp_path / "check.png")]
    assert check.main(["--data", str(root), *files, "--workers", "0"]) == 0
    report = json.loads(out.read_text())
    ave = report["tasks"]["ave/train"]
    assert ave["rows"] == len(rows) and ave["bad_rows"] == 1
    assert ave["missing"] == 1 and ave["unreadable"] == 1 and ave["unparsed_targets"] == 0
    assert ave["seconds"] == [pytest.approx(10, abs=0.2)] * 3
    assert set(ave["labels"]) == {row["event"] for row in rows if "event" in row}
    assert "ks/test" in report["tasks"]
    assert {bad["path"] for bad in report["bad"]} == {str(lost), str(broken)}
    assert all(bad["reason"] and bad["rows"] for bad in report["bad"])
    assert "ave/train/2" in report["rows"][0] and "'event'" in report["rows"][0]
    summary = f"{report['files']} files, 2 of them missing or unreadable; 1 rows"
    assert summary in capsys.readouterr().out

    assert check.main(["--data", str(tmp_path), *files]) == 2
    assert "no annotation file" in capsys.readouterr().err


def test_check_of_headers_alone_still_misses_no_missing_file(small_world, tmp_path):
    root = tmp_path / "AVUIE_2"
    shutil.copytree(small_world / "ave", root / "ave")
    row = json.loads((root / "ave" / "test.json").read_text())[0]
    sound = root / "ave" / "audio" / row["audio_path"]
    sound.unlink()
    report = check.check(root, ["ave"], decode=False, workers=0)
    assert [file.path for file in report.bad_files] == [str(sound)]
