"""CREMA in a model: modalities come and go, training in sequence, runs, released names."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from released import write_released
from safetensors.torch import load_file, save_file
from torch import nn

import infer
import train
from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, BackboneConfig, ModalityConfig
from crab_min.data import load_media, read_samples
from crab_min.encoders import ENCODERS, MediaFeatures, VisionEncoder, register
from crab_min.errors import ModelError
from crab_min.evaluation.answering import options, rank_options
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import Features
from crab_min.runs.folder import load_saved_run
from crab_min.side_channels import add_side_channels, count_missing, limit_frames
from crab_min.tools.convert import main as convert_main
from crab_min.tools.released.weights import read_checkpoint
from crab_min.trained_parts import read_parts
from crab_min.world.side_channels import CHANNELS, build_side_world

NAMES = ["audio", "flow", "depth", "normals", "thermal", "touch", "points"]
CONFIG = ModalityConfig(modality_rank=4)
RUN = (
    "crema-tiny --modality-sequential --world-clips 8 --world-test 2 --batch-size 4 "
    "--save-every 2 --modality-rank 4"
)


@pytest.fixture(scope="module")
def shows(tmp_path_factory):
    """train.jsonl of a small world whose rows have all of CREMA's modalities."""
    return build_side_world("", 8, 2, 0, NAMES, tmp_path_factory.mktemp("shows"), together=True)


def load_blip2(weights):
    return load_model(BackboneConfig(backbone="blip2", weights=weights))


def samples_of(shows, names, split="train"):
    rows = read_samples(shows.with_name(f"{split}.jsonl"), [], split)
    return limit_frames(add_side_channels(rows, names), 5)


def with_modalities(model, samples, names, config=CONFIG):
    """Add modalities to a model, as if trained: B and the fusion are not zero.

    Returns:
        The features of the samples.
    """
    features = Features(model)
    features.prepare(samples)
    model.add_adapter(AdapterConfig(adapter="none"))
    model.configure(config)
    for name in names:
        model.add_side_channel(name, width_of(name, samples, features), config)
    for pair in model.multimodal.adapted_linears():
        for B in pair.B.values():
            nn.init.normal_(B.weight, std=0.1)
    if model.fusion is not None:
        nn.init.normal_(model.fusion.linear.weight, std=0.02)
    model.set_trainable([])
    return features


def width_of(name, samples, features):
    """Return the width of a modality's features."""
    for sample in samples:
        for part, medium in zip(sample.media, features([sample])[0]):
            if part.side == name:
                return medium.features.shape[-1]


def batch_of(model, features, samples):
    targets = [sample.target or "<answer> dog</answer>" for sample in samples]
    return model.collate([sample.parts for sample in samples], features(samples), targets)


def changed(before: dict, after: dict) -> set[str]:
    """Return the names of weights that are new or have other values."""
    names = set()
    for name, value in after.items():
        if name not in before or not torch.equal(before[name], value):
            names.add(name)
    return names


def run_train(command: str, *more: str) -> int:
    """Run train.py; return its exit code.

    Args:
        more: arguments that may have spaces, as the names of the built-in world's folders do.
    """
    try:
        return train.main([*command.split(), *more])
    except SystemExit as refused:
        return refused.code


# --- in the model ---------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["", "tiny-random"])
def test_a_fresh_modality_changes_nothing_where_it_is_added(shows, weights):
    """And the tokens of a prompt do not grow with the number of modalities."""
    model, bare = load_blip2(weights), samples_of(shows, [])[:2]
    features = Features(model)
    batch = batch_of(model, features, bare)
    before, length, lengths = model.token_losses(batch), batch.ids.shape[1], []
    model.configure(CONFIG)
    for i, name in enumerate(NAMES):
        samples = samples_of(shows, NAMES[: i + 1])[:2]
        model.add_side_channel(name, width_of(name, samples, features))
        model.fusion_mode = "add"
        assert torch.equal(model.token_losses(batch_of(model, features, samples)), before)
        model.fusion_mode = "concat"
        lengths.append(batch_of(model, features, samples).ids.shape[1])
    assert set(lengths) == {lengths[0]}
    assert lengths[0] > length


