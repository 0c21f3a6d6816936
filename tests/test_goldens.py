"""Our modules compute what the authors' released modules compute, with the released weights under the released names.

Each golden file has its own sizes; another folder of such files is tested with `CRAB_GOLDENS=folder pytest`.
"""
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from crab_min.beats import fbank, load_beats
from crab_min.convert import adapter_sizes, convert
from crab_min.ilora import ILoraConfig, record_routing
from crab_min.qformer import QFormerConfig, QFormerConnector

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
    found = {kind: len(list(GOLDENS.glob(f"{kind}*.safetensors"))) for kind in ("ilora", "beats", "qformer")}
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
