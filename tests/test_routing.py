"""Statistics of I-LoRA's routing, by kind of token."""

import json

import pytest
import torch

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.errors import ModelError
from crab_min.evaluation.pictures import draw_routing
from crab_min.evaluation.routing import KINDS, record_routing, routing_stats
from crab_min.features import Features
from crab_min.model import ASSETS, AdapterConfig
from crab_min.tools import heads


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = load_base()
    model.add_adapter(AdapterConfig(r=2))
    return model.eval()


@pytest.fixture(scope="module")
def batch(model, small_world):
    """Two images with sounds, and their targets."""
    samples = read_samples(small_world, ["s4"], "train")[:2]
    features = Features(model)
    parts = [sample.parts for sample in samples]
    return model.collate(parts, features(samples), [sample.target for sample in samples])


@torch.no_grad()
def test_every_token_counts_once_per_batch_and_its_mean_weights_are_the_routers(
    model, batch, tmp_path
):
    with record_routing(model.llm) as weights:
        model(batch)
    stats = routing_stats(model, [batch, batch])
    first = {key.kind: n for key, n in stats.token_counts.items() if key[1:] == (0, "mlp.up_proj")}
    assert first["answer"] == 2 * (batch.labels != -100).sum()
    assert sum(first.values()) == 2 * batch.attention.sum()  # without padding
    assert set(first) == {"text", "image", "audio", "answer"} and set(first) < set(KINDS)

    [w] = [w for name, w in weights.items() if name.endswith("layers.0.mlp.up_proj")]
    answer_weights = w[batch.labels != -100].mean(0)
    assert stats.share["answer", 0, "mlp.up_proj"] == pytest.approx(answer_weights.numpy())
    for share in stats.share.values():
        assert share.sum() == pytest.approx(1)
    draw_routing(tmp_path / "routing.png", {"s4": stats})
    assert (tmp_path / "routing.png").stat().st_size > 5000


def test_a_model_without_ilora_has_no_routing(tiny_model):
    with pytest.raises(ModelError, match="no I-LoRA adapter"):
        routing_stats(tiny_model, [])


# --- what each head is worth ---------------------------------------------------------------------


@torch.no_grad()
def test_heads_that_are_left_out_add_nothing_and_come_back(model, batch):
    for name, parameter in model.llm.named_parameters():
        if "ilora_B" in name:
            parameter.normal_(std=0.02)
    whole = model.token_losses(batch)
    with heads.heads_kept(model, {0, 2}):
        two = model.token_losses(batch)
    with heads.heads_kept(model, set()):
        none = model.token_losses(batch)
    with model.llm.disable_adapter():
        frozen = model.token_losses(batch)
    assert torch.equal(model.token_losses(batch), whole)
    assert torch.allclose(none, frozen, atol=1e-5)
    assert not torch.allclose(two, whole, atol=1e-3) and not torch.allclose(two, none, atol=1e-3)


def test_the_heads_of_a_run_are_scored_one_by_one(small_world, tmp_path, capsys):
    run = str(ASSETS / "crab_plus-tiny")
    flags = ["--run", run, "--data", str(small_world), "--rows", "1", "--out", str(tmp_path)]
    assert heads.main(flags) == 0
    metrics = json.loads((tmp_path / "heads.json").read_text())
    titles = ["all", "without 0", "without 1", "without 2", "0 alone", "1 alone", "2 alone", "none"]
    assert list(metrics) == titles
    assert sum(metrics["all"].values()) > sum(metrics["none"].values())
    assert (tmp_path / "routing.png").stat().st_size > 20_000
    assert "without 0" in capsys.readouterr().out