@pytest.mark.parametrize("fusion", ["add", "concat"])
@pytest.mark.parametrize("weights", ["", "tiny-random"])
def test_a_step_on_a_modality_changes_it_and_the_fusion_alone(shows, weights, fusion):
    names = ["audio", "flow", "points"]
    model, samples = load_blip2(weights), samples_of(shows, names)[:3]
    config = ModalityConfig(fusion=fusion, modality_rank=4)
    features = with_modalities(model, samples, names, config)
    model.train()
    for name in ["rgb", *names]:
        before = copy.deepcopy(model.state_dict())
        model.set_active_modalities([name])
        batch = batch_of(model, features, samples)
        (model(batch) / batch.answer_tokens).backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(p.grad is not None for p in learned)
        assert all(p.grad is None for p in frozen)
        assert model.gradient_norm(name) > 0

        torch.optim.AdamW(learned, lr=1e-2).step()
        model.zero_grad()
        own = {f"multimodal.{key}" for key in model.multimodal.parameters_of(name)}
        fused = {"fusion.linear.weight", "fusion.linear.bias"}
        assert changed(before, model.state_dict()) <= own | fused

    model.eval()
    batch = batch_of(model, features, samples)
    assert len(model.generate(batch, 3, beams=2)) == 3
    texts = rank_options(model, samples, features(samples), TokenBudget())
    assert all(text in options(sample) for sample, text in zip(samples, texts))


def test_frozen_tokens_of_the_passes_of_a_batch_change_no_loss(shows):
    """Modality-sequential updates give the same losses with and without shared tokens."""
    names = ["flow", "depth"]
    losses = {}
    for shared in (True, False):
        torch.manual_seed(0)
        model, samples = load_blip2(""), samples_of(shows, names)[:4]
        features = with_modalities(model, samples, names)
        batch = batch_of(model, features, samples)
        model.train()
        losses[shared] = sequential_losses(model, batch, ["rgb", *names, "rgb"], shared)
        assert model.cached_tokens is None  # outside of a step nothing is kept
    assert losses[True] == losses[False]


def sequential_losses(model, batch, names, shared):
    """Make one update per name on one batch; return the loss before each."""
    losses = []
    with model.frozen_tokens():
        for name in names:
            model.set_active_modalities([name])
            if not shared:
                model.cached_tokens.clear()
            loss = model(batch)
            losses.append(loss.item())
            loss.backward()
            torch.optim.SGD(model.modality_parameters(name), lr=1e-3).step()
            model.zero_grad()
            if shared:
                assert name not in model.cached_tokens
                assert len(model.cached_tokens) >= 2
    return losses


def test_in_training_a_sample_may_go_without_some_modalities(shows):
    names = ["flow", "depth"]
    model, samples = load_blip2(""), samples_of(shows, names)
    config = ModalityConfig(modality_rank=4, modality_dropout=0.5)
    features = with_modalities(model, samples, names, config)
    model.train()
    sides = [len(medium.sides) for medium in batch_of(model, features, samples).media]
    assert 0 < sum(sides) < 2 * len(samples)
    model.eval()
    assert all(len(medium.sides) == 2 for medium in batch_of(model, features, samples).media)


def test_a_clip_without_a_modality_has_zeros_in_its_place_and_is_counted(shows):
    names = ["flow", "depth"]
    model, whole = load_blip2(""), samples_of(shows, names)[:2]
    features = with_modalities(model, whole, names)
    samples = [whole[0], samples_of(shows, ["flow"])[1]]
    assert count_missing(samples, names) == {"flow": 0, "depth": 1}

    media = batch_of(model, features, samples).media
    lengths = [len(medium.features) for medium in media]
    fused = model.fuse(media)
    flow = model.encode_modality("flow", [media[1].sides["flow"]])
    expected = model.fusion({"flow": flow, "depth": torch.zeros_like(flow)})
    torch.testing.assert_close(fused[lengths[0] :], expected)
    nothing = model.fuse([replace(medium, sides={}) for medium in media])
    assert torch.equal(nothing[0], nothing[-1])


