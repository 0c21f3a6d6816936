"""CREMA in a model: modalities come and go, training in sequence and its exits, runs, files, released names, the maps of the shows."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released import write_released
from safetensors.torch import load_file, save_file
from torch import nn

import infer
import train
from crab_min.backbones.blip2 import CremaConfig, load_crema
from crab_min.crema import FIRST_EXIT, EarlyExit
from crab_min.data import (
    add_side_channels,
    count_missing,
    limit_frames,
    load_media,
    read_samples,
    side_part,
)
from crab_min.encoders import ENCODERS, DepthEncoder, VisionEncoder, register
from crab_min.errors import MediaError, ModelError
from crab_min.evaluation.answering import options, rank_options
from crab_min.features import Features
from crab_min.interface import PromptPart
from crab_min.media.arrays import point_code, read_points
from crab_min.media.flow import flow_pictures
from crab_min.media.read import read_flow, read_video
from crab_min.media.write import write_video
from crab_min.tools.convert import main as convert_main
from crab_min.tools.released.weights import read_checkpoint
from crab_min.world.rendering import Renderer
from crab_min.world.side_channels import CHANNELS, build_side_world, make_show

NAMES = ["audio", "flow", "depth", "normals", "thermal", "touch", "points"]
CONFIG = CremaConfig(modality_rank=4)
SMALL = ["crema-tiny", "--sequential", "--world-clips", "8", "--world-test", "2", "--batch-size", "4", "--save-every", "2", "--modality-rank", "4"]


@pytest.fixture(scope="module")
def shows(tmp_path_factory):
    """train.jsonl of a small world whose rows have all of CREMA's modalities."""
    return build_side_world("", 8, 2, 0, NAMES, tmp_path_factory.mktemp("shows"), together=True)


def samples_of(shows, names, split="train"):
    return limit_frames(add_side_channels(read_samples(shows.with_name(f"{split}.jsonl"), [], split), names), 5)


def with_modalities(model, samples, names, config=CONFIG):
    """The features of the samples; `model` gets the modalities, trained as far as their B and the fusion are not zero."""
    features = Features(model)
    features.prepare(samples)
    widths = {p.side: m.features.shape[-1] for s in samples for p, m in zip(s.media, features([s])[0])}
    model.configure(config)
    for name in names:
        model.add_side(name, widths[name])
    for pair in model.multimodal.pairs().values():
        for B in pair.B.values():
            nn.init.normal_(B.weight, std=.1)
    if model.fusion:
        nn.init.normal_(model.fusion.linear.weight, std=.02)
    return features


def batch_of(model, features, samples):
    return model.collate([s.parts for s in samples], features(samples), [s.target or "<answer> dog</answer>" for s in samples])


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


# --- in the model ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["", "tiny-random"])
def test_a_fresh_modality_changes_nothing_where_it_is_added_and_tokens_do_not_grow_with_their_number(shows, weights):
    model, alone = load_crema(weights), samples_of(shows, [])[:2]
    features = Features(model)
    before, longest, lengths = model.losses(batch_of(model, features, alone)), batch_of(model, features, alone)["ids"].shape[1], []
    model.configure(CONFIG)
    for i, name in enumerate(NAMES):
        samples = samples_of(shows, NAMES[:i + 1])[:2]
        width = dict(zip([p.side for p in samples[0].media], features(samples[:1])[0]))[name].features.shape[-1]
        model.add_side(name, width)
        model.join = "add"
        assert torch.equal(model.losses(batch_of(model, features, samples)), before)
        model.join = "concat"
        lengths.append(batch_of(model, features, samples)["ids"].shape[1])
    assert set(lengths) == {lengths[0]} and lengths[0] > longest


