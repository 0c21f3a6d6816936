"""Our modules and metrics compute what the authors' released ones compute, modules with the released weights under the released names.

Each golden file has its own sizes; another folder of such files is tested with `CRAB_GOLDENS=folder pytest`.
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
from crab_min.ilora import ILoraConfig, record_routing
from crab_min.masks import MaskConfig, MaskDecoder, mask_loss
from crab_min.pave import Patch, PatchConfig
from crab_min.qformer import QFormerConfig, QFormerConnector
from crab_min.tasks import TASKS
from crab_min.tools.released.weights import adapter_sizes, convert

HERE = Path(__file__).parent / "goldens"
GOLDENS = Path(os.environ.get("CRAB_GOLDENS", HERE))
spec = importlib.util.spec_from_file_location("load_golden", HERE / "load_golden.py")
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)


def goldens(kind: str):
    files = sorted(GOLDENS.glob(f"{kind}*.safetensors"))
    return pytest.mark.parametrize("golden", [pytest.param(f, id=f.stem) for f in files])


def close(ours: torch.Tensor, golden: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, golden, atol=tolerance, rtol=tolerance)


def test_there_are_goldens():
    found = {kind: len(list(GOLDENS.glob(f"{kind}*.safetensors"))) for kind in ("ilora", "beats", "qformer", "pave", "crema", "mask_decoder")}
    assert any(found.values()), f"no golden files in {GOLDENS}"


@goldens("ilora")
def test_ilora(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    linear = nn.Linear(settings["d_in"], settings["d_out"], bias="bias" in weights)
    linear.load_state_dict({name: weights.pop(name) for name in linear.state_dict()})
    state = convert(weights, "ilora")
    assert adapter_sizes(state) == (settings["r"], settings["heads"])
    model = get_peft_model(nn.ModuleDict({"linear": linear}), ILoraConfig(
        r=settings["r"], heads=settings["heads"], alpha=settings["alpha"], dropout=0.0, target_modules=["linear"]))
    state = {f"base_model.model.linear.{name}": weight for name, weight in state.items()}
    assert not set_peft_model_state_dict(model, state).unexpected_keys

    layer, x = model.base_model.model["linear"], tensors["x"].clone().requires_grad_()
    with record_routing(model) as routing:
        y = layer(x)
    (y * tensors["g"]).sum().backward()
    close(y, tensors["y"], 1e-5)
    close(routing["base_model.model.linear"], tensors["route"], 1e-5)
    close(x.grad, tensors["grad_x"], 1e-5)
    grads = {name.removeprefix("grad."): grad for name, grad in tensors.items() if name.startswith("grad.")}
    for name, grad in convert(grads, "ilora").items():
        close(layer.get_parameter(name.replace(".weight", ".default.weight")).grad, grad, 1e-5)


@goldens("beats")
def test_beats(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    beats, bank = load_beats({"cfg": settings["config"], "model": weights}), fbank(tensors["wav"])
    close(bank, tensors["fbank"], 1e-4)
    with torch.no_grad():
        close(beats(bank)[0], tensors["features"], 1e-4)


@goldens("qformer")
def test_qformer(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    state = convert(weights, "qformer")
    connector = QFormerConnector(QFormerConfig(
        width_in=settings["d_vision"], width_out=settings["d_model"], queries=settings["queries"],
        hidden=settings["hidden"], layers=settings["layers"], heads=settings["heads"], mlp_depth=settings["mlp_depth"],
        intermediate=len(state["qformer.encoder.layer.0.intermediate_query.dense.bias"]))).eval()
    connector.load_state_dict(state)
    features = tensors["features"].unflatten(1, (-1, settings["tokens_per_frame"]))     # (B, T, S, W)
    with torch.no_grad():
        close(connector(features).flatten(1, 2), tensors["tokens"], 1e-4)


@goldens("pave")
def test_patch(golden):
    tensors, weights, settings = reader.load_golden(str(golden))
    patch = Patch(PatchConfig(settings["d_video"], settings["d_side"], settings["d_out"], settings["d_hidden"], settings["heads"], settings["layers"],
                              shared_kv=True, rope=settings["rope"]))
    patch.load_state_dict(convert(weights, "patch"))
    with torch.no_grad():
        close(patch(tensors["video"], tensors["side"].flatten(2, 3)).flatten(1, 2), tensors["update"], 1e-4)


@goldens("mask_decoder")
def test_mask_decoder(golden):
    tensors, weights, s = reader.load_golden(str(golden))
    layers = {name.split(".")[3] for name in weights if name.startswith("mask_decoder.query_generator.layers.")}
    decoder = MaskDecoder(MaskConfig(s["d_vision"], s["d_model"], queries=s["mask_queries"], generator=len(layers), low=s["low_res"], chained=False))
    state = convert(weights, "masks")
    decoder.load_state_dict(state)
    back = revert(state, "masks")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    states, features = tensors["mask_token_states"], [tensors["vision_scale0"], tensors["vision_scale1"]]
    with torch.no_grad():
        logits = decoder(states, features)
        n = len(tensors["avss_every8"])
        close(logits[..., ::8, ::8], tensors["masks_every8"], 1e-4)
        classes = tensors["avss_every8"]
        rounded = torch.finfo(torch.half).eps / 2 if torch.equal(classes, classes.half().float()) else 0       # as the file in tests/goldens is
        close(decoder(states[:n], [f[:n] for f in features], classes=True)[..., ::8, ::8], classes, 1e-4 + rounded)
        close(mask_loss(logits, tensors["gt_mask"].float()) * len(logits), tensors["mask_loss"][0], 1e-4)        # released: the sum


@goldens("crema")
def test_crema(golden):
    tensors, weights, s = reader.load_golden(str(golden))
    state = convert(weights, "crema")
    qformer = MultimodalQFormer(MultimodalConfig(s["d_llm"], s["d_vision"], s["queries"], s["hidden"], s["layers"], s["heads"], rank=s["rank"],
                                                 intermediate=len(state["multimodal.qformer.encoder.layer.0.intermediate_query.dense.bias"])))
    for name in s["modalities"]:
        qformer.add(name, tensors[f"features_{name}"].shape[-1])
    sides = [name for name in s["modalities"] if name != "rgb"]
    model = nn.ModuleDict({"multimodal": qformer, "fusion": SelfGatedFusion(sides, s["d_llm"])} if "fused" in tensors else {"multimodal": qformer})
    model.load_state_dict(state)
    with torch.no_grad():
        tokens = {name: qformer(name, tensors[f"features_{name}"]) for name in s["modalities"]}
        for name, found in tokens.items():
            close(found, tensors[f"tokens_{name}"], 1e-4)
        if "fused" in tensors:
            close(model["fusion"]({name: over_frames(tokens[name], s["frames"]) if name in ("audio", "pc") else tokens[name] for name in sides}), tensors["fused"], 1e-4)


def test_iou_f_and_null_agree_with_the_authors_code():
    tensors, expected = {k: v.numpy() for k, v in load_file(GOLDENS / "metrics.safetensors").items()}, json.loads((GOLDENS / "metrics.json").read_text())["mask"]
    scores, gold = 1 / (1 + np.exp(-tensors["mask_logits"])), tensors["mask_gt"] > .5
    alone = [soft(scores[i:i + 1], gold[i:i + 1]) for i in range(len(gold))]
    assert [a["miou"] for a in alone] == pytest.approx(expected["iou"], abs=1e-5)
    assert [a["f"] for a in alone] == pytest.approx(expected["fscore"], abs=1e-5)
    assert [null_s(scores[i:i + 1] > .5) for i in range(len(gold))] == pytest.approx(expected["null_s"], abs=1e-5)


def test_ave_agrees_with_the_released_scorer_on_a_real_models_answers():
    rows = [json.loads(line) for line in (GOLDENS / "ave_predictions.jsonl").read_text().splitlines()]
    expected = json.loads((GOLDENS / "ave_expected.json").read_text())
    result = score(TASKS["ave"], [TASKS["ave"].parse(row["prediction"]) for row in rows],
                   [TASKS["ave"].gold_answer(row) for row in rows], expected["classes"])
    right, lost = expected["segment_accuracy"], 1 - result["parsed"]
    assert result["n"] == expected["n"] and round(result["parsed"] * result["n"]) == expected["parsed"]
    released = result["all"]["segment_accuracy_released"]
    readings = {"exclusive_end, unparsed wrong": result["metric"], "inclusive_end, unparsed right": released,
                "exclusive_end, unparsed right": result["metric"] + lost,
                "inclusive_end, unparsed wrong": released - lost,
                "exclusive_end, unparsed drop": result["metric"] / result["parsed"],
                "inclusive_end, unparsed drop": (released - lost) / result["parsed"]}
    assert readings == pytest.approx(right, abs=6e-6)


def test_avvp_agrees_with_the_released_scorer():
    golden = json.loads((GOLDENS / "metrics.json").read_text())
    for video in golden["avvp"]:
        found, wanted = ({side: {c: {t for t in range(10) if row[t]} for c, row in enumerate(video[f"{source}_{side}"])}
                          for side in ("audio", "visual")} for source in ("pred", "gt"))
        for level, counts in (("segment", segment_counts), ("event", event_counts)):
            scores = av_f_scores(found, wanted, counts)
            assert [scores[name] for name in golden["avvp_order"]] == pytest.approx(video[level], abs=1e-6)