def test_a_modality_without_its_adapter_is_as_the_frozen_qformer_gives_it(shows):
    model, samples = load_blip2(""), samples_of(shows, ["flow"])[:2]
    features = with_modalities(model, samples, ["flow"])
    batch = batch_of(model, features, samples)
    adapted = model.token_losses(batch)
    model.skipped_modalities = {"flow"}
    skipped = model.token_losses(batch)
    assert not torch.equal(adapted, skipped)

    for pair in model.multimodal.adapted_linears():
        pair.B["flow"].weight.data.zero_()
    model.skipped_modalities = set()
    assert torch.equal(model.token_losses(batch), skipped)


def test_a_new_modality_leaves_all_others_bit_for_bit(shows):
    model, samples = load_blip2(""), samples_of(shows, ["flow"])[:2]
    features = with_modalities(model, samples, ["flow"])
    batch = batch_of(model, features, samples)
    losses, before = model.token_losses(batch), copy.deepcopy(model.state_dict())
    model.add_side_channel("sonar", 12)
    new = {name for name in changed(before, model.state_dict()) if "sonar" not in name}
    assert new == {"fusion.linear.weight"}
    width = before["fusion.linear.weight"].shape[1]
    assert torch.equal(model.fusion.linear.weight[:, :width], before["fusion.linear.weight"])
    assert not model.fusion.linear.weight[:, width:].any()
    torch.testing.assert_close(model.token_losses(batch), losses, atol=1e-5, rtol=1e-5)


def test_modalities_that_there_are_not_and_features_of_another_width_are_named(shows):
    model = load_blip2("")
    model.configure(CONFIG)
    model.add_side_channel("flow", 20)
    with pytest.raises(ModelError, match="'lidar': not in this model, which has rgb, flow"):
        model.set_active_modalities(["rgb", "lidar"])
    with pytest.raises(ModelError, match="this backbone takes no patches"):
        model.load_patch("patch_audio.safetensors")
    samples = samples_of(shows, ["flow"])[:1]
    wrong = r"modality 'flow': wants features \(samples, steps, tokens, 20\), got .*128"
    with pytest.raises(ModelError, match=wrong):
        model.token_losses(batch_of(model, Features(model), samples))


# --- an encoder of one's own ----------------------------------------------------------------------
class Sonar(nn.Module):
    """The brightness of each quarter of a picture, in three colours."""

    width = 12

    def forward(self, frames):
        x = frames.float() / 255  # (B, T, H, W, 3)
        h, w = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * h, : 2 * w].unflatten(3, (2, w)).unflatten(2, (2, h))
        x = x.mean((3, 5))  # (B, T, 2, 2, 3)
        return x.flatten(2)[:, :, None].expand(-1, -1, 2, -1)  # (B, T, 2, 12)


@pytest.fixture
def sonar():
    register("sonar", Sonar())
    yield
    del ENCODERS["sonar"]