@pytest.mark.parametrize("join", ["add", "concat"])
@pytest.mark.parametrize("weights", ["", "tiny-random"])
def test_a_step_on_a_modality_changes_it_and_the_fusion_alone(shows, weights, join):
    names = ["audio", "flow", "points"]
    model, samples = load_crema(weights), samples_of(shows, names)[:3]
    features = with_modalities(model, samples, names, CremaConfig(join=join, modality_rank=4))
    model.train()
    for name in ["rgb", *names]:
        before = copy.deepcopy(model.state_dict())
        model.learn([name])
        loss, tokens = model(batch_of(model, features, samples))
        (loss / tokens).backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in learned) and all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert model.gradient_norm(name) > 0
        torch.optim.AdamW(learned, lr=1e-2).step()
        model.zero_grad()
        assert changed(before, model.state_dict()) <= {f"multimodal.{key}" for key in model.multimodal.own(name)} | {"fusion.linear.weight", "fusion.linear.bias"}
    model.eval()
    assert len(model.generate(batch_of(model, features, samples), 3, beams=2)) == 3
    said = rank_options(model, samples, features(samples))
    assert all(text in options(s) for s, text in zip(samples, said))


def test_what_is_held_between_the_passes_of_a_batch_changes_no_loss(shows):
    names = ["flow", "depth"]
    model, samples = load_crema(""), samples_of(shows, names)[:4]
    features = with_modalities(model, samples, names)
    batch = batch_of(model, features, samples)
    model.train()
    for name in ["rgb", *names, "rgb"]:
        model.learn([name])
        loss = model(batch)[0]
        loss.backward()
        torch.optim.SGD(model.own(name), lr=.1).step()
        model.zero_grad()
        if model.held:
            held, model.held = model.held, {}
            model.learned = set(["rgb", *names])
            fresh = model(batch)[0]
            model.held, model.learned = held, {name}
            if name != "rgb":
                model.learn([next(n for n in ["rgb", *names] if n != name)])
            torch.testing.assert_close(model(batch)[0], fresh)
    media = batch_of(model, features, samples[:2])
    model.eval()
    torch.testing.assert_close(model.losses(media), model.losses(batch)[:2])  # of the last step, not of what was held


def test_a_clip_without_a_modality_has_zeros_in_its_place_and_is_counted(shows):
    names = ["flow", "depth"]
    model, whole = load_crema(""), samples_of(shows, names)[:2]
    features = with_modalities(model, whole, names)
    part = [whole[0], samples_of(shows, ["flow"])[1]]
    media = model.collate([s.parts for s in part], features(part))["media"]
    lengths = [len(m.features) for m in media]
    fused = model.fuse([m.sides for m in media], lengths)
    assert count_missing(part, names) == {"flow": 0, "depth": 1}
    flow = model.read("flow", [media[1].sides["flow"]])
    torch.testing.assert_close(fused[5:], model.fusion({"flow": flow, "depth": torch.zeros_like(flow)}))
    none = model.fuse([{}, {}], lengths)
    assert torch.equal(none[0], none[-1])


def test_a_modality_without_its_adapter_is_read_as_the_frozen_qformer_does(shows):
    model, samples = load_crema(""), samples_of(shows, ["flow"])[:2]
    features = with_modalities(model, samples, ["flow"])
    batch = batch_of(model, features, samples)
    adapted = model.losses(batch)
    model.skipped = {"flow"}
    skipped = model.losses(batch)
    for pair in model.multimodal.pairs().values():
        pair.B["flow"].weight.data.zero_()
    model.skipped = set()
    assert not torch.equal(adapted, skipped) and torch.equal(model.losses(batch), skipped)


# --- a sensor of one's own -----------------------------------------------------------------------------------------------------
class Sonar(nn.Module):
    """Ten lines: how bright each quarter of a picture is."""
    width = 12

    def forward(self, frames):
        x = frames.float() / 255                                                                 # (B, T, H, W, 3)
        h, w = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, :2 * h, :2 * w].unflatten(3, (2, w)).unflatten(2, (2, h)).mean((3, 5))       # (B, T, 2, 2, 3)
        return x.flatten(2)[:, :, None].expand(-1, -1, 2, -1)                                    # (B, T, 2, 12)


