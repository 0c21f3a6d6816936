"""The reader, the features and the order of samples; real clips where they are (CRAB_MEDIA)."""
import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

import infer
import train
from crab_min import data
from crab_min.data import DataError, limit_frames, load_media, pick_tasks, read_samples
from crab_min.features import Features, Mixer
from crab_min.tasks import TASKS
from crab_min.tools import check


def test_all_real_rows_are_read_and_their_media_load(real_media):
    for split in ("train", "test"):
        samples = read_samples(real_media, list(TASKS), split)
        assert {s.task.name for s in samples} == {t for t in TASKS if TASKS[t].v2 and split in TASKS[t].splits}
        for sample in samples:
            for part in sample.media:
                arrays, _ = load_media(part, 96)
                if part.kind == "audio":
                    assert all(w.ndim == 1 and len(w) > 1000 for w in arrays)
                else:
                    assert arrays.shape[1:] == (96, 96, 3)


def test_label_target_is_the_tags_alone(small_world):
    for task in ("ave", "avqa", "s4", "avvp"):
        long, short = (read_samples(small_world, [task], "train", target)[0] for target in ("reasoning", "label"))
        assert short.target in long.target or len(short.target) < len(long.target)
        assert short.gold == long.gold


def test_a_training_row_without_a_text_teaches_its_label(small_world, tmp_path):
    rows = json.loads((small_world / "ks" / "train.json").read_text())
    (tmp_path / "ks").mkdir()
    (tmp_path / "ks" / "train.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "label"} for row in rows]))
    bare, whole = (read_samples(root, ["ks"], "train", "label") for root in (tmp_path, small_world))
    assert [s.target for s in bare] == [s.target for s in whole] and all(s.target for s in bare)


def test_fewer_frames_are_those_of_videos(real_media):
    samples = limit_frames(read_samples(real_media, ["ave", "s4"], "train", limit=1), 3)
    assert {(p.kind, p.frames) for s in samples for p in s.media if p.kind == "video"} == {("video", 3)}
    assert limit_frames(samples, 0) is samples


@pytest.mark.parametrize("content, message", [("{", "broken JSON"), ("{}", "expected a list"), ('[{"video_path": "x.mp4"}]', "audio_path"),
                                              ('[{"video_path": "x.mp4", "audio_path": "x.mp3"}]', "event")])
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


def test_order_depends_on_seed_and_step_alone(small_world):
    samples = read_samples(small_world, ["ave", "avqa", "ks"], "train")
    names = [[s.id for s in batch] for batch in itertools.islice(Mixer(samples, 8, seed=3), 30)]
    again = [[s.id for s in batch] for batch in itertools.islice(Mixer(samples, 8, seed=3), 20, 30)]
    assert names[20:] == again
    assert names[:10] != [[s.id for s in batch] for batch in itertools.islice(Mixer(samples, 8, seed=4), 10)]


def test_every_row_of_a_task_comes_once_before_any_comes_twice(small_world):
    samples = read_samples(small_world, ["ave"], "train")
    drawn = [s.id for batch in itertools.islice(Mixer(samples, 1, seed=0), 2 * len(samples)) for s in batch]
    assert set(Counter(drawn).values()) == {2} and len(set(drawn[:len(samples)])) == len(samples)


def test_features_are_computed_once_and_are_the_same_alone(small_world, tiny_model, monkeypatch):
    samples = read_samples(small_world, ["ave", "a2v", "s4", "meld"], "train", limit=3)
    kept, alone = Features(tiny_model), Features(tiny_model, keep=False)
    kept.prepare(samples)
    monkeypatch.setattr("crab_min.data.load_media", None)                     # nothing may be decoded again
    media = kept(samples)
    monkeypatch.undo()
    for sample, features in zip(samples, media):
        for mine, other in zip(features, alone([sample])[0]):
            torch.testing.assert_close(mine.features, other.features, atol=2e-3, rtol=2e-3)
    assert not alone.store


def test_unreadable_training_files_are_listed_skipped_and_stop_above_the_share(small_world, tiny_model, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(small_world, root)
    rows = json.loads((root / "ave" / "train.json").read_text())
    for row in rows[:2]:
        (root / "ave" / "video" / row["video_path"]).write_text("this is no video")
    samples = read_samples(root, ["ave"], "train")
    with pytest.raises(DataError, match=rows[0]["video_path"]):
        Features(tiny_model).prepare(samples)
    lenient = Features(tiny_model, max_bad=.5)
    lenient.prepare(samples, strict=False)
    assert len(lenient.bad) == 2
    with pytest.raises(DataError, match="--max-bad"):
        Features(tiny_model, max_bad=.01).prepare(samples, strict=False)


def test_features_on_disk_are_those_of_the_clip_and_the_encoder(small_world, tiny_model, tmp_path, monkeypatch):
    """A second run decodes nothing, in memory or by batch; a clip that changes under its name is decoded again; half a file is made anew."""
    samples = read_samples(small_world, ["ave", "s4"], "test")[:4]
    first = Features(tiny_model, folder=str(tmp_path / "cache"))
    first.prepare(samples)
    monkeypatch.setattr(data, "load_media", lambda *_: pytest.fail("decoded again"))
    for again in (Features(tiny_model, folder=str(tmp_path / "cache")), Features(tiny_model, keep=False, folder=str(tmp_path / "cache"), workers=0)):
        for _, media in again.batches([samples]):
            for mine, kept in zip(itertools.chain(*media), itertools.chain(*first(samples)), strict=True):
                assert torch.equal(mine.features, kept.features) and mine.kind == kept.kind and mine.seconds == kept.seconds
    monkeypatch.undo()
    part, other = (s.media[0] for s in samples[:2])
    clip = tmp_path / "clip.mp4"
    shutil.copy(part.path, clip)
    mine = replace(part, path=str(clip))
    assert first.disk.file(mine) == first.disk.file(part)
    shutil.copy(other.path, clip)
    assert first.disk.file(mine) == first.disk.file(other) != first.disk.file(part)
    file = first.disk.file(part)
    file.write_bytes(file.read_bytes()[:1000])
    assert first.disk.read(part) is None and first.fetch([part, other]) == [part]


def test_batches_of_about_one_length(small_world):
    samples = read_samples(small_world, ["ave", "s4"], "train")
    lengths = {s.id: len(s.target) for s in samples}

    def spread(batches):
        return sum(max(lengths[s.id] for s in b) - min(lengths[s.id] for s in b) for b in batches)
    mixed, grouped = (list(itertools.islice(Mixer(samples, 4, 0, lengths=kind), 32)) for kind in (None, lengths))
    assert spread(grouped) < .5 * spread(mixed) and {len(b) for b in grouped} == {4}
    assert sorted(s.id for b in mixed for s in b) == sorted(s.id for b in grouped for s in b)
    assert [[s.id for s in b] for b in itertools.islice(Mixer(samples, 4, 0, lengths=lengths), 20, 24)] == [[s.id for s in b] for b in grouped[20:24]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_decoded_ahead_are_those_that_are_kept(small_world, tiny_model, workers):
    """The same batches in the same order with any number of workers; nothing is kept; an unreadable file is left out and counted."""
    plan = list(itertools.islice(Mixer(read_samples(small_world, ["ave", "a2v", "s4"], "train"), 4, seed=0), 5))
    kept, ahead = Features(tiny_model), Features(tiny_model, keep=False, max_bad=.5, workers=workers)
    kept.prepare([s for batch in plan for s in batch])
    ahead.prepare([s for batch in plan for s in batch])
    for (samples, media), (others, kept_media) in zip(ahead.batches(plan), kept.batches(plan), strict=True):
        assert [s.id for s in samples] == [s.id for s in others]
        for mine, other in zip([m for sample in media for m in sample], [m for sample in kept_media for m in sample], strict=True):
            torch.testing.assert_close(mine.features, other.features, atol=2e-3, rtol=2e-3)
    assert not ahead.store
    lost = replace(plan[1][0], parts=[replace(p, path=__file__) if p.kind != "text" else p for p in plan[1][0].parts])
    found = list(ahead.batches([[lost, plan[1][1]], [plan[0][0]]], strict=False))
    assert [[s.id for s in samples] for samples, _ in found] == [[plan[1][1].id], [plan[0][0].id]] and __file__ in next(iter(ahead.bad)).path
    with pytest.raises(DataError, match="test_data.py"):
        list(Features(tiny_model, keep=False, workers=workers).batches([[lost]]))


def own_file(path, world, count: int, tag: bool) -> list[dict]:
    rows = json.loads((world / "ks" / "train.json").read_text())[:count]
    lines = [{"messages": [{"role": "user", "content": "<video>\nListen: <audio>\nWhat is it?"},
                           {"role": "assistant", "content": f"<answer>{row['action']}</answer>" if tag else f"It is {row['action']}."}],
              "videos": [os.path.relpath(world / "ks" / "video" / row["video_path"], path.parent)],
              "audios": [str((world / "ks" / "audio" / row["audio_path"]).resolve())]} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return lines


@pytest.mark.parametrize("tag, metric", [(True, "accuracy"), (False, "rouge_l")])
def test_a_file_of_ones_own_trains_and_is_scored_like_a_task(small_world, tmp_path, capsys, tag, metric):
    own_file(tmp_path / "train.jsonl", small_world, 6, tag)
    own_file(tmp_path / "test.jsonl", small_world, 3, tag)
    sample = read_samples(tmp_path / "train.jsonl", [], "train")[0]
    assert [p.kind for p in sample.parts] == ["video", "text", "audio", "text"] and sample.task.metric == metric
    run = tmp_path / "run"
    assert train.main(["--data", str(tmp_path / "train.jsonl"), "--steps", "2", "--batch-size", "2", "--out", str(run)]) == 0
    own = json.loads((run / "metrics.json").read_text())["tasks"]["own"]
    assert own["name"] == metric and own["n"] == 3 and own["all"]
    capsys.readouterr()
    assert infer.main(["--eval", "--data", str(tmp_path / "test.jsonl"), "--run", str(run)]) == 0
    assert f"own       {metric}" in capsys.readouterr().out


def test_a_line_of_ones_own_that_does_not_fit_is_named(small_world, tmp_path):
    path = tmp_path / "x.jsonl"
    first, second = own_file(path, small_world, 2, True)
    for broken, reason in (("{", "JSONDecodeError"), (json.dumps(second | {"messages": second["messages"][:1]}), "must be the assistant's"),
                           (json.dumps(second | {"audios": []}), "1 <audio> in the text, 0 in audios"), ("[]", "TypeError")):
        path.write_text(json.dumps(first) + "\n" + broken)
        with pytest.raises(DataError, match=f"x.jsonl, line 2: not .*{reason}"):
            read_samples(path, [], "train")
    path.write_text("\n")
    with pytest.raises(DataError, match="no lines"):
        read_samples(path, [], "train")
    words = {"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes"}]}
    path.write_text(json.dumps(words | {"images": ["a.png"]}))
    assert [p.kind for p in read_samples(path, [], "train")[0].parts] == ["image", "text"]


def test_check_says_what_is_there_and_what_is_wrong(small_world, tmp_path, capsys):
    root = tmp_path / "AVUIE_2"
    shutil.copytree(small_world / "ave", root / "ave")
    shutil.copytree(small_world / "ks", root / "ks")
    rows = json.loads((root / "ave" / "train.json").read_text())
    lost, broken = (root / "ave" / "video" / rows[i]["video_path"] for i in (0, 1))
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:3000])
    del rows[2]["event"]
    (root / "ave" / "train.json").write_text(json.dumps(rows))
    out = tmp_path / "check.json"
    assert check.main(["--data", str(root), "--out", str(out), "--workers", "0"]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    train = found["tasks"]["ave/train"]
    assert (train["rows"], train["bad_rows"], train["missing"], train["unreadable"]) == (len(rows), 1, 1, 1)
    assert train["seconds"] == [pytest.approx(10, abs=.2)] * 3 and train["unparsed_targets"] == 0
    assert set(train["labels"]) == {row["event"] for row in rows if "event" in row} and "ks/test" in found["tasks"]
    assert {b["path"] for b in found["bad"]} == {str(lost), str(broken)} and all(b["reason"] and b["rows"] for b in found["bad"])
    assert "ave/train/2" in found["rows"][0] and "'event'" in found["rows"][0]
    assert f"{found['files']} files, 2 of them missing or unreadable; 1 rows" in said
    assert check.main(["--data", str(tmp_path), "--out", str(out)]) == 2
    assert "no annotation file" in capsys.readouterr().err


def test_check_of_headers_alone_still_misses_no_missing_file(small_world, tmp_path):
    root = tmp_path / "AVUIE_2"
    shutil.copytree(small_world / "ave", root / "ave")
    row = json.loads((root / "ave" / "test.json").read_text())[0]
    (root / "ave" / "audio" / row["audio_path"]).unlink()
    found = check.check(root, ["ave"], decode=False, workers=0)
    assert [b.path for b in found.bad_files] == [str(root / "ave" / "audio" / row["audio_path"])]