def test_a_modality_that_a_user_registers_trains_and_is_saved(shows, tmp_path, sonar, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["audio", "flow", "depth", "thermal", "sonar"]
    modalities = ",".join(["rgb", *names])
    command = f"{RUN} --test-rows 4 --steps 2 --modalities {modalities} --out run"
    assert run_train(command, "--data", str(shows)) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["missing"]["sonar"] == 0

    model = load_blip2("")
    model.load_trained("run")
    assert model.side_names == names
    features = Features(model)
    with_sonar = batch_of(model, features, samples_of(shows, names)[:2])
    without = batch_of(model, features, samples_of(shows, names[:-1])[:2])
    losses = model.token_losses(with_sonar), model.token_losses(without)
    assert not torch.allclose(*losses, atol=1e-4)


def test_an_encoder_that_cannot_be_used_is_named(sonar, shows):
    with pytest.raises(ModelError, match="encoder of 'lidar': give a torch module with a `width`"):
        register("lidar", lambda x: x)
    ENCODERS["sonar"].width = 13
    samples = samples_of(shows, ["sonar"])[:1]
    wrong = "encoder of 'sonar': gave .1, 5, 2, 12. for .*; its width is 13"
    with pytest.raises(ModelError, match=wrong):
        Features(load_blip2("")).prepare(samples)


def test_blip2s_vision_model_gives_its_class_token_and_no_last_norm():
    config = {
        "model_type": "blip_2_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    vision = VisionEncoder(config, layer=-1).eval()
    frames = torch.randint(0, 255, (1, 2, 28, 28, 3), dtype=torch.uint8)
    with torch.no_grad():
        x = vision(frames)
        expected = vision.model(vision.pixels(frames[0])).last_hidden_state
        assert x.shape == (1, 2, vision.tokens, 16) and vision.tokens == 5
        torch.testing.assert_close(vision.model.post_layernorm(x[0]), expected)


# --- training in sequence -------------------------------------------------------------------------
def test_a_run_ends_when_every_modality_has_exited(shows, tmp_path, monkeypatch):
    """Epochs of two steps, and a threshold at which all exit as early as they may."""
    monkeypatch.chdir(tmp_path)
    rows = shows.read_text().splitlines()[:8]
    data = shows.with_name("few.jsonl")
    data.write_text("\n".join(rows) + "\n")
    command = (
        f"{RUN} --modalities rgb,flow,depth --steps 20 --exit-threshold .01 --save-every 12 "
        "--out run"
    )
    assert run_train(command, "--data", str(data)) == 0
    log = Path("run/log.csv").read_text().splitlines()[1:]
    assert ["rgb+flow+depth" in line for line in log] == [True] * 12  # six epochs
    exits = json.loads(Path("run/exits.json").read_text())["exits"]
    assert exits == {"rgb": 5, "flow": 5, "depth": 5}


def test_a_killed_sequential_run_goes_on_as_if_it_had_not_stopped(shows, tmp_path, monkeypatch):
    from crab_min import trainer

    monkeypatch.chdir(tmp_path)
    command = f"{RUN} --test-rows 2 --steps 4 --modalities rgb,flow,depth --no-bf16"
    data = ["--data", str(shows), "--out"]
    assert run_train(command, *data, "whole") == 0
    save = trainer.save_checkpoint

    def save_and_kill(folder, progress, *rest):
        save(folder, progress, *rest)
        if progress.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_kill)
    assert run_train(command, *data, "cut") == 130
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    assert run_train(command, *data, "cut") == 0
    assert_same_parts(Path("whole"), Path("cut"))
    assert Path("whole/exits.json").read_text() == Path("cut/exits.json").read_text()


def assert_same_parts(one: Path, other: Path) -> None:
    before, after = ({part.name: part for part in read_parts(run)} for run in (one, other))
    assert before.keys() == after.keys()
    for name, part in before.items():
        assert part.config == after[name].config
        assert part.state.keys() == after[name].state.keys()
        for key, value in part.state.items():
            assert torch.equal(value, after[name].state[key]), (name, key)


# --- runs and files -------------------------------------------------------------------------------
def test_crema_xl_trains_answers_and_goes_to_released_names_and_back(small_world, tmp_path, capsys):
    run, back, file = tmp_path / "run", tmp_path / "again", tmp_path / "crema.pth"
    command = (
        "crema-xl --weights tiny-random --steps 2 --batch-size 2 --test-rows 2 --modality-rank 4 "
        f"--modalities rgb,audio,flow --data {small_world} --out {run}"
    )
    assert run_train(command) == 0
    clip = str(next((small_world / "ave" / "video").glob("*.mp4")))
    ask = ["--run", str(run), clip, "--ask", "What is heard?", "--max-new-tokens", "4"]
    assert infer.main([*ask, "--json", "--beams", "3", "--skip", "audio"]) == 0
    assert infer.main([*ask, "--json", "--side", "flow"]) == 0
    capsys.readouterr()
    assert infer.main([*ask, "--skip", "depth"]) == 2
    assert "--skip depth" in capsys.readouterr().err
    assert infer.main([*ask, "--side", "depth"]) == 2
    assert "--side depth" in capsys.readouterr().err

    write_released("crema", run, file)
    released = read_checkpoint(file)
    layer = "Qformer.bert.encoder.layer.1"
    assert {
        "query_tokens_flow",
        "t5_proj_rgb.weight",
        "fusion.0.weight",
        f"{layer}.attention.self.value.w_a_audio.weight",
    } <= released.keys()
    assert convert_main(["crema", str(file), "--side", "rgb,audio,flow", "--out", str(back)]) == 0
    before = {part.name: part for part in read_parts(run)}
    after = {part.name: part for part in read_parts(back)}
    files = {file.stem for file in (back / "parts").iterdir()}
    assert files == after.keys() and not list(back.glob("*.safetensors"))
    assert after.keys() - before.keys() <= {"shared_qformer"}
    for name, part in before.items():
        released = {"aligned": False} if name == "fusion" else {}
        assert after[name].config == part.config | released
        for key, value in part.state.items():
            assert torch.equal(value, after[name].state[key]), (name, key)
    assert load_saved_run(back).settings.crema.modalities == "rgb,audio,flow"
    model = load_blip2("tiny-random")
    model.load_trained(back)
    assert model.side_names == ["audio", "flow"] and not model.aligned


def test_released_files_that_lack_a_modality_are_refused_and_without_a_fusion_not_fused(
    tmp_path, capsys
):
    model = load_blip2("tiny-random")
    model.configure(CONFIG)
    for name in ("audio", "flow"):
        model.add_side_channel(name, 32)
    model.save_trained(tmp_path)
    write_released("crema", tmp_path, tmp_path / "whole.pth")
    released = read_checkpoint(tmp_path / "whole.pth")
    for name, absent in (("two", "_flow"), ("unfused", "fusion")):
        kept = {key: weight for key, weight in released.items() if absent not in key}
        torch.save(kept, tmp_path / f"{name}.pth")

    out = tmp_path / "out"
    cases = [
        ("two", "rgb,audio,flow", "flow lacks queries, norm, projection, adapter; whole in"),
        ("two", "rgb,audio", "a fusion of 2 modalities in these files"),
        ("two", "audio,rgb", "name rgb first, or one modality alone"),
    ]
    for name, sides, reason in cases:
        file = str(tmp_path / f"{name}.pth")
        assert convert_main(["crema", file, "--side", sides, "--out", str(out)]) == 2
        assert reason in capsys.readouterr().err
        assert not out.exists()

    command = ["crema", str(tmp_path / "unfused.pth"), "--side", "rgb,flow", "--out", str(out)]
    assert convert_main(command) == 0
    assert "no fusion in these files: rgb+flow in the prompt" in capsys.readouterr().out
    assert load_saved_run(out).settings.crema.fusion == "none"


# --- CREMA's zero-shot runs: no fusion ------------------------------------------------------------
JOINS = ["rgb", "rgb,audio", "rgb,points", "audio", "points"]


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory):
    """A released file of the zero-shot runs: no adapter of rgb, and no fusion."""
    folder = tmp_path_factory.mktemp("zero_shot")
    model = load_blip2("tiny-random")
    model.configure(ModalityConfig("rgb,audio,points", fusion="none", modality_rank=4))
    for name, width in (("audio", 128), ("points", 32)):
        model.add_side_channel(name, width)
    model.loaded_parts.add("shared_qformer")
    model.save_trained(folder)
    write_released("crema", folder, folder / "whole.pth")
    released = read_checkpoint(folder / "whole.pth")
    adapter = re.compile(r".*\.w_[ab]_rgb\.weight")
    kept = {name: weight for name, weight in released.items() if not adapter.fullmatch(name)}
    torch.save({"model": kept}, folder / "crema_pretrained.pth")
    return folder / "crema_pretrained.pth"


