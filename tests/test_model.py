"""The composed model: what goes in, what is trained, and that a batch gives what each sample gives alone."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.errors import ModelError
from crab_min.features import Features
from crab_min.model import AdapterConfig


@pytest.fixture(scope="module")
def samples(small_world):
    return read_samples(small_world, ["a2v", "s4", "meld", "avqa", "v2a"], "train", limit=1)


def test_labels_are_the_answer_and_its_end_and_padding_is_left(tiny_model, samples):
    batch = tiny_model.collate([s.parts for s in samples], Features(tiny_model)(samples), [s.target for s in samples])
    for sample, ids, labels, attention in zip(samples, batch["ids"], batch["labels"], batch["attention"]):
        answer = labels[labels != -100]
        assert tiny_model.tokenizer.decode(answer) == sample.target + "</s>"
        assert (labels[-len(answer):] == answer).all() and (ids[-len(answer):] == answer).all()
        assert attention.tolist() == sorted(attention.tolist()) and ids[attention == 1][0] == tiny_model.tokenizer.bos_token_id


def test_there_is_a_placeholder_for_every_token_of_the_connectors(tiny_model, samples):
    media = Features(tiny_model)(samples)
    batch = tiny_model.collate([s.parts for s in samples], media)
    places = torch.isin(batch["ids"], torch.tensor([place for _, place, _ in tiny_model.marks.values()])).sum()
    assert places == sum(len(t) for t in tiny_model.tokens(batch["media"], batch["numbers"]))


def test_the_second_of_two_videos_carries_another_number(tiny_model, samples):
    sample = next(s for s in samples if s.task.name == "a2v")
    media = Features(tiny_model)([sample])
    numbers, video = tiny_model.collate([sample.parts], media)["numbers"], next(m for m in media[0] if m.kind == "video")
    assert [n for n, m in zip(numbers, media[0]) if m.kind == "video"] == [0, 1]
    alike, other = tiny_model.tokens([video, video], [0, 1])
    difference = tiny_model.number.weight[1] - tiny_model.number.weight[0]
    torch.testing.assert_close(other - alike, difference.expand_as(alike), atol=1e-4, rtol=1e-4)


def test_a_batch_gives_the_loss_and_the_answers_of_each_sample_alone(tiny_model, samples):
    features = Features(tiny_model)
    with torch.no_grad():
        total, tokens = tiny_model(tiny_model.collate([s.parts for s in samples], features(samples), [s.target for s in samples]))
        alone = [tiny_model(tiny_model.collate([s.parts], features([s]), [s.target])) for s in samples]
    assert tokens == sum(n for _, n in alone)
    torch.testing.assert_close(total, sum(loss for loss, _ in alone), atol=1e-3, rtol=1e-4)
    together = tiny_model.generate(tiny_model.collate([s.parts for s in samples], features(samples)), 12)
    assert together == [tiny_model.generate(tiny_model.collate([s.parts], features([s])), 12)[0] for s in samples]


@pytest.mark.parametrize("adapter, connectors, expected", [("ilora", False, {"ilora_A", "ilora_B", "ilora_router"}), ("lora", False, {"lora_A", "lora_B"}),
                                                           ("ilora", True, {"ilora_A", "ilora_B", "ilora_router", "visual_qformer", "audio_qformer", "time", "number", "embed_tokens"})])
def test_what_is_trained(adapter, connectors, expected, samples):
    from crab_min.trainer import name_of
    model = load_base()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    model.add_adapter(AdapterConfig(adapter=adapter, r=4, alpha=8))
    if connectors:
        model.set_trainable("connectors+words")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {name_of(n) for n in trained} == expected
    adapted = {n.split(".ilora_")[0].split(".lora_")[0] for n in trained if "lora_" in n}
    assert len(adapted) == 7 * model.config.llm["num_hidden_layers"]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    loss, tokens = model(model.collate([s.parts for s in samples], Features(model)(samples), [s.target for s in samples]))
    (loss / tokens).backward()
    optimizer.step()
    for name, before in frozen.items():
        name = name if name.startswith(("vision", "audio.", "visual", "audio_", "time", "number")) else None
        if name and name not in trained:
            assert torch.equal(dict(model.named_parameters())[name], before)


def test_trained_parts_come_back_bit_for_bit(tmp_path, samples):
    model = load_base()
    model.add_adapter(AdapterConfig(r=4, alpha=8))
    model.set_trainable("connectors+words")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * .05)
    model.save_trained(tmp_path)
    again = load_base()
    again.load_trained(tmp_path)
    model.eval(), again.eval()
    batch = model.collate([s.parts for s in samples], Features(model)(samples), [s.target for s in samples])
    with torch.no_grad():
        assert torch.equal(model(batch)[0], again(batch)[0])


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="config.json: missing"):
        load_base(tmp_path)
    with pytest.raises(ModelError, match="adapter"):
        load_base().load_trained(tmp_path)


def test_weights_that_do_not_fit_are_told_apart(tmp_path):
    """A wrong number of heads, missing and unknown names, a module of another size: what there is, what is expected."""
    model = load_base()
    model.add_adapter(AdapterConfig(r=4, heads=5))
    model.set_trainable("connectors")
    model.save_trained(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def refused(what: str) -> None:
        with pytest.raises(ModelError, match=what):
            load_base().load_trained(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"heads": 3}))
    refused(r"adapter_model.safetensors: of the 84 weights expected, 56 of another shape \(.*ilora_router.weight is \(5, 512\), expected \(3, 512\).*--heads")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    state = load_file(file)
    name = next(name for name in state if name.endswith("v_proj.ilora_A.weight"))
    save_file({k + ("x" if k == name else ""): v for k, v in state.items() if "layers.3" not in k}, file)
    refused(r"22 missing \(.*layers.0.self_attn.v_proj.ilora_A.*1 unknown \(.*ilora_A.weightx\)")
    save_file(state, file)
    load_base().load_trained(tmp_path)
    modules = load_file(tmp_path / "modules.safetensors")
    save_file({k: v[..., :5].contiguous() if k == "visual_qformer.query" else v for k, v in modules.items()}, tmp_path / "modules.safetensors")
    refused(r"modules.safetensors, visual_qformer: .*1 of another shape \(query is")
    save_file({"eyes.weight": torch.zeros(1)}, tmp_path / "modules.safetensors")
    refused("a module this model does not have: eyes; it has visual_qformer, audio_qformer, time, number, words")
