"""Devices and precision, as far as a CPU can tell: what a GPU runs in bfloat16, and where it is."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

import infer
import train
from crab_min import devices
from crab_min.backbones import load
from crab_min.cli import parse_train
from crab_min.devices import choose_device
from crab_min.errors import RunError
from crab_min.model import AVLanguageModel
from crab_min.recipes.presets import PRESETS
from crab_min.tools.loading import load_run
from crab_min.tools.measure import lm_linears
from crab_min.tools.plan import side_features
from crab_min.trainer import trained_parameters

# --- which device ---------------------------------------------------------------------------------


def test_pretrained_weights_want_a_gpu_or_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(
        RunError, match="some/lm: .* no NVIDIA GPU on this machine; give --device cpu"
    ):
        choose_device(weights="some/lm")
    assert choose_device("cpu", "some/lm") == torch.device("cpu")
    with pytest.raises(RunError, match="--device cuda: not on this machine, which has cpu"):
        choose_device("cuda")


def test_apple_s_gpu_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device().type == "cpu"
    assert choose_device("mps", "some/lm") == torch.device("mps")
    with pytest.raises(RunError, match="some/lm: .*--device mps uses Apple's GPU"):
        choose_device(weights="some/lm")
    # in float32: neither training nor answering is cast to bfloat16
    assert not devices.has_fast_bf16(torch.device("mps"))


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match="number of GPUs: 2.*driver is too old: update"):
        choose_device()
    assert choose_device("cpu") == torch.device("cpu")


def test_a_preset_of_real_weights_says_so_before_anything_is_loaded(capsys):
    assert train.main(["crab_plus-7b", "--data", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Qwen2.5-Omni-7B" in error and "--device cpu" in error


def test_a_run_without_a_baseline_has_no_scores_of_it_and_may_change_the_device(
    small_world, tmp_path
):
    command = f"--data {small_world} --tasks ks --test-rows 1 --steps 2 --batch-size 2"
    command = [*command.split(), "--no-baseline", "--out", str(tmp_path / "run")]
    assert train.main([*command, "--save-minutes", "0.0001"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["base"] == {} and "base" not in metrics["tasks"]["ks"]

    (tmp_path / "run" / "metrics.json").unlink()  # as if it was stopped before the end
    assert train.main([*command, "--device", "cpu"]) == 0


# --- precision ------------------------------------------------------------------------------------

TINY_RANDOM = {
    "composed": "crab_plus-tiny --weights tiny-random --trainable adapter,connectors",
    "masks": "crab-tiny --stage masks --weights tiny-random --text-steps 1 "
    "--trainable adapter,connectors,mask_decoder",
    "mask tokens": "crab-tiny --stage masks --weights tiny-random --text-steps 0 "
    "--trainable mask_decoder,mask_tokens",
    "omni": "crab_plus-7b --weights tiny-random",
    "llava_onevision": "pave-0.5b --weights tiny-random --frames 4",
    "blip2": "crema-xl --weights tiny-random --modality-rank 4",
}


# backbones and side channels, on which no tensor may stay behind on the CPU


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Run everything as on a GPU: pretrained weights in bfloat16, autocast, and sdpa.

    Yields:
        the models that are loaded.
    """
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(
        AVLanguageModel,
        "inference_autocast",
        lambda model: devices.bf16_autocast(model.device, model.bf16),
    )
    for module in ("qformer", "backbones.composed"):
        monkeypatch.setattr(f"crab_min.{module}.ATTENTION", "sdpa")
    load_model, loaded = load.load_model, []

    def in_bf16(*arguments, **options):
        model = load_model(*arguments, **options)
        model.llm.to(torch.bfloat16)
        if model.predicts_masks:
            model.mask_branch.float()  # its rows in the LM are new
        if "Crema" in type(model).__name__:
            model.vision.model.to(torch.bfloat16)
        loaded.append(model)
        return model

    monkeypatch.setattr(load, "load_model", in_bf16)
    return loaded


