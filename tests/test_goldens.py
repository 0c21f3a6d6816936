"""Our modules and metrics compute what the authors' released ones compute.

Modules are tested with the released weights under the released names. Each golden file has its own
sizes; another folder of such files is tested with `CRAB_GOLDENS=folder pytest`.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from released import revert
from safetensors.torch import load_file
from torch import nn

from crab_min.beats import fbank, load_beats
from crab_min.crema import MultimodalConfig, MultimodalQFormer, SelfGatedFusion, over_frames
from crab_min.evaluation.mask_metrics import null_s, soft
from crab_min.evaluation.metrics import av_f_scores, event_counts, score, segment_counts
from crab_min.evaluation.routing import record_routing
from crab_min.ilora import ILoraConfig
from crab_min.masks import MaskConfig, MaskDecoder, mask_loss
from crab_min.pave import Patch, PatchConfig
from crab_min.qformer import QFormerConfig, QFormerConnector
from crab_min.tasks import TASKS
from crab_min.tools.released.weights import adapter_sizes, convert

HERE = Path(__file__).parent / "goldens"
GOLDENS = Path(os.environ.get("CRAB_GOLDENS", HERE))
KINDS = ("ilora", "beats", "qformer", "pave", "crema", "mask_decoder")
spec = importlib.util.spec_from_file_location("load_golden", HERE / "load_golden.py")
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)


def goldens(kind: str):
    """Run a test on every golden file of a kind."""
    files = sorted(GOLDENS.glob(f"{kind}*.safetensors"))
    return pytest.mark.parametrize("golden", [pytest.param(f, id=f.stem) for f in files])


def close(ours: torch.Tensor, golden: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, golden, atol=tolerance, rtol=tolerance)


def test_there_are_goldens():
    files = [file for kind in KINDS for file in GOLDENS.glob(f"{kind}*.safetensors")]
    assert files, f"no golden files in {GOLDENS}"


@goldens("ilora")
def test_ilora(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    linear = nn.Linear(settings["d_in"], settings["d_out"], bias="bias" in weights)
    linear.load_state_dict({name: weights.pop(name) for name in linear.state_dict()})
    state = convert(weights, "ilora")
    assert adapter_sizes(state) == (settings["r"], settings["heads"])
    config = ILoraConfig(
        r=settings["r"],
        heads=settings["heads"],
        alpha=settings["alpha"],
        dropout=0.0,
        target_modules=["linear"],
    )
    model = get_peft_model(nn.ModuleDict({"linear": linear}), config)
    state = {f"base_model.model.linear.{name}": weight for name, weight in state.items()}
    assert not set_peft_model_state_dict(model, state).unexpected_keys

    layer, x = model.base_model.model["linear"], tensors["x"].clone().requires_grad_()
    with record_routing(model) as routing:
        y = layer(x)
    (y * tensors["g"]).sum().backward()
    close(y, tensors["y"], 1e-5)
    close(routing["base_model.model.linear"], tensors["route"], 1e-5)
    close(x.grad, tensors["grad_x"], 1e-5)
    gradients = {}
    for name, gradient in tensors.items():
        if name.startswith("grad."):
            gradients[name.removeprefix("grad.")] = gradient
    for name, gradient in convert(gradients, "ilora").items():
        parameter = layer.get_parameter(name.replace(".weight", ".default.weight"))
        close(parameter.grad, gradient, 1e-5)


@goldens("beats")
def test_beats(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    beats = load_beats({"cfg": settings["config"], "model": weights})
    bank = fbank(tensors["wav"])
    close(bank, tensors["fbank"])
    with torch.no_grad():
        close(beats(bank)[0], tensors["features"])


@goldens("qformer")
def test_qformer(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    state = convert(weights, "qformer")
    config = QFormerConfig(
        width_in=settings["d_vision"],
        width_out=settings["d_model"],
        queries=settings["queries"],
        hidden=settings["hidden"],
        layers=settings["layers"],
        heads=settings["heads"],
        mlp_depth=settings["mlp_depth"],
        intermediate=len(state["qformer.encoder.layer.0.intermediate_query.dense.bias"]),
    )
    connector = QFormerConnector(config).eval()
    connector.load_state_dict(state)
    features = tensors["features"].unflatten(1, (-1, settings["tokens_per_frame"]))  # (B, T, S, W)
    with torch.no_grad():
        close(connector(features).flatten(1, 2), tensors["tokens"])


@goldens("pave")
def test_patch(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    config = PatchConfig(
        video=settings["d_video"],
        side=settings["d_side"],
        out=settings["d_out"],
        hidden=settings["d_hidden"],
        heads=settings["heads"],
        layers=settings["layers"],
        shared_kv=True,
        rope=settings["rope"],
    )
    patch = Patch(config)
    patch.load_state_dict(convert(weights, "patch"))
    with torch.no_grad():
        update = patch(tensors["video"], tensors["side"].flatten(2, 3))
    close(update.flatten(1, 2), tensors["update"])


@goldens("mask_decoder")
def test_mask_decoder(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    prefix = "mask_decoder.query_generator.layers."
    layers = {name.split(".")[3] for name in weights if name.startswith(prefix)}
    config = MaskConfig(
        settings["d_vision"],
        settings["d_model"],
        queries=settings["mask_queries"],
        generator=len(layers),
        low=settings["low_res"],
        chained=False,
    )
    decoder = MaskDecoder(config)
    state = convert(weights, "masks")
    decoder.load_state_dict(state)
    back = revert(state, "masks")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)

    states = tensors["mask_token_states"]
    features = [tensors["vision_scale0"], tensors["vision_scale1"]]
    with torch.no_grad():
        logits = decoder(states, features)
        close(logits[..., ::8, ::8], tensors["masks_every8"])
        # the released loss is the sum over the samples
        loss = mask_loss(logits, tensors["gt_mask"].float()) * len(logits)
        close(loss, tensors["mask_loss"][0])

        # the head for classes, on the first samples; the file in tests/goldens is rounded to halves
        expected = tensors["avss_every8"]
        n = len(expected)
        is_rounded = torch.equal(expected, expected.half().float())
        rounding = torch.finfo(torch.half).eps / 2 if is_rounded else 0
        classes = decoder(states[:n], [f[:n] for f in features], classes=True)
        close(classes[..., ::8, ::8], expected, 1e-4 + rounding)


@goldens("crema")
def test_crema(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    names = settings["modalities"]
    state = convert(weights, "crema")
    intermediate = "multimodal.qformer.encoder.layer.0.intermediate_query.dense.bias"
    config = MultimodalConfig(
        width_out=settings["d_llm"],
        width_in=settings["d_vision"],
        queries=settings["queries"],
        hidden=settings["hidden"],
        layers=settings["layers"],
        heads=settings["heads"],
        rank=settings["rank"],
        intermediate=len(state[intermediate]),
    )
    qformer = MultimodalQFormer(config)
    for name in names:
        qformer.add(name, tensors[f"features_{name}"].shape[-1])
    model = nn.ModuleDict({"multimodal": qformer})
    sides = [name for name in names if name != "rgb"]
    if "fused" in tensors:
        model["fusion"] = SelfGatedFusion(sides, settings["d_llm"])
    model.load_state_dict(state)

    tokens = {}
    with torch.no_grad():
        for name in names:
            tokens[name] = qformer(name, tensors[f"features_{name}"])
            close(tokens[name], tensors[f"tokens_{name}"])
        if "fused" in tensors:
            for name in {"audio", "pc"} & set(sides):
                tokens[name] = over_frames(tokens[name], settings["frames"])
            fused = model["fusion"]({name: tokens[name] for name in sides})
            close(fused, tensors["fused"])


# --- metrics --------------------------------------------------------------------------------------
def test_iou_f_and_null_agree_with_the_authors_code():
    tensors = load_file(GOLDENS / "metrics.safetensors")
    expected = json.loads((GOLDENS / "metrics.json").read_text())["mask"]
    scores = 1 / (1 + np.exp(-tensors["mask_logits"].numpy()))
    gold = tensors["mask_gt"].numpy() > 0.5
    alone = [soft(scores[i : i + 1], gold[i : i + 1]) for i in range(len(gold))]
    assert [a["miou"] for a in alone] == pytest.approx(expected["iou"], abs=1e-5)
    assert [a["f"] for a in alone] == pytest.approx(expected["fscore"], abs=1e-5)
    empty = [null_s(scores[i : i + 1] > 0.5) for i in range(len(gold))]
    assert empty == pytest.approx(expected["null_s"], abs=1e-5)


def test_ave_agrees_with_the_released_scorer_on_a_real_models_answers():
    lines = (GOLDENS / "ave_predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    expected = json.loads((GOLDENS / "ave_expected.json").read_text())
    task = TASKS["ave"]
    answers = [task.parse(row["prediction"]) for row in rows]
    golds = [task.gold_answer(row) for row in rows]
    result = score(task, answers, golds, expected["classes"])
    assert result["n"] == expected["n"]
    assert round(result["parsed"] * result["n"]) == expected["parsed"]

    # six readings: where an event ends, and what becomes of answers that do not parse
    strict, released = result["metric"], result["all"]["segment_accuracy_released"]
    unparsed = 1 - result["parsed"]
    readings = {
        "exclusive_end, unparsed wrong": strict,
        "exclusive_end, unparsed right": strict + unparsed,
        "exclusive_end, unparsed drop": strict / result["parsed"],
        "inclusive_end, unparsed wrong": released - unparsed,
        "inclusive_end, unparsed right": released,
        "inclusive_end, unparsed drop": (released - unparsed) / result["parsed"],
    }
    assert readings == pytest.approx(expected["segment_accuracy"], abs=6e-6)


def seconds_of(video: dict, source: str) -> dict:
    """Read the golden's tables (class, second) as side -> class -> seconds."""
    sides = {}
    for side in ("audio", "visual"):
        sides[side] = {}
        for c, row in enumerate(video[f"{source}_{side}"]):
            sides[side][c] = {second for second in range(10) if row[second]}
    return sides


def test_avvp_agrees_with_the_released_scorer():
    golden = json.loads((GOLDENS / "metrics.json").read_text())
    for video in golden["avvp"]:
        predicted, wanted = seconds_of(video, "pred"), seconds_of(video, "gt")
        for level, counts in (("segment", segment_counts), ("event", event_counts)):
            scores = av_f_scores(predicted, wanted, counts)
            scores = [scores[name] for name in golden["avvp_order"]]
            assert scores == pytest.approx(video[level], abs=1e-6)
