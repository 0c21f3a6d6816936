"""PAVE: the patch by itself, in the models, as a file, and clips that need it."""

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from released import write_released
from safetensors.torch import load_file, save_file

import infer
import train
from crab_min.backbones.composed import load_base
from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, BackboneConfig, SideChannelConfig
from crab_min.data import read_samples
from crab_min.errors import DataError, MediaError, ModelError
from crab_min.evaluation.answering import options, rank_options
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features
from crab_min.media.arrays import read_array
from crab_min.media.read import read_video
from crab_min.pave import Patch, PatchConfig, Patches, interpolate_time, partition_steps
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import load_saved_run
from crab_min.side_channels import add_side_channels, side_part
from crab_min.tools.convert import main as convert_main
from crab_min.tools.released.weights import read_checkpoint
from crab_min.trained_parts import read_parts
from crab_min.world.rendering import Renderer
from crab_min.world.side_channels import CHANNELS, INTERVALS, build_side_world, make_show

SMALL = PatchConfig(12, 10, 16, hidden=32, layers=1)


def trained(patch: Patch) -> Patch:
    """Give a patch a gain that is not zero, as if it had been trained."""
    torch.nn.init.normal_(patch.norm.weight)
    return patch


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the patch by itself --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "out, layers, expected", [(896, 2, 6_235_776), (3584, 2, 8_996_352), (3584, 3, 10_833_920)]
)
def test_parameters_at_the_papers_sizes(out, layers, expected):
    config = PatchConfig(1152, 1024, out, layers=layers)
    with torch.device("meta"):
        assert count(Patch(config)) == expected
        # no value projection is allocated
        shared = Patch(replace(config, shared_kv=True))
        assert count(shared) == expected - layers * (512 * 512 + 512)


def test_a_frame_attends_to_the_side_tokens_of_its_own_time_alone():
    """59 steps for 32 frames: the first 27 frames have two, the others one."""
    patch, side = trained(Patch(SMALL)), torch.randn(1, 59, 1, 10, requires_grad=True)
    out = patch(torch.randn(1, 32, 4, 12), side)
    steps_of = {0: [0, 1], 1: [2, 3], 26: [52, 53], 27: [54], 31: [58]}
    for frame, steps in steps_of.items():
        (grad,) = torch.autograd.grad(out[0, frame].sum(), side, retain_graph=True)
        assert grad[0, :, 0].abs().sum(-1).nonzero().flatten().tolist() == steps
        assert partition_steps(59, 32)[frame].tolist() == steps


def test_a_batch_gives_what_one_by_one_gives_whatever_the_lengths():
    patch, video, longest = trained(Patch(SMALL)), torch.randn(3, 8, 4, 12), 21
    sides = [torch.randn(steps, 2, 10) for steps in (8, longest, 5)]
    alone = [patch(video[i : i + 1], side[None]) for i, side in enumerate(sides)]
    padded = torch.full((3, longest, 2, 10), 7.0)
    for i, side in enumerate(sides):
        padded[i, : len(side)] = side
    together = patch(video, padded, [len(side) for side in sides])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_short_side_channel_is_interpolated():
    x = torch.arange(29.0)[:, None, None]
    longer = interpolate_time(x, 32)
    assert torch.allclose(longer[[0, 31]], x[[0, 28]])
    assert longer.diff(dim=0).std() < 1e-5


def test_the_order_of_the_side_tokens_of_a_frame_means_nothing():
    patch, video, side = trained(Patch(SMALL)), torch.randn(1, 4, 4, 12), torch.randn(1, 8, 3, 10)
    torch.testing.assert_close(patch(video, side), patch(video, side.flip(2)), atol=1e-5, rtol=1e-5)


def test_rotary_positions_need_square_grids_and_wide_heads():
    with pytest.raises(ModelError, match="square grids and heads of 128"):
        Patch(replace(SMALL, rope=True))(torch.randn(1, 4, 4, 12), torch.randn(1, 8, 3, 10))


