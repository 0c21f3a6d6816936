"""Training and answers on "far", a device that is not the CPU (far.py); test_devices.py runs it."""

import json

import far
import pytest
import torch
from test_devices import TINY_RANDOM

import infer
import train
from crab_min.cli import parse_train
from crab_min.data import read_samples
from crab_min.features import Features
from crab_min.recipes import crab_plus
from crab_min.tasks import TASKS
from crab_min.trainer import JointStep, collate_answers, make_optimizer

FAR = TINY_RANDOM | {
    "patches": "pave-tiny --side audio,fast --no-compare-lora",
    "modalities": "crema-tiny --modalities rgb,audio",
    "alignment": "crab-tiny --stage visual",
    "ranking": "crab_plus-tiny --eval-mode rank --adapter lora --gradient-checkpointing",
}
QUICK = ["modalities", "alignment"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAR if name not in QUICK]


@pytest.fixture
def on_far(monkeypatch):
    """Let every command choose the device "far" (far.py), which takes no CPU tensors."""
    far.set_up()
    device = torch.device("far:0")
    limits = dict.fromkeys(TASKS, 4)  # short answers
    monkeypatch.setattr("crab_min.recipes.common.token_limits", lambda *_: limits)
    for module in ("runs.processes", "tools.loading"):
        monkeypatch.setattr(f"crab_min.{module}.choose_device", lambda *_: device)
    with far.Factories():
        yield


@pytest.mark.parametrize("backbone", [*QUICK, *SLOW])
def test_training_and_answers_mix_no_devices(backbone, on_far, small_world, tmp_path):
    run = tmp_path / "run"
    tasks = "s4" if "mask" in backbone else "avqa"
    rows = ["--data", str(small_world), "--tasks", tasks, "--test-rows", "2"]
    command = f"{FAR[backbone]} --steps 2 --batch-size 2 --save-every 1 --out {run}"
    assert train.main([*command.split(), *rows, "--no-baseline"]) == 0
    assert infer.main(["--eval", *rows, "--run", str(run), "--max-new-tokens", "4"]) == 0
    metrics = json.loads((run / "eval_test" / "metrics.json").read_text())
    assert metrics["tasks"][tasks]["n"] == 2


# command -> how often the CPU waits for a GPU in a training step of two samples; of Omni's mostly
# in transformers' encoders
SYNCS = {"crab_plus-tiny": 7, "crab_plus-7b --weights tiny-random": 74}


@pytest.mark.parametrize("command", SYNCS)
def test_a_step_waits_for_the_gpu_no_more_often_than_it_did(command, on_far, small_world):
    given, settings = parse_train(command.split())
    model = crab_plus.load_model(settings).to("far")
    samples = read_samples(small_world, ["avqa"], "train")[:2]
    media = Features(model)(samples)
    crab_plus.add_trained_parts(model, settings)
    model.set_trainable(settings.training.parts)
    optimizer = make_optimizer(model.train(), settings.training)

    far.syncs.clear()
    batch = collate_answers(model, samples, media)
    JointStep()(model, [batch], optimizer, settings.training)
    assert 0 < far.syncs.total() <= SYNCS[command], far.syncs
