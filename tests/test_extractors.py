"""tools.features: files of clips from tiny random models, which train a patch and a modality."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_encoders import BEATS, make_beats, published
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
    Sapiens2Config,
    Sapiens2ForNormalEstimation,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import train
from crab_min.media.arrays import read_array
from crab_min.media.write import write_video
from crab_min.tools import features
from crab_min.tools.extractors import Depth, cut_windows, gives_distance, pool_grid

CPU = torch.device("cpu")
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 37, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def depth_anything(metric: bool) -> DepthAnythingForDepthEstimation:
    sizes = {**VIT, "num_hidden_layers": 4, "patch_size": 14, "image_size": 28}
    backbone = Dinov2Config(
        **sizes, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            patch_size=14,
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            depth_estimation_type="metric" if metric else "relative",
        )
    )


def dpt() -> DPTForDepthEstimation:
    sizes = {**VIT, "num_hidden_layers": 4, "patch_size": 16}
    return DPTForDepthEstimation(
        DPTConfig(
            **sizes,
            is_hybrid=False,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
        )
    )


def glpn() -> GLPNForDepthEstimation:
    return GLPNForDepthEstimation(GLPNConfig(hidden_sizes=[16, 32, 40, 64], decoder_hidden_size=16))


def sapiens() -> Sapiens2ForNormalEstimation:
    head = {"upsample_out_channels": [16], "conv_out_channels": [8]}
    sizes = {**VIT, "num_key_value_heads": 2, "num_labels": 3, "head_config": head}
    return Sapiens2ForNormalEstimation(Sapiens2Config(**sizes))


def square(side: int) -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": side, "width": side})


# name of a test -> encoder, its random model, its processor, steps x tokens x width of a file
MODELS = {
    "clip": ("clip", lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)), None, (4, 16, 32)),
    "siglip": ("siglip", lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)), None, (4, 16, 32)),
    "depth_anything": ("depth", lambda: depth_anything(False), square(28), (4, 32, 32, 3)),
    "metric": ("depth", lambda: depth_anything(True), square(28), (4, 32, 32, 3)),
    "dpt": ("depth", dpt, square(32), (4, 32, 32, 3)),
    "glpn": ("depth", glpn, GLPNImageProcessor(), (4, 32, 32, 3)),
    "sapiens2": ("normals", sapiens, square(32), (4, 32, 32, 3)),
}


def save_model(folder, name: str) -> str:
    """Save a random model and its processor, as a folder of the hub has them."""
    _, make, processor, _ = MODELS[name]
    make().save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clips(tmp_path):
    """A folder with two videos with sound, one of them in a folder of its own."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), np.uint8)
    wave = np.sin(np.arange(40000) / 5).astype(np.float32) / 2  # 2.5 s
    (tmp_path / "clips/more").mkdir(parents=True)
    write_video(tmp_path / "clips/a.mp4", noise, wave, fps=5)
    write_video(tmp_path / "clips/more/b.mp4", noise[::-1], wave, fps=5)
    return tmp_path / "clips"


def extract(encoder: str, data, out, *more: str) -> int:
    command = ["--encoder", encoder, "--data", str(data), "--out", str(out), "--workers", "0"]
    return features.main([*command, "--device", "cpu", "--frames", "4", "--size", "32", *more])


# --- what the files hold --------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_files_of_each_kind_of_model(clips, tmp_path, name):
    encoder, _, _, expected = MODELS[name]
    out = tmp_path / "out"
    assert extract(encoder, clips, out, "--weights", save_model(tmp_path / "m", name)) == 0
    for clip in ("a", "b"):
        assert read_array(str(out / f"{clip}.npy"), 4, 32).shape == expected
    assert sorted(file.name for file in out.iterdir()) == ["a.npy", "b.npy", "features.json"]


def test_sound_by_beats_and_flow_without_weights(clips, tmp_path):
    weights = tmp_path / "beats.pt"
    torch.save(published(make_beats()), weights)
    assert extract("beats", clips, tmp_path / "sound", "--weights", str(weights)) == 0
    sound = read_array(str(tmp_path / "sound/a.npy"), 4, 32)
    assert sound.shape == (3, 48, BEATS["encoder_embed_dim"])  # 2.5 s: the last second is padded
    assert extract("flow", clips, tmp_path / "flow") == 0
    assert read_array(str(tmp_path / "flow/b.npy"), 4, 32).dtype == np.uint8