@pytest.fixture
def sonar():
    register("sonar", Sonar())
    yield
    del ENCODERS["sonar"]


def test_a_sixth_modality_that_a_user_registers_trains_saves_and_leaves_the_rest_as_it_was(shows, tmp_path, sonar, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(shows), "--test-rows", "4"]
    assert train.main([*SMALL, *data, "--steps", "2", "--out", "five"]) == 0
    assert train.main([*SMALL, *data, "--steps", "2", "--modalities", "rgb,audio,flow,depth,thermal,sonar", "--out", "six"]) == 0
    assert json.loads(Path("six/metrics.json").read_text())["missing"]["sonar"] == 0
    model = load_crema("")
    model.load_trained(tmp_path / "six")
    samples = samples_of(shows, ["audio", "flow", "depth", "thermal", "sonar"])[:2]
    features = Features(model)
    with_sonar = model.losses(batch_of(model, features, samples))
    before = copy.deepcopy(model.state_dict())
    model.remove_side("sonar")
    assert changed(before, model.state_dict()) == {"fusion.linear.weight"}                       # its columns are gone
    width = model.fusion.linear.weight.shape[1]
    assert torch.equal(model.fusion.linear.weight, before["fusion.linear.weight"][:, :width]) and width == 4 * model.multimodal.config.width_out
    gone = before.keys() - model.state_dict().keys()
    assert gone and all("sonar" in name for name in gone)
    five = samples_of(shows, ["audio", "flow", "depth", "thermal"])[:2]
    without = model.losses(batch_of(model, features, five))
    model.add_side("sonar", 12)
    torch.testing.assert_close(model.losses(batch_of(model, features, samples)), without, atol=1e-5, rtol=1e-5)      # another batch may be summed in another order
    assert not torch.allclose(with_sonar, without, atol=1e-4)


def test_an_encoder_that_cannot_be_used_is_named(sonar, shows):
    with pytest.raises(ModelError, match="encoder of 'lidar': give a torch module with a `width`"):
        register("lidar", lambda x: x)
    ENCODERS["sonar"].width = 13
    model, samples = load_crema(""), samples_of(shows, ["sonar"])[:1]
    with pytest.raises(ModelError, match="encoder of 'sonar': gave .1, 5, 2, 12. for .*; its width is 13"):
        Features(model).prepare(samples)
    ENCODERS["sonar"].width = 12


def test_a_depth_model_of_transformers_makes_the_modality_depth(tmp_path):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor
    config = DPTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
                       neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False)
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    vision = load_crema("").vision
    encoder = DepthEncoder(str(tmp_path), vision)
    for parameter in encoder.depth.parameters():                              # a random one of transformers sees nothing behind its last ReLU
        nn.init.normal_(parameter, std=.3)
    frames = torch.randint(0, 255, (1, 3, 40, 40, 3), dtype=torch.uint8)
    pictures = encoder.pictures(frames[0])
    assert pictures.shape[::3] == (3, 3) and pictures.amax() == 255 and pictures.amin() == 0
    assert encoder(frames).shape == (1, 3, vision.tokens, vision.width)
    with pytest.raises(ModelError, match="depth model nowhere: cannot be loaded .*depth-anything"):
        DepthEncoder("nowhere", vision)


def test_blip2s_vision_model_gives_its_class_token_and_no_last_norm():
    vision = VisionEncoder({"model_type": "blip_2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
                            "patch_size": 14}, layer=-1).eval()
    frames = torch.randint(0, 255, (1, 2, 28, 28, 3), dtype=torch.uint8)
    with torch.no_grad():
        x = vision(frames)
        assert x.shape == (1, 2, vision.tokens, 16) and vision.tokens == 5
        torch.testing.assert_close(vision.model.post_layernorm(x[0]), vision.model(vision.pixels(frames[0])).last_hidden_state)