def test_patches_add_to_each_video_what_they_find_in_its_side_channels():
    """z' = z + g(v, s), for videos of two shapes with none, one or two side channels."""
    patches = Patches()
    for name in ("audio", "depth"):
        patches[name] = trained(Patch(SMALL))
    videos = [torch.randn(frames, 4, 12) for frames in (4, 4, 3, 4)]
    tokens = [torch.randn(len(video), 4, 16) for video in videos]
    mask = torch.ones(9, 3, dtype=torch.bool)
    mask[:, 2] = False
    side_a, side_b = torch.randn(9, 3, 10), torch.randn(2, 5, 10)
    sides = [
        {"audio": (side_a, mask), "depth": (side_b, None)},
        {"depth": (side_a, None), "smell": (side_b, None)},  # there is no patch for smell
        {"audio": (side_b, None)},
        {},
    ]
    patched = patches.add_to(tokens, videos, sides)
    assert patched[3] is tokens[3]
    for i in range(3):
        expected = tokens[i]
        for name in sides[i].keys() & patches.keys():
            side, valid = sides[i][name]
            valid = None if valid is None else valid[None]
            expected = expected + patches[name](videos[i][None], side[None], None, valid)[0]
        torch.testing.assert_close(patched[i], expected, atol=1e-5, rtol=1e-5)


# --- in the models --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shows(tmp_path_factory):
    """The folder of a small world of clips, with questions about every side channel."""
    cache = tmp_path_factory.mktemp("shows")
    for name in CHANNELS:
        build_side_world("", 8, 4, 0, [name], cache)
    return build_side_world("", 8, 4, 0, ["audio", "fast"], cache).parents[1]


def samples_of(shows, name, split="train"):
    rows = read_samples(shows / name / f"{split}.jsonl", [], split)
    return add_side_channels(rows, name.split("+"))


def batch_of(model, samples):
    features = Features(model)
    features.prepare(samples)
    targets = [s.target or "<answer> dog</answer>" for s in samples]
    return model.collate([s.parts for s in samples], features(samples), targets)


def add_patch(model, name, side_width, layers=2):
    model.add_side_channel(name, side_width, SideChannelConfig(width=32, layers=layers))


def test_a_new_patch_changes_nothing_and_one_that_is_taken_off_leaves_nothing(shows):
    model, samples = load_base(), samples_of(shows, "audio")[:3]
    batch = batch_of(model, samples)
    before = model.token_losses(batch)
    # a model without the patch does not read the side channel
    assert torch.equal(before, model.token_losses(batch_of(model, add_side_channels(samples, []))))
    add_patch(model, "audio", 128)
    assert torch.equal(model.token_losses(batch), before)
    trained(model.patches["audio"])
    assert not torch.equal(model.token_losses(batch), before)
    del model.patches["audio"]
    assert torch.equal(model.token_losses(batch), before)


@pytest.mark.parametrize("backbone", ["composed", "omni", "llava_onevision"])
@pytest.mark.parametrize("side", ["", "audio", "fast", "depth", "view"])
def test_a_step_of_every_adapter_side_channel_and_backbone(shows, side, backbone):
    """The model is loaded and the clips are encoded once for the three adapters."""
    base = load_model(BackboneConfig(backbone=backbone, weights="tiny-random"))
    samples = samples_of(shows, side or "audio")[:2]
    if not side:
        samples = add_side_channels(samples, [])
    batch = batch_of(base, samples)
    if side:
        width = batch.media[0].sides[side].features.shape[-1]

    for adapter in ("ilora", "lora", "none"):
        if not side and adapter == "none":
            continue
        model = copy.deepcopy(base)
        model.add_adapter(AdapterConfig(adapter=adapter, r=2, alpha=4))
        if side:
            add_patch(model, side, width, layers=1)
            trained(model.patches[side])
        model.set_trainable(["adapter"])
        # Qwen2.5-Omni takes sound itself, and has no features of a second view
        if backbone == "omni" and side in ("audio", "depth", "view"):
            with pytest.raises(ModelError, match=f"patch {side}: this model's encoder gives no"):
                model(batch)
            continue

        loss = model(batch)
        (loss / batch.answer_tokens).backward()
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert loss.isfinite() and learned
        assert all(p.grad is not None for p in learned.values())
        expected = {"patches"} if side else set()
        if adapter != "none":
            expected.add("llm")
        assert {name.split(".")[0] for name in learned} == expected
        assert len(model.generate(batch, 3)) == 2


def test_the_likeliest_option_is_chosen(shows):
    model, samples = load_base(), samples_of(shows, "fast", "test")
    features = Features(model)
    features.prepare(samples)
    predictions = rank_options(model, samples, features(samples), TokenBudget())
    for sample, text in zip(samples, predictions):
        losses = []
        for option in options(sample):
            batch = model.collate([sample.parts], features([sample]), [option])
            losses.append(model.token_losses(batch).sum().item())
        assert text == options(sample)[int(np.argmin(losses))]


# --- as a file ------------------------------------------------------------------------------------
RUN = "pave-tiny --steps 2 --batch-size 4 --world-clips 8 --world-test 4"