def test_near_is_bright_for_every_depth_model(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    for name, far_is_large in (("depth_anything", False), ("metric", True), ("glpn", True)):
        with torch.inference_mode():
            depth = Depth(save_model(tmp_path / name, name), CPU)
            raw = depth.estimate(frames, "predicted_depth")[:, 0].numpy()
            grey = depth(frames)
        assert gives_distance(depth.model.config) == far_is_large
        nearest = raw.argmin() if far_is_large else raw.argmax()
        assert grey.max() == grey.flat[nearest] == 255 and grey.min() == 0
    named = SimpleNamespace(model_type="dpt", name_or_path="facebook/dpt-dinov2-small-nyu")
    assert gives_distance(named)


def test_windows_of_sound_as_pave_cuts_them():
    """A minute has 59 windows of two seconds, one each second (crema_pave.md 3.3)."""
    wave = np.arange(60 * 16000, dtype=np.float32)
    windows = cut_windows(wave, length=2, step=1)
    assert windows.shape == (59, 32000)
    assert windows[58, 0] == 58 * 16000
    assert cut_windows(wave[:100], 2, 1).shape == (1, 32000)
    assert pool_grid(torch.arange(16.0)[None, :, None], 2)[0, :, 0].tolist() == [
        2.5,
        4.5,
        10.5,
        12.5,
    ]


# --- packages of others ---------------------------------------------------------------------------
def test_imagebind_and_languagebind_through_what_is_installed(clips, tmp_path, monkeypatch):
    """Stand-ins with the interface of both packages; their own code was never run here."""

    class Audio(torch.nn.Module):
        def forward(self, inputs):
            assert inputs["audio"].shape[1:] == (1, 128, 204)
            return {"audio": torch.ones(len(inputs["audio"]), 1024)}

    data, models = ModuleType("imagebind.data"), ModuleType("imagebind.models.imagebind_model")
    data.waveform2melspec = lambda wave, rate, bins, length: torch.zeros(1, bins, length)
    models.ModalityType = SimpleNamespace(AUDIO="audio")
    models.imagebind_huge = lambda pretrained: Audio()
    for module in (data, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert extract("imagebind", clips, tmp_path / "imagebind") == 0
    assert read_array(str(tmp_path / "imagebind/a.npy"), 4, 32).shape == (1, 1, 1024)

    class Vision(torch.nn.Module):
        def forward(self, pixel_values):
            assert pixel_values.shape == (1, 3, 8, 224, 224)
            states = torch.zeros(8, 257, 1024)
            states[:, 0] = 9  # the class token
            return SimpleNamespace(last_hidden_state=states)

    package = ModuleType("languagebind")
    model = SimpleNamespace(vision_model=Vision())
    package.LanguageBindVideo = SimpleNamespace(from_pretrained=lambda name: model)
    monkeypatch.setitem(sys.modules, "languagebind", package)
    assert extract("languagebind", clips, tmp_path / "languagebind") == 0
    tokens = read_array(str(tmp_path / "languagebind/a.npy"), 4, 32)
    assert tokens.shape == (5, 4, 1024) and not tokens.any()  # two frames a second of 2.4 s


# --- a command that can be stopped ----------------------------------------------------------------
def test_a_stopped_command_redoes_nothing(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract("flow", clips, out) == 0
    (out / "b.npy").unlink()
    written = (out / "a.npy").stat().st_mtime_ns
    (out / ".b.npy.tmp").write_bytes(b"half")  # as a killed command leaves it
    assert extract("flow", clips, out) == 0
    assert "2 clips, 1 of them done before" in capsys.readouterr().out
    assert (out / "a.npy").stat().st_mtime_ns == written and (out / "b.npy").exists()
    assert not (out / ".b.npy.tmp").exists()
    assert extract("flow", clips, out, "--size", "16") == 2
    assert "give another --out" in capsys.readouterr().err


def test_what_cannot_be_read_is_one_line(clips, tmp_path, capsys):
    def error_of(*arguments) -> str:
        try:
            assert extract(*arguments) == 2
        except SystemExit as refused:
            assert refused.code == 2
        return capsys.readouterr().err

    assert "invalid choice: 'sonar'" in error_of("sonar", clips, tmp_path / "1")
    assert "code is not installed" in error_of("imagebind", clips, tmp_path / "2")
    assert "no such folder" in error_of("flow", tmp_path / "nowhere", tmp_path / "3")
    (tmp_path / "empty").mkdir()
    assert "no video files in it" in error_of("flow", tmp_path / "empty", tmp_path / "4")
    missing = error_of("depth", clips, tmp_path / "5", "--weights", str(tmp_path / "gone"))
    assert "estimator" in missing and "cannot be loaded" in missing
    assert not (tmp_path / "5").exists()  # other weights may be named
    (clips / "c.mp4").write_bytes(b"no video")
    assert "1 of 3 clips have no file" in error_of("flow", clips, tmp_path / "6")
    assert (tmp_path / "6/a.npy").exists()
    shutil.copy(clips / "c.mp4", clips / "more/a.mp4")
    assert "have one name" in error_of("flow", clips, tmp_path / "7")


# --- the files train ------------------------------------------------------------------------------
def test_files_of_real_clips_train_a_patch_and_a_modality(real_media, tmp_path):
    """Sound as BEATs features and depth pictures of the real clips, named by --features."""
    weights = tmp_path / "beats.pt"
    torch.save(published(make_beats()), weights)
    assert extract("beats", real_media / "ave", tmp_path / "sound", "--weights", str(weights)) == 0
    model = save_model(tmp_path / "m", "dpt")
    assert extract("depth", real_media / "ave", tmp_path / "depth", "--weights", model) == 0

    short = "--steps 2 --batch-size 1 --no-baseline --workers 0 --tasks ave --data".split()
    folders = f"audio={tmp_path / 'sound'},depth={tmp_path / 'depth'}"
    command = [*short, str(real_media), "--features", folders, "--out"]
    patch = ["pave-tiny", "--no-compare-lora", "--side", "audio,depth", *command]
    assert train.main([*patch, str(tmp_path / "patch")]) == 0
    modality = ["crema-tiny", "--modalities", "rgb,audio,depth", *command]
    assert train.main([*modality, str(tmp_path / "modality")]) == 0
    for run in ("patch", "modality"):
        metrics = json.loads((tmp_path / run / "metrics.json").read_text())
        assert metrics["tasks"]["ave"]["n"] == 1 and not metrics["unreadable_files"]