@pytest.mark.parametrize("sides", JOINS)
def test_each_join_of_the_zero_shot_runs_loads_and_answers(
    sides, zero_shot, small_world, tmp_path, capsys
):
    run = tmp_path / "run"
    command = ["crema", str(zero_shot), "--side", sides, "--out", str(run)]
    assert convert_main(command) == 0
    assert ("rgb has no adapter" in capsys.readouterr().out) == ("rgb" in sides)
    points = tmp_path / "points.npz"
    xyz = np.random.default_rng(0).integers(0, 256, (1, 20, 3))
    np.savez(points, xyz=xyz, features=np.ones((1, 20, 32), np.float32))
    clip = str(next((small_world / "ave" / "video").glob("*.mp4")))
    flags = ["--run", str(run), "--weights", "tiny-random", "--max-new-tokens", "2", "--json"]
    if "points" in sides:
        flags += ["--side", f"points={points}"]
    assert infer.main([clip, "What is heard?", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "avqa"


@pytest.mark.parametrize("sides", JOINS)
def test_the_tokens_of_a_join_stand_in_the_released_order(sides):
    model = load_blip2("tiny-random")
    model.choose_modalities(ModalityConfig(sides, fusion="none"))
    for name in ("audio", "points"):
        if name in sides:
            model.add_side_channel(name, 32)
            randomize(model.multimodal)
    features = {
        "rgb": MediaFeatures("video", torch.randn(2, 5, 32)),
        "audio": MediaFeatures("audio", torch.randn(2, 7, 32)),
        "points": MediaFeatures("points", torch.randn(1, 20, 32)),
    }
    names = sides.split(",")
    beside = {name: features[name] for name in names[1:]}
    medium = replace(features[names[0]], sides=beside)

    # [P_t, Z_t]_t, then a sound without words or points behind theirs; alone both are "Audio: "
    queries = [model.media_tokens["video"].placeholder] * 4
    frames = [["Frame 1: ", queries, "Frame 2: ", queries], []]["rgb" not in sides]
    sound, points = [queries, queries], ["3D Model: ", queries]
    expected = {
        "rgb": frames,
        "rgb,audio": [*frames, *sound],
        "rgb,points": [*frames, *points],
        "audio": ["Audio: ", *sound],
        "points": ["Audio: ", queries],
    }[sides]
    ids = []
    for piece in expected:
        ids += model.encode_text(piece) if isinstance(piece, str) else piece
    assert model.placeholder_ids(medium) == ids
    assert model.token_count(medium) == ids.count(queries[0])

    tokens = torch.cat([model.encode_modality(n, [features[n]]).flatten(0, 1) for n in names])
    torch.testing.assert_close(model.tokens([medium], [0])[0], tokens)


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter.data, std=0.2)


def test_points_skip_their_norm_where_the_release_does(zero_shot, tmp_path):
    run = tmp_path / "run"
    assert convert_main(["crema", str(zero_shot), "--side", "points", "--out", str(run)]) == 0
    model = load_blip2("tiny-random")
    model.choose_modalities(ModalityConfig("points", fusion="none"))
    model.load_trained(run)
    module = model.multimodal.module_of("points")
    assert not module.normed
    features = torch.randn(1, 1, 6, 32)
    without = model.multimodal("points", features)
    module.norm.weight.data.fill_(9)
    assert torch.equal(model.multimodal("points", features), without)
    module.normed = True
    assert not torch.equal(model.multimodal("points", features), without)


def test_a_converted_run_keeps_its_own_frozen_qformer(tmp_path):
    """Its weights are loaded, and saved again with what is trained from there on."""
    model = load_blip2("tiny-random")
    model.configure(CONFIG)
    model.add_side_channel("flow", 32)
    name = "qformer.encoder.layer.0.attention.attention.query.base.weight"
    frozen = model.part_state("shared_qformer")
    frozen[name].fill_(1)
    model.loaded_parts.add("shared_qformer")
    model.save_trained(tmp_path / "converted")

    other = load_blip2("tiny-random")
    other.load_trained(tmp_path / "converted")
    assert (other.part_state("shared_qformer")[name] == 1).all()
    other.save_trained(tmp_path / "next")
    saved = load_file(tmp_path / "next/parts/shared_qformer.safetensors")
    assert (saved[name] == 1).all() and saved.keys() == frozen.keys()


def test_the_form_of_earlier_versions_is_read(tmp_path):
    """All modalities and the fusion were in modalities.safetensors."""
    model = load_blip2("")
    model.configure(ModalityConfig(modality_rank=4, fusion="add"))
    for name, width in {"flow": 20, "audio": 8}.items():
        model.add_side_channel(name, width)
    state = {}
    for name in model.parts_to_save():
        prefix = "fusion" if name == "fusion" else "multimodal"
        state |= {f"{prefix}.{key}": value for key, value in model.part_state(name).items()}
    about = {
        "widths": {"rgb": 128, "flow": 20, "audio": 8},
        "fused": ["flow", "audio"],
        "join": "add",
        "aligned": False,
        "rank": 4,
    }
    file = tmp_path / "modalities.safetensors"
    save_file(state, file, {"crema": json.dumps(about)})
    other = load_blip2("")
    other.load_trained(tmp_path)
    assert other.side_names == ["flow", "audio"]
    assert other.fusion_mode == "add" and not other.aligned
    assert not changed(other.state_dict(), model.state_dict())

    unfused = {key: value for key, value in state.items() if "fusion" not in key}
    save_file(unfused, file, {"crema": json.dumps(about)})
    with pytest.raises(ModelError, match="fusion: .* 2 missing .linear.bias, linear.weight"):
        load_blip2("").load_trained(tmp_path)
    save_file(state, file)
    with pytest.raises(ModelError, match="not the modalities of a run"):
        load_blip2("").load_trained(tmp_path)


def test_settings_that_cannot_be_are_named(shows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = [
        ("--modalities audio,rgb", "name rgb, the video, first"),
        ("--modalities rgb,flow,flow", "each other modality once"),
        ("--modalities rgb,sonar", "the built-in world has audio"),
        ("--modalities rgb,flow --backbone composed", "--backbone composed: modalities go"),
        ("--grad-accum 2", "--no-modality-sequential"),
    ]
    for flags, reason in cases:
        assert run_train(f"{RUN} --steps 1 {flags}") == 2
        assert reason in capsys.readouterr().err
    lidar = f"{RUN} --steps 1 --modalities rgb,lidar"
    assert run_train(lidar, "--data", str(shows)) == 2
    assert "no training row has the side channel lidar" in capsys.readouterr().err


# --- real clips -----------------------------------------------------------------------------------
def test_real_clips_have_flow_and_go_through_the_model(real_media):
    model = load_blip2("")
    rows = read_samples(real_media, ["ave", "avqa"], "train", limit=1)
    samples = limit_frames(add_side_channels(rows, ["audio", "flow"]), 5)
    features = with_modalities(model, samples, ["audio", "flow"])
    parts = [part for sample in samples for part in sample.media]
    assert {part.kind for part in parts} == {"video", "audio", "flow"}
    for part in parts:
        if part.side == "flow":
            pictures, _ = load_media(part, 96)
            assert pictures.shape == (5, 96, 96, 3)
            assert pictures.std() > 0  # something moves
    batch = model.collate([sample.parts for sample in samples], features(samples))
    assert len(model.generate(batch, 5)) == len(samples) == 2


def test_the_built_in_world_has_all_of_cremas_modalities():
    assert set(NAMES) < set(CHANNELS)