# --- training in sequence ------------------------------------------------------------------------------------------------------
def epochs(exits: EarlyExit, norms: list[float], steps: int = 3) -> None:
    """An epoch of a few steps for each of the mean norms of modality a; b always has 1."""
    for norm in norms:
        for step in range(steps):
            exits.note("a", norm + (step - (steps - 1) / 2) * .1)
            exits.note("b", 1.)
            exits.end_step(step == steps - 1)


def test_the_exit_fires_when_the_gradient_grows_and_never_before_the_end_of_the_sixth_epoch():
    early, exits = EarlyExit(["a", "b"], 1.4), EarlyExit(["a", "b"], 1.4)
    epochs(early, [1, 9, 99, 999, 9999])
    assert early.live == ["a", "b"] and FIRST_EXIT == 5
    epochs(exits, [1, 1, 1, 1, 1, 1.3])
    assert exits.live == ["a", "b"]
    epochs(exits, [1.5])                                                      # 1.4 times the mean of six epochs, 1.05, is 1.47
    assert exits.live == ["b"] and exits.exits == {"a": 6}
    again = EarlyExit(["a", "b"], 1.4)
    again.restore(json.loads(json.dumps(exits.state())))
    assert again.state() == exits.state() and len(exits.norms["a"]) == 7
    late = EarlyExit(["a", "b"], 1.4)
    epochs(late, [1, 1, 1, 1, 1, 9])
    assert late.exits == {"a": 5}                                             # the end of the sixth epoch
    never = EarlyExit(["a", "b"], 0)
    epochs(never, [1, 1, 1, 1, 1, 9, 99])
    assert never.live == ["a", "b"]


def test_the_norm_of_an_epoch_is_the_mean_over_its_steps():
    exits = EarlyExit(["a"], 1.4)
    for step, norm in enumerate((1., 2., 6.)):
        exits.note("a", norm)
        exits.end_step(step == 2)
    assert exits.norms["a"] == [3.]