@pytest.mark.parametrize("backbone", TINY_RANDOM)
@pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--no-bf16"])
def test_every_backbone_trains_and_answers_in_the_precision_of_a_gpu(
    backbone, flag, as_on_a_gpu, small_world, tmp_path
):
    run = tmp_path / "run"
    tasks = "s4" if "mask" in backbone else "avqa"
    command = f"{TINY_RANDOM[backbone]} --data {small_world} --tasks {tasks} --test-rows 2"
    command += " --steps 2 --batch-size 2"
    assert train.main([*command.split(), flag, "--out", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["loss"]["last"] < 20 and metrics["tasks"][tasks]["n"] == 2

    split = ["--eval", "--data", str(small_world), "--tasks", tasks, "--test-rows", "2"]
    assert infer.main([*split, "--run", str(run), "--max-new-tokens", "4"]) == 0
    assert len(as_on_a_gpu) == 2
    for model in as_on_a_gpu:
        assert {linear.weight.dtype for linear in lm_linears(model)} == {torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in trained_parameters(model))


@pytest.mark.slow
def test_the_default_run_learns_the_same_in_bfloat16(as_on_a_gpu, small_world, tmp_path):
    """Thirty steps on the CPU, in float32 and as on a GPU: the loss within 2 %."""
    losses = []
    for name, flag in (("whole", "--no-bf16"), ("half", "--bf16")):
        command = f"--data {small_world} --steps 30 --test-rows 1 --no-baseline {flag}"
        assert train.main([*command.split(), "--out", str(tmp_path / name)]) == 0
        losses.append(json.loads((tmp_path / name / "metrics.json").read_text())["loss"]["last"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# --- placement ------------------------------------------------------------------------------------


def devices_of(model: AVLanguageModel) -> set[str]:
    return {p.device.type for p in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize(
    "command",
    [
        "crab_plus-tiny",
        "crab-tiny --stage masks",
        "pave-tiny --side audio,fast",
        "crema-tiny",
        "crab_plus-7b --weights tiny-random",
        "pave-7b --weights tiny-random",
        "crema-xl --weights tiny-random",
    ],
)
def test_what_learns_is_added_on_the_device_of_the_model(command):
    """The meta device stands for a GPU: a part that is made on the CPU would stay there."""
    given, settings = parse_train(command.split())
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[given.preset].recipe}")
    settings = recipe.run_settings(settings)
    sides = {}
    for name in settings.side_channels:
        medium = side_features(recipe.load_model(settings), recipe, settings, name)
        sides[name] = medium.features.shape[-1]

    model = recipe.load_model(settings).to("meta")
    recipe.add_trained_parts(model, settings, sides)
    for name in model.connectors[:2]:
        model.reset_connector(name)
    assert devices_of(model) == {"meta"}


def test_a_run_and_a_patch_are_loaded_onto_one_device(tmp_path, small_world, monkeypatch):
    run = tmp_path / "run"
    command = f"pave-tiny --side audio --data {small_world} --tasks avqa --test-rows 1 --steps 1"
    command += f" --batch-size 2 --no-baseline --no-compare-lora --out {run}"
    assert train.main(command.split()) == 0
    patch = run / "parts" / "patch_audio.safetensors"
    copy = patch.rename(tmp_path / "patch_audio.safetensors")

    monkeypatch.setattr("crab_min.tools.loading.choose_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr("torch.Tensor.copy_", lambda tensor, *_: tensor)  # no values to fill in
    loaded = load_run(str(run))
    loaded.model.load_patch(copy)
    assert "patch_audio" in loaded.model.trainable_modules()
    assert devices_of(loaded.model) == {"meta"}


# --- a device that is not the CPU, with real values ----------------------------------------------


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_training_and_answers_on_a_device_that_is_not_the_cpu(which, pytestconfig):
    """In a process of its own: a device must be registered before the first backward pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, "tests/far_cases.py"]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