def run_train(command: str) -> int:
    return train.main(command.split())


def test_a_comparison_with_lora_and_two_patches_trained_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train(f"{RUN} --side audio") == 0
    printed = capsys.readouterr().out.splitlines()
    header = "questions about chance base LoRA alone with the patch n"
    assert printed[-2].split() == header.split() and printed[-1].startswith("audio")
    # both runs are there: the table again, nothing is trained
    assert run_train(f"{RUN} --side audio") == 0
    assert capsys.readouterr().out.splitlines() == printed[-2:]
    assert not Path("runs/pave-tiny-audio-2").exists()

    # the patch of another run can be added
    assert run_train(f"{RUN} --side fast --no-compare-lora") == 0
    audio, fast = Path("runs/pave-tiny-audio"), Path("runs/pave-tiny-fast")
    model = load_base()
    questions = samples_of(Path(next(Path("data/world").glob("sides-*"))), "audio")
    for run, name in ((audio, "audio"), (fast, "fast")):
        model.load_patch(run / "parts" / f"patch_{name}.safetensors")
        trained(model.patches[name])
    assert model.side_names == ["audio", "fast"]
    batch = batch_of(model, questions)
    both = model.token_losses(batch)
    del model.patches["fast"]
    assert torch.equal(model.token_losses(batch), both)  # these clips have no dense stream
    other = str(fast / "parts/patch_fast.safetensors")
    assert infer.main(["--json", "--run", str(audio), "--patch", other]) == 0

    # a run without its side channel, and channels that are not there
    assert infer.main(["--run", str(audio), "--eval", "--side", "none"]) == 0
    assert json.loads((audio / "eval_test/decoding.json").read_text())["sides"] == []
    assert run_train(f"{RUN} --side smell") == 2
    known = "--side smell: the built-in world has the side channels audio, fast"
    assert known in capsys.readouterr().err
    assert infer.main(["--run", str(audio), "--side", "depth"]) == 2
    assert "--side depth" in capsys.readouterr().err


def test_two_side_channels_in_one_run_each_sample_through_its_own(shows, tmp_path):
    run, data = tmp_path / "run", shows / "audio+fast" / "train.jsonl"
    assert run_train(f"{RUN} --side audio,fast --no-compare-lora --data {data} --out {run}") == 0
    assert {file.stem for file in (run / "parts").iterdir()} == {"patch_audio", "patch_fast"}
    channels = [{p.side for p in s.media if p.side} for s in samples_of(shows, "audio+fast")]
    assert {frozenset(names) for names in channels} == {frozenset({"audio"}), frozenset({"fast"})}
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]["own"]["types"]) == {"audio", "fast"}


def test_a_patch_comes_back_from_its_file_and_from_that_of_earlier_versions(tmp_path):
    model = load_base()
    config = SideChannelConfig(width=32, layers=1, shared_kv=True)
    model.add_side_channel("audio", 12, config)
    trained(model.patches["audio"])
    model.save_trained(tmp_path)
    patch = model.patches["audio"]
    old = {"patch": json.dumps(asdict(patch.config))}
    (tmp_path / "patches").mkdir()
    save_file(patch.state_dict(), tmp_path / "patches/audio.safetensors", old)
    for file in ("parts/patch_audio.safetensors", "patches/audio.safetensors"):
        other = load_base()
        other.load_patch(tmp_path / file)
        assert other.patches["audio"].config == patch.config
        for key, value in patch.state_dict().items():
            assert torch.equal(other.patches["audio"].state_dict()[key], value)


