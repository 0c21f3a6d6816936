"""PAVE: the patch by itself, in the models, as a file, and the shows that its side channels tell apart."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from released import write_released
from safetensors.torch import load_file

import infer
import train
from crab_min.backbones.composed import load_base
from crab_min.backbones.load import BackboneConfig, load_model
from crab_min.data import DataError, add_side_channels, read_samples, side_part
from crab_min.errors import MediaError, ModelError
from crab_min.evaluation.answering import options, rank_options
from crab_min.features import Features
from crab_min.media.arrays import read_array
from crab_min.media.read import read_video
from crab_min.model import AdapterConfig
from crab_min.pave import Patch, PatchConfig, interpolate_time, partition_steps
from crab_min.tools.convert import main as convert_main
from crab_min.tools.released.weights import read_checkpoint
from crab_min.world.scenes import Renderer
from crab_min.world.side_channels import CHANNELS, STRETCHES, build_side_world, make_show

SMALL = PatchConfig(12, 10, 16, hidden=32, layers=1)


def grown(patch: Patch) -> Patch:
    """As if trained: a gain that is not zero."""
    torch.nn.init.normal_(patch.norm.weight)
    return patch


# --- the patch by itself ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("out, layers, count", [(896, 2, 6_235_776), (3584, 2, 8_996_352), (3584, 3, 10_833_920)])
def test_parameters_at_the_papers_sizes(out, layers, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Patch(PatchConfig(1152, 1024, out, layers=layers)).parameters()) == count
        shared = Patch(PatchConfig(1152, 1024, out, layers=layers, shared_kv=True))
        assert sum(p.numel() for p in shared.parameters()) == count - layers * (512 * 512 + 512)           # no value projection is allocated


def test_a_frame_reads_the_side_tokens_of_its_own_stretch_alone():
    """59 steps for 32 frames: the first 27 frames have two, the others one."""
    patch, side = grown(Patch(SMALL)), torch.randn(1, 59, 1, 10, requires_grad=True)
    out, starts = patch(torch.randn(1, 32, 4, 12), side), [0, 2, 52, 54, 58]
    for frame, steps in ((0, [0, 1]), (1, [2, 3]), (26, [52, 53]), (27, [54]), (31, [58])):
        grad, = torch.autograd.grad(out[0, frame].sum(), side, retain_graph=True)
        assert grad[0, :, 0].abs().sum(-1).nonzero().flatten().tolist() == steps
    assert [partition_steps(59, 32)[i][0].item() for i in (0, 1, 26, 27, 31)] == starts


def test_a_batch_gives_what_one_by_one_gives_whatever_the_lengths():
    patch, video = grown(Patch(SMALL)), torch.randn(3, 8, 4, 12)
    sides, longest = [torch.randn(n, 2, 10) for n in (8, 21, 5)], 21
    alone = torch.cat([patch(video[i:i + 1], side[None]) for i, side in enumerate(sides)])
    padded = torch.stack([torch.cat([side, torch.full((longest - len(side), 2, 10), 7.)]) for side in sides])
    torch.testing.assert_close(patch(video, padded, [len(s) for s in sides]), alone, atol=1e-5, rtol=1e-5)


def test_a_short_side_channel_is_stretched_and_order_within_a_stretch_means_nothing():
    x = torch.arange(29.)[:, None, None]
    assert torch.allclose(interpolate_time(x, 32)[[0, 31]], x[[0, 28]]) and interpolate_time(x, 32).diff(dim=0).std() < 1e-5
    patch, video, side = grown(Patch(SMALL)), torch.randn(1, 4, 4, 12), torch.randn(1, 8, 3, 10)
    torch.testing.assert_close(patch(video, side), patch(video, side.flip(2)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="square grids and heads of 128"):
        Patch(replace(SMALL, rope=True))(video, side)


# --- in the models ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shows(tmp_path_factory):
    """The folder of a small world of shows, with questions about every channel."""
    cache = tmp_path_factory.mktemp("shows")
    for names in ([name] for name in CHANNELS):
        build_side_world("", 8, 4, 0, names, cache)
    return build_side_world("", 8, 4, 0, ["audio", "fast"], cache).parents[1]


def samples_of(shows, name, split="train"):
    return add_side_channels(read_samples(shows / name / f"{split}.jsonl", [], split), name.split("+"))


def batch_of(model, samples):
    features = Features(model)
    features.prepare(samples)
    return model.collate([s.parts for s in samples], features(samples), [s.target or "<answer> dog</answer>" for s in samples])


def test_a_new_patch_changes_nothing_and_one_that_is_taken_off_leaves_nothing(shows):
    model, samples = load_base(), samples_of(shows, "audio")[:3]
    before, without = model.losses(batch_of(model, samples)), model.losses(batch_of(model, add_side_channels(samples, [])))
    assert torch.equal(before, without)                                       # the model has no patch: the side channel is not heard
    model.patches.add("audio", PatchConfig(*model.patch_widths[:1], 128, model.patch_widths[1], 64))
    assert torch.equal(model.losses(batch_of(model, samples)), before)
    grown(model.patches["audio"])
    assert not torch.equal(model.losses(batch_of(model, samples)), before)
    del model.patches["audio"]
    assert torch.equal(model.losses(batch_of(model, samples)), before)


@pytest.mark.parametrize("backbone", ["composed", "native", "llava"])
@pytest.mark.parametrize("adapter", ["ilora", "lora", "none"])
@pytest.mark.parametrize("side", ["", "audio", "fast", "depth", "view"])
def test_a_step_of_every_adapter_side_channel_and_backbone(shows, adapter, side, backbone):
    model = load_model(BackboneConfig(backbone=backbone, weights="tiny-random"))
    samples = samples_of(shows, side)[:2] if side else add_side_channels(samples_of(shows, "audio")[:2], [])
    batch = batch_of(model, samples)
    model.add_adapter(AdapterConfig(adapter=adapter, r=2, alpha=4))
    if side:
        width = batch["media"][0].sides[side].features.shape[-1]
        model.patches.add(side, PatchConfig(model.patch_widths[0], width, model.patch_widths[1], 32, layers=1))
        grown(model.patches[side])
    if not side and adapter == "none":
        return
    if backbone == "native" and side in ("audio", "depth", "view"):                   # it hears by itself, and has no features of a second view
        with pytest.raises(ModelError, match=f"patch {side}: this model's encoder gives no features"):
            model(batch)
        return
    loss, tokens = model(batch)
    (loss / tokens).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and trained and all(p.grad is not None for p in trained.values())
    assert {n.split(".")[0] for n in trained} == {name for name, there in (("patches", side), ("llm", adapter != "none")) if there}
    assert len(model.generate(batch_of(model, samples), 3)) == 2


def test_the_likeliest_option_is_chosen(shows):
    model, samples = load_base(), samples_of(shows, "fast", "test")
    features = Features(model)
    features.prepare(samples)
    said = rank_options(model, samples, features(samples))
    for sample, text in zip(samples, said):
        single = [model.losses(model.collate([sample.parts], features([sample]), [option])).sum().item() for option in options(sample)]
        assert text == options(sample)[int(np.argmin(single))]


# --- as a file -------------------------------------------------------------------------------------------------------------
RUN = ["pave-tiny", "--steps", "2", "--batch-size", "4", "--world-clips", "8", "--world-test", "4"]


def test_arms_and_two_patches_trained_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*RUN, "--side", "audio"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].split() == ["questions", "about", "chance", "base", "adapter", "alone", "with", "the", "patch", "n"] and said[-1].startswith("audio")
    assert train.main([*RUN, "--side", "audio"]) == 0                         # both arms are there: the table again, nothing is trained
    assert capsys.readouterr().out.splitlines() == said[-2:] and not Path("runs/pave-tiny-audio-2").exists()
    assert train.main([*RUN, "--side", "fast", "--no-arms"]) == 0
    files = {name: Path(f"runs/pave-tiny{'-audio' * (name == 'audio')}/patches/{name}.safetensors") for name in ("audio", "fast")}
    model, questions = load_base(), samples_of(Path(next(Path("data/world").glob("sides-*"))), "audio")
    for file in files.values():
        model.patches.load(file, *model.patch_widths)
        grown(model.patches[file.stem])
    both = model.losses(batch_of(model, questions))
    del model.patches["fast"]
    assert torch.equal(model.losses(batch_of(model, questions)), both)        # these clips have no dense stream
    assert infer.main(["--json", "--run", "runs/pave-tiny-audio", "--patch", str(files["fast"])]) == 0
    assert infer.main(["--run", "runs/pave-tiny-audio", "--eval", "--side", "none"]) == 0
    assert json.loads(Path("runs/pave-tiny-audio/eval_test/decoding.json").read_text())["sides"] == []
    assert train.main([*RUN, "--side", "smell"]) == 2 and "--side smell: the built-in world has the side channels audio, fast" in capsys.readouterr().err
    assert infer.main(["--run", "runs/pave-tiny-audio", "--side", "depth"]) == 2 and "has no such patch or modality, but audio" in capsys.readouterr().err


def test_two_side_channels_in_one_run_each_sample_through_its_own(shows, tmp_path):
    run = tmp_path / "run"
    assert train.main([*RUN, "--side", "audio,fast", "--no-arms", "--data", str(shows / "audio+fast" / "train.jsonl"), "--out", str(run)]) == 0
    assert {p.stem for p in (run / "patches").iterdir()} == {"audio", "fast"}
    kinds = [{p.side for p in s.media if p.side} for s in samples_of(shows, "audio+fast")]
    assert {frozenset(k) for k in kinds} == {frozenset({"audio"}), frozenset({"fast"})}
    assert set(json.loads((run / "metrics.json").read_text())["tasks"]["own"]["types"]) == {"audio", "fast"}


def test_a_patch_of_another_model_a_wrong_width_and_what_is_no_patch(tmp_path):
    model = load_base()
    model.patches.add("depth", PatchConfig(12, 1, 16, 32))
    model.patches.save(tmp_path)
    with pytest.raises(ModelError, match="a patch for video tokens 12 wide and an LM of 16; this model has 128 and 192"):
        model.patches.load(tmp_path / "depth.safetensors", *model.patch_widths)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for file in ("no.safetensors", "none.safetensors"):
        with pytest.raises(ModelError, match="not a patch"):
            model.patches.load(tmp_path / file, *model.patch_widths)


def test_arrays_of_the_wrong_shape_and_missing_side_channels_are_named(shows, tmp_path):
    for name, array in (("flat", np.zeros(7)), ("nan", np.full((4, 2), np.nan)), ("deep", np.zeros((2, 2, 2, 2, 2)))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(MediaError, match=f"{name}.npy: an array of shape"):
            read_array(str(tmp_path / f"{name}.npy"), 10, 32)
    torch.save({"x": torch.zeros(5, 3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    assert read_array(str(tmp_path / "x.pt"), 10, 32).shape == (5, 1, 3)
    (tmp_path / "broken.pt").write_bytes(b"PK")
    with pytest.raises(MediaError, match="broken.pt: not one array"):
        read_array(str(tmp_path / "broken.pt"), 10, 32)
    with pytest.raises(DataError, match="own/train/0.*; view want one video"):
        add_side_channels(read_samples(shows / "audio" / "train.jsonl", [], "train"), ["view"])
    model, samples = load_base(), samples_of(shows, "depth")[:2]
    model.patches.add("depth", PatchConfig(model.patch_widths[0], 5, model.patch_widths[1], 32))
    with pytest.raises(ModelError, match="patch depth: reads side tokens 5 wide, got .128."):
        model.losses(batch_of(model, samples))


# --- LLaVA-OneVision -------------------------------------------------------------------------------------------------------
def test_llava_trains_answers_and_goes_to_released_names_and_back(small_world, tmp_path, capsys):
    run, back = tmp_path / "run", tmp_path / "again"
    assert train.main(["pave-0.5b", "--weights", "tiny-random", "--steps", "2", "--batch-size", "2", "--test-rows", "2", "--data", str(small_world), "--patch-size", "32",
                       "--r", "4", "--frames", "4", "--shared-kv", "--out", str(run)]) == 0
    assert infer.main(["--run", str(run), "--json", str(next((small_world / "ave" / "video").glob("*.mp4"))), "--ask", "What is heard?", "--limit", "4"]) == 0
    file = tmp_path / "non_lora_and_lora.bin"
    write_released("pave", run, file)
    names = set(read_checkpoint(file))
    assert "base_model.model.model.temporal_aggregator.cross_attn_layers.0.attn.k_linear.weight" in names
    assert any(name.startswith("base_model.model.model.layers.0.self_attn.q_proj.lora_A") for name in names)
    assert convert_main(["pave", str(file), "--out", str(back), "--preset", "pave-0.5b"]) == 0
    for part in ("adapter/adapter_model.safetensors", "patches/audio.safetensors"):
        before, after = load_file(run / part), load_file(back / part)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    found = json.loads((back / "config.json").read_text())["train"]
    assert (found["r"], found["alpha"], found["side"], found["adapter"]) == (4, 16, "audio", "lora")


# --- the shows -------------------------------------------------------------------------------------------------------------
def test_ten_frames_of_a_show_do_not_tell_when_the_light_flashes(shows):
    renderer = Renderer()
    for index in range(4):
        scene, marked = make_show(renderer, "test", index, 0)
        video, dense = (read_video(shows / f"{scene.name}.mp4", n, None).frames.astype(float) for n in (10, 250))
        still = renderer.frames(scene, (np.arange(10) + .5))
        assert np.abs(video - still).mean() < 6                               # the flash would turn them
        start, end = scene.objects[marked["fast"]].seen[0]
        light = dense.mean((1, 2, 3)) - np.median(dense.mean((1, 2, 3)))
        found = np.flatnonzero(np.abs(light) > 20) / 25
        assert 3 <= len(found) <= 4 and start <= found[0] and found[-1] < end
        assert [o.seen for o in scene.objects[:STRETCHES]] == [o.heard for o in scene.objects[STRETCHES:]]


def test_answers_of_the_shows_are_one_in_four_and_the_same_each_time(shows, tmp_path):
    rows = [json.loads(line) for name in CHANNELS for line in (shows / name / "train.jsonl").read_text().splitlines()]
    assert all(len(set(row["options"])) == STRETCHES and row["messages"][1]["content"][9:-9] in row["options"] for row in rows)
    shutil.copytree(shows / "audio", tmp_path / "before")
    again = build_side_world("", 8, 4, 0, ["audio"], shows.parent)
    assert again.read_text() == (tmp_path / "before" / "train.jsonl").read_text()
    assert side_part("view", "x_view.mp4", [], []).kind == "view" and side_part("depth", "x.npy", [], []).kind == "array"