def test_a_run_ends_when_every_modality_has_gone(shows, tmp_path, monkeypatch):
    """Twelve epochs of two steps with a temperature that lets everyone go as soon as may be."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in shows.read_text().splitlines()][:8]
    data = shows.with_name("few.jsonl")
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert train.main([*SMALL, "--data", str(data), "--modalities", "rgb,flow,depth", "--steps", "20", "--temperature", ".01", "--out", "run", "--save-every", "12"]) == 0
    log = [line.split(",") for line in Path("run/log.csv").read_text().splitlines()[1:]]
    assert [line[-1] for line in log] == ["rgb+flow+depth"] * 12              # then none is left, and the run ends
    assert json.loads(Path("run/exits.json").read_text())["exits"] == {"rgb": 5, "flow": 5, "depth": 5}


def test_a_killed_sequential_run_goes_on_as_if_it_had_not_stopped(shows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--data", str(shows), "--test-rows", "2", "--steps", "4", "--modalities", "rgb,flow,depth", "--no-half"]
    assert train.main([*flags, "--out", "whole"]) == 0
    from crab_min import trainer
    saved = trainer.save_state

    def killed(folder, progress, *rest):
        saved(folder, progress, *rest)
        if progress["step"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(trainer, "save_state", killed)
    assert train.main([*flags, "--out", "cut"]) == 130
    monkeypatch.setattr(trainer, "save_state", saved)
    assert train.main([*flags, "--out", "cut"]) == 0
    whole, cut = (load_file(f"{name}/modalities.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert Path("whole/exits.json").read_text() == Path("cut/exits.json").read_text()


# --- runs and files ------------------------------------------------------------------------------------------------------------
def test_crema_xl_trains_answers_and_goes_to_released_names_and_back(small_world, tmp_path, capsys):
    run, back, file = tmp_path / "run", tmp_path / "again", tmp_path / "crema.pth"
    assert train.main(["crema-xl", "--weights", "tiny-random", "--steps", "2", "--batch-size", "2", "--test-rows", "2", "--data", str(small_world), "--modality-rank", "4",
                       "--modalities", "rgb,audio,flow", "--out", str(run)]) == 0
    clip = str(next((small_world / "ave" / "video").glob("*.mp4")))
    assert infer.main(["--run", str(run), "--json", clip, "--ask", "What is heard?", "--limit", "4", "--beams", "3", "--skip", "audio"]) == 0
    assert infer.main(["--run", str(run), "--json", clip, "--ask", "What is heard?", "--limit", "4", "--side", "flow"]) == 0
    capsys.readouterr()
    for flags, said in ((["--skip", "depth"], "--skip depth: the model has no such modality, but rgb, audio, flow"),
                        (["--side", "depth"], "--side depth: the model has no such patch or modality, but audio, flow")):
        assert infer.main(["--run", str(run), clip, "--ask", "What?", *flags]) == 2 and said in capsys.readouterr().err
    write_released("crema", run, file)
    released = read_checkpoint(file)
    assert {"query_tokens_flow", "t5_proj_rgb.weight", "fusion.0.weight", "Qformer.bert.encoder.layer.1.attention.self.value.w_a_audio.weight"} <= released.keys()
    assert convert_main(["crema", str(file), "--side", "rgb,audio,flow", "--out", str(back)]) == 0
    before, after = load_file(run / "modalities.safetensors"), load_file(back / "modalities.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((back / "config.json").read_text())["train"]["modalities"] == "rgb,audio,flow"
    model = load_crema("tiny-random")
    model.load_trained(back)
    assert model.side_names == ["audio", "flow"] and not model.aligned

    torch.save({name: w for name, w in released.items() if "_flow" not in name}, tmp_path / "two.pth")
    torch.save({name: w for name, w in released.items() if "fusion" not in name}, tmp_path / "unfused.pth")
    capsys.readouterr()
    for name, sides, said in (("two", "rgb,audio,flow", "flow lacks queries, norm, projection, adapter; whole in these files: audio, rgb"),
                              ("two", "rgb,audio", "a fusion of 2 modalities in these files, expected a fusion of the 1 beside rgb"), ("unfused", "rgb,audio,flow", "no fusion weights in these files")):
        assert convert_main(["crema", str(tmp_path / f"{name}.pth"), "--side", sides, "--out", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_converted_run_keeps_its_own_frozen_qformer(tmp_path):
    model = load_crema("tiny-random")
    model.configure(CONFIG)
    model.add_side("flow", 32)
    model.save_trained(tmp_path)
    state, key = load_file(tmp_path / "modalities.safetensors"), "multimodal.qformer.encoder.layer.0.attention.attention.query.base.weight"
    about = {"widths": {"rgb": 32, "flow": 32}, "fused": ["flow"], "join": "concat", "aligned": False, "rank": 4}
    save_file(state | {key: torch.ones_like(model.state_dict()[key])}, tmp_path / "modalities.safetensors", {"crema": json.dumps(about)})
    other = load_crema("tiny-random")
    other.load_trained(tmp_path)
    assert (other.state_dict()[key] == 1).all()
    other.save_trained(tmp_path / "..")
    assert key in load_file(tmp_path / "../modalities.safetensors")


def test_what_is_wrong_with_modalities_is_said(shows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, said in ((["--modalities", "audio,rgb"], "name rgb, the video, first"), (["--modalities", "rgb,flow,flow"], "each other modality once"),
                        (["--modalities", "rgb,flow", "--side", "audio"], "without --side (audio)"), (["--modalities", "rgb,sonar"], "the built-in world has the side channels audio"),
                        (["--modalities", "rgb,flow", "--backbone", "composed"], "of --backbone crema alone (got composed)"),
                        (["--modalities", "rgb,lidar", "--data", str(shows)], "--modalities lidar: no training row has it")):
        assert train.main([*SMALL, "--steps", "1", *flags]) == 2
        assert said in capsys.readouterr().err
    model = load_crema("")
    model.configure(CONFIG)
    model.add_side("flow", 20)
    samples = samples_of(shows, ["flow"])[:1]
    with pytest.raises(ModelError, match=r"modality 'flow': wants features \(samples, steps, tokens, 20\), got .*128"):
        model.losses(batch_of(model, Features(model), samples))
    model.save_trained(tmp_path)
    state = load_file(tmp_path / "modalities.safetensors")
    about = {"widths": {"rgb": 128, "flow": 20}, "fused": ["flow"], "join": "add", "aligned": True, "rank": 4}
    save_file({name: w for name, w in state.items() if "fusion" not in name}, tmp_path / "modalities.safetensors", {"crema": json.dumps(about)})
    with pytest.raises(ModelError, match="2 missing .fusion.linear.bias, fusion.linear.weight"):
        load_crema("").load_trained(tmp_path)
    save_file(state, tmp_path / "modalities.safetensors")
    with pytest.raises(ModelError, match="not the modalities of a run"):
        load_crema("").load_trained(tmp_path)
    with pytest.raises(ModelError, match="modality 'lidar': not in this model, which has rgb, flow"):
        model.remove_side("lidar")


# --- signals -------------------------------------------------------------------------------------------------------------------
def test_flow_is_where_things_go_and_what_the_world_says_it_is(shows, tmp_path):
    rng = np.random.default_rng(0)
    frames, square = np.full((50, 64, 64, 3), 120, np.uint8), rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for t in range(50):
        frames[t, 20:44, 8 + t // 2:32 + t // 2] = square                     # to the right
    write_video(tmp_path / "x.mp4", frames, None)
    flow = read_flow(tmp_path / "x.mp4", 3, 64)
    right = flow_pictures(np.full((1, 1, 1, 2), (1., 0.)))[0, 0, 0]
    inside = flow.frames[1, 28:36, 26:36].reshape(-1, 3).astype(int)
    assert flow.frames.shape == (3, 64, 64, 3) and np.abs(inside - flow_pictures(np.full((1, 1, 1, 2), (1 / 64, 0.)))[0, 0, 0]).mean() < 60
    assert inside[:, 0].mean() > inside[:, 2].mean() and right[0] > right[2] and (flow.frames[1, :10] > 235).mean() > .9
    renderer = Renderer()
    hits = 0
    for index in range(8):                                                    # the thing that trembles moves more than the others, in the film as in the map
        scene, marked = make_show(renderer, "train", index, 0)
        seen = read_flow(shows.parents[1] / f"{scene.name}.mp4", 10, 96).frames
        exact = np.load(shows.parents[1] / f"{scene.name}_flow.npy")
        start, end = scene.objects[marked["flow"]].seen[0]
        for pictures in (seen, exact):
            much = (255 - pictures.min(-1).astype(float)).mean((1, 2))
            inside = np.isin(np.arange(10), range(start, end))
            hits += much[inside].min() > much[~inside].max()
    assert hits >= 15


def test_no_frame_of_a_show_tells_what_trembles():
    renderer = Renderer()
    for index in range(4):
        scene, marked = make_show(renderer, "train", index, 0)
        times = [*np.arange(10), *(np.arange(10) + .5)]
        moved, scene.objects[marked["flow"]].trembles = renderer.frames(scene, times), 0
        assert np.array_equal(moved, renderer.frames(scene, times))


def test_maps_mark_the_stretch_that_the_answer_says(shows):
    renderer, tells = Renderer(), {"depth": lambda x: (x[..., 0] - x[..., 2]).max(), "thermal": lambda x: x[..., 1].max(), "touch": np.std, "normals": lambda x: -x[..., 0].min()}
    for index in range(8):
        scene, marked = make_show(renderer, "train", index, 0)
        for name, strength in tells.items():
            x = np.load(shows.parents[1] / f"{scene.name}_{name}.npy").astype(float)
            start, end = scene.objects[marked[name]].seen[0]
            values, inside = np.array([strength(step) for step in x]), np.isin(np.arange(10), range(start, end))
            assert values[inside].min() > values[~inside].max(), name
        xyz, _ = read_points(str(shows.parents[1] / f"{scene.name}_points.npz"))
        start, end = scene.objects[marked["points"]].seen[0]
        assert (xyz[..., 2].mean(1) > 150).tolist() == [start <= t < end for t in range(10)]


def test_pictures_in_folders_and_arrays_and_points_are_read(tmp_path):
    for i in (2, 10, 1):                                                      # in the order of their numbers
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    video = read_video(tmp_path, 3, 4)
    assert [int(f.mean()) for f in video.frames] == [20, 40, 200] and video.seconds == 3
    np.save(tmp_path / "grey.npy", np.arange(4, dtype=np.uint8)[:, None, None] * np.full((4, 6, 6), 10, np.uint8))
    frames, _ = load_media(PromptPart("array", path=str(tmp_path / "grey.npy"), frames=2), 12)
    assert frames.shape == (2, 12, 12, 3) and [int(f.mean()) for f in frames] == [10, 30]
    np.save(tmp_path / "wrong.npy", np.zeros((4, 6, 6, 5), np.uint8))
    with pytest.raises(MediaError, match="bytes of shape .4, 6, 6, 5.; pictures are"):
        load_media(PromptPart("array", path=str(tmp_path / "wrong.npy")), 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="a folder without pictures"):
        read_video(tmp_path / "empty")
    xyz, features = np.random.default_rng(0).integers(0, 256, (7, 3)), np.random.default_rng(0).normal(size=(7, 1408)).astype(np.float32)
    for folder in ("voxelized_features_sam_nonzero_preprocess", "voxelized_voxels_sam_nonzero_preprocess"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "voxelized_features_sam_nonzero_preprocess/scene.pt"
    torch.save(torch.as_tensor(features), file)
    np.save(tmp_path / "voxelized_voxels_sam_nonzero_preprocess/scene.npy", xyz)
    part = side_part("points", str(file), [], [])
    x, _ = load_media(part, 12)
    assert part.kind == "points" and x.shape == (1, 7, 1408)
    code = (x[0] - features) / .01
    assert np.allclose(code[:, 0], np.sin(xyz[:, 0]), atol=1e-3) and np.allclose(code[:, 470], np.cos(xyz[:, 1]), atol=1e-3) and not code[:, 1407].any()
    assert point_code(np.zeros((2, 9000, 3), int)).shape == (2, 5000, 96)
    np.savez(tmp_path / "bad.npz", places=xyz)
    with pytest.raises(MediaError, match="not 3D points"):
        read_points(str(tmp_path / "bad.npz"))


def test_real_clips_have_flow_and_go_through_the_model(real_media):
    model = load_crema("")
    samples = limit_frames(add_side_channels(read_samples(real_media, ["ave", "avqa"], "train", limit=1), ["audio", "flow"]), 5)
    features = with_modalities(model, samples, ["audio", "flow"])
    assert {p.kind for s in samples for p in s.media} == {"video", "audio", "flow"}
    pictures = [load_media(p, 96)[0] for s in samples for p in s.media if p.side == "flow"]
    assert all(p.shape == (5, 96, 96, 3) and p.std() > 0 for p in pictures)                      # something moves
    assert len(model.generate(model.collate([s.parts for s in samples], features(samples)), 5)) == len(samples) == 2


def test_every_channel_can_be_asked_for():
    assert set(NAMES) < set(CHANNELS)