def test_a_patch_of_another_model_and_what_is_no_patch_are_refused(tmp_path):
    model = load_base()
    model.patches["depth"] = Patch(PatchConfig(12, 1, 16, 32))
    model.save_trained(tmp_path)
    other = "a patch for video tokens 12 wide and an LM of 16; this model has 128 and 192"
    with pytest.raises(ModelError, match=other):
        load_base().load_patch(tmp_path / "parts/patch_depth.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for file in ("no.safetensors", "none.safetensors"):
        with pytest.raises(ModelError, match="not a patch"):
            model.load_patch(tmp_path / file)


def test_arrays_of_the_wrong_shape_and_missing_side_channels_are_named(shows, tmp_path):
    wrong = {
        "flat": np.zeros(7),
        "nan": np.full((4, 2), np.nan),
        "deep": np.zeros((2, 2, 2, 2, 2)),
    }
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(MediaError, match=f"{name}.npy: an array of shape"):
            read_array(str(tmp_path / f"{name}.npy"), 10, 32)
    torch.save({"x": torch.zeros(5, 3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    assert read_array(str(tmp_path / "x.pt"), 10, 32).shape == (5, 1, 3)
    (tmp_path / "broken.pt").write_bytes(b"PK")
    with pytest.raises(MediaError, match="broken.pt: not one array"):
        read_array(str(tmp_path / "broken.pt"), 10, 32)

    rows = read_samples(shows / "audio" / "train.jsonl", [], "train")
    with pytest.raises(DataError, match="own/train/0.*; view want one video"):
        add_side_channels(rows, ["view"])
    model, samples = load_base(), samples_of(shows, "depth")[:2]
    add_patch(model, "depth", 5)
    with pytest.raises(ModelError, match="patch depth: reads side tokens 5 wide, got .128."):
        model.token_losses(batch_of(model, samples))


# --- LLaVA-OneVision ------------------------------------------------------------------------------
def test_llava_trains_answers_and_goes_to_released_names_and_back(
    small_world, tmp_path, monkeypatch
):
    run, back, file = tmp_path / "run", tmp_path / "again", tmp_path / "non_lora_and_lora.bin"
    # released patches have no projection of values
    values = PRESETS["pave-0.5b"].values | {"patch_width": 32, "patch_shared_kv": True}
    monkeypatch.setattr(PRESETS["pave-0.5b"], "values", values)
    command = (
        "pave-0.5b --weights tiny-random --steps 2 --batch-size 2 --test-rows 2 --r 4 "
        f"--frames 4 --data {small_world} --out {run}"
    )
    assert run_train(command) == 0
    clip = str(next((small_world / "ave" / "video").glob("*.mp4")))
    ask = ["--json", clip, "--ask", "What is heard?", "--max-new-tokens", "4"]
    assert infer.main(["--run", str(run), *ask]) == 0

    write_released("pave", run, file)
    names = set(read_checkpoint(file))
    aggregator = "base_model.model.model.temporal_aggregator"
    assert f"{aggregator}.cross_attn_layers.0.attn.k_linear.weight" in names
    adapter = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    assert any(name.startswith(adapter) for name in names)

    assert convert_main(["pave", str(file), "--out", str(back), "--preset", "pave-0.5b"]) == 0
    before, after = (weights_of(folder) for folder in (run, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = load_saved_run(back).settings
    assert (settings.adapter.r, settings.adapter.alpha) == (4, 16)
    assert (settings.patch.side, settings.adapter.adapter) == ("audio", "lora")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run folder by part and name."""
    weights = load_file(run / "adapter/adapter_model.safetensors")
    for part in read_parts(run):
        weights |= {f"{part.name}/{key}": value for key, value in part.state.items()}
    return weights


# --- the clips of the built-in world --------------------------------------------------------------
def test_ten_frames_of_a_show_do_not_tell_when_the_light_flashes(shows):
    renderer = Renderer()
    for index in range(4):
        scene, marked = make_show(renderer, "test", index, 0)
        file = shows / f"{scene.name}.mp4"
        video = read_video(file, 10, None).frames.astype(float)
        still = renderer.frames(scene, np.arange(10) + 0.5)
        assert np.abs(video - still).mean() < 6  # a flash would make the difference larger

        dense = read_video(file, 250, None).frames.astype(float)
        brightness = dense.mean((1, 2, 3))
        flash = np.flatnonzero(np.abs(brightness - np.median(brightness)) > 20) / 25  # seconds
        start, end = scene.objects[marked["fast"]].seen[0]
        assert 3 <= len(flash) <= 4 and start <= flash[0] and flash[-1] < end
        seen = [o.seen for o in scene.objects[:INTERVALS]]
        assert seen == [o.heard for o in scene.objects[INTERVALS:]]


def test_answers_of_the_shows_are_one_in_four_and_the_same_each_time(shows, tmp_path):
    for name in CHANNELS:
        for line in (shows / name / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert len(set(row["options"])) == INTERVALS
            answer = row["messages"][1]["content"]
            assert answer.removeprefix("<answer> ").removesuffix("</answer>") in row["options"]
    shutil.copytree(shows / "audio", tmp_path / "before")
    again = build_side_world("", 8, 4, 0, ["audio"], shows.parent)
    assert again.read_text() == (tmp_path / "before" / "train.jsonl").read_text()


def test_the_kind_of_a_side_channel_follows_from_its_file():
    assert side_part("view", "x_view.mp4", [], []).kind == "view"
    assert side_part("depth", "x.npy", [], []).kind == "array"
