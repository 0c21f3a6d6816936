"""The composed model: what goes in, what is trained, what is saved.

Also that a batch gives what each sample gives alone.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from crab_min.backbones.composed import load_base
from crab_min.config import AdapterConfig
from crab_min.data import read_samples
from crab_min.errors import ModelError
from crab_min.features import Features
from crab_min.interface import PromptPart
from crab_min.model import ASSETS, NO_LABEL

ILORA = {"ilora_A", "ilora_B", "ilora_router"}
LORA = {"lora_A", "lora_B"}
CONNECTORS = {"visual_qformer", "audio_qformer", "time", "number"}


@pytest.fixture(scope="module")
def samples(small_world):
    return read_samples(small_world, ["a2v", "s4", "meld", "avqa", "v2a"], "train", limit=1)


def batch_of(model, samples, targets=True):
    media = Features(model)(samples)
    answers = [s.target for s in samples] if targets else None
    return model.collate([s.parts for s in samples], media, answers)


# --- batches --------------------------------------------------------------------------------------
def test_labels_are_the_answer_and_its_end_and_padding_is_left(tiny_model, samples):
    batch = batch_of(tiny_model, samples)
    rows = zip(samples, batch.ids, batch.labels, batch.attention)
    for sample, ids, labels, attention in rows:
        answer = labels[labels != NO_LABEL]
        assert tiny_model.tokenizer.decode(answer) == sample.target + "</s>"
        assert (labels[-len(answer) :] == answer).all()
        assert (ids[-len(answer) :] == answer).all()
        assert attention.tolist() == sorted(attention.tolist())
        assert ids[attention == 1][0] == tiny_model.tokenizer.bos_token_id
    assert batch.rows == len(samples)
    assert batch.answer_tokens == sum((labels != NO_LABEL).sum() for labels in batch.labels)


def test_there_is_a_placeholder_for_every_token_of_the_connectors(tiny_model, samples):
    batch = batch_of(tiny_model, samples, targets=False)
    placeholders = [marks.placeholder for marks in tiny_model.media_tokens.values()]
    count = torch.isin(batch.ids, torch.tensor(placeholders)).sum()
    tokens = tiny_model.tokens(batch.media, batch.media_index)
    assert count == sum(len(of_medium) for of_medium in tokens)


def test_a_placeholder_in_a_question_is_text(tiny_model, samples):
    """Somebody asks what <video> means: the batch has no more media than before."""
    sample = next(s for s in samples if s.task.name == "meld")
    media = Features(tiny_model)([sample])
    plain, asked = ([*sample.parts, PromptPart("text", text)] for text in ("", " <video></s>"))
    ids = tiny_model.collate([asked], media).ids
    with torch.no_grad():
        tiny_model.embed(tiny_model.collate([asked], media))
    for name in ("<video>", "</s>"):
        special = tiny_model.tokenizer.convert_tokens_to_ids(name)
        before = (tiny_model.collate([plain], media).ids == special).sum()
        assert (ids == special).sum() == before
    assert "<video></s>" in tiny_model.tokenizer.decode(ids[0])


def test_the_second_of_two_videos_carries_another_number(tiny_model, samples):
    sample = next(s for s in samples if s.task.name == "a2v")
    batch = batch_of(tiny_model, [sample])
    videos = [i for i, medium in enumerate(batch.media) if medium.kind == "video"]
    assert [batch.media_index[i] for i in videos] == [0, 1]

    video = batch.media[videos[0]]
    first, second = tiny_model.tokens([video, video], [0, 1])
    difference = tiny_model.number.weight[1] - tiny_model.number.weight[0]
    expected = difference.expand_as(first)
    torch.testing.assert_close(second - first, expected, atol=1e-4, rtol=1e-4)


def test_a_clip_that_several_rows_share_is_encoded_once(tiny_model, samples, monkeypatch):
    """Four questions about two clips, one of them also with a side channel."""
    videos = [m for m in batch_of(tiny_model, samples).media if m.kind == "video"][:2]
    sided = replace(videos[0], sides={"audio": videos[1]})
    parts = [[PromptPart("video"), PromptPart("text", text)] for text in ("a?", "b?", "c?", "d?")]
    batch = tiny_model.collate(parts, [[videos[0]], [videos[1]], [videos[0]], [sided]])
    expected = tiny_model.tokens(batch.media, batch.media_index)
    calls = []
    tokens = tiny_model.tokens
    monkeypatch.setattr(tiny_model, "tokens", lambda *args: calls.append(args) or tokens(*args))
    shared = tiny_model.shared_tokens(batch)
    assert [len(media) for media, _ in calls] == [3]
    for one, other in zip(shared, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_batch_gives_the_loss_and_the_answers_of_each_sample_alone(tiny_model, samples):
    batch = batch_of(tiny_model, samples)
    alone = [batch_of(tiny_model, [sample]) for sample in samples]
    with torch.no_grad():
        total = tiny_model(batch)
        losses = [tiny_model(one) for one in alone]
    assert batch.answer_tokens == sum(one.answer_tokens for one in alone)
    torch.testing.assert_close(total, sum(losses), atol=1e-3, rtol=1e-4)

    together = tiny_model.generate(batch_of(tiny_model, samples, targets=False), 12)
    for sample, text in zip(samples, together):
        assert tiny_model.generate(batch_of(tiny_model, [sample], targets=False), 12) == [text]


# --- what is trained ------------------------------------------------------------------------------
def part_of(parameter: str) -> str:
    """Return the part of the model that a parameter belongs to."""
    for name in (*ILORA, *LORA, "embed_tokens"):
        if name in parameter:
            return name
    return parameter.split(".")[0]


@pytest.mark.parametrize(
    "adapter, parts, expected",
    [
        ("ilora", ["adapter"], ILORA),
        ("lora", ["adapter"], LORA),
        ("ilora", ["adapter", "embeddings"], ILORA | {"embed_tokens"}),
        ("ilora", ["adapter", "connectors"], ILORA | CONNECTORS),
        ("ilora", ["connectors", "embeddings"], CONNECTORS | {"embed_tokens"}),
        ("none", ["visual_qformer"], {"visual_qformer"}),
    ],
)
def test_what_is_trained(adapter, parts, expected, samples):
    model = load_base()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    model.add_adapter(AdapterConfig(adapter=adapter, r=4, alpha=8))
    model.set_trainable(parts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == expected
    adapted = {name.split("lora_")[0] for name in trained if "lora_" in name}
    assert len(adapted) == ("adapter" in parts) * 7 * model.config.llm["num_hidden_layers"]

    # a step changes nothing else
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    batch = batch_of(model, samples)
    (model(batch) / batch.answer_tokens).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    for name, before in frozen.items():
        if name in after and name not in trained:
            assert torch.equal(after[name], before)


def test_a_part_that_there_is_not_is_named():
    with pytest.raises(
        ModelError, match="--trainable eyes: .* but adapter, connectors, embeddings"
    ):
        load_base().set_trainable(["adapter", "eyes"])
    with pytest.raises(ModelError, match="--trainable mask_decoder"):
        load_base().set_trainable(["mask_decoder"])


# --- files ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model as if it had been trained, and its folder."""
    torch.manual_seed(0)
    model = load_base()
    model.add_adapter(AdapterConfig(r=4, alpha=8))
    model.set_trainable(["adapter", "connectors", "embeddings"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("trained")
    model.save_trained(folder)
    return model.eval(), folder


def test_trained_parts_come_back_bit_for_bit(trained, samples):
    model, folder = trained
    assert {file.stem for file in (folder / "parts").iterdir()} == CONNECTORS | {"embeddings"}
    again = load_base()
    again.load_trained(folder)
    batch = batch_of(model, samples)
    with torch.no_grad():
        assert torch.equal(model(batch), again.eval()(batch))


def test_parts_of_an_earlier_run_go_on_into_the_next(trained, tmp_path):
    """They are loaded, and saved again although they do not learn any more."""
    _, folder = trained
    model = load_base()
    model.add_adapter(AdapterConfig(r=4, alpha=8))
    model.restore_trained(folder)
    model.set_trainable(["adapter"])
    model.save_trained(tmp_path)
    for file in (folder / "parts").iterdir():
        before, after = load_file(file), load_file(tmp_path / "parts" / file.name)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_form_of_earlier_versions_is_read(trained, samples, tmp_path):
    """All parts were in modules.safetensors, and the embeddings were called words."""
    model, folder = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    modules = {}
    for file in (folder / "parts").iterdir():
        name = {"embeddings": "words"}.get(file.stem, file.stem)
        modules |= {f"{name}.{key}": value for key, value in load_file(file).items()}
    save_file(modules, tmp_path / "modules.safetensors")
    again = load_base()
    again.load_trained(tmp_path)
    batch = batch_of(model, samples)
    with torch.no_grad():
        assert torch.equal(model(batch), again.eval()(batch))


def test_the_shipped_adapter_fits_the_shipped_base():
    model = load_base()
    model.load_trained(ASSETS / "crab_plus-tiny")
    assert model.loaded_parts == {"embeddings"}


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="config.json: missing"):
        load_base(tmp_path)
    with pytest.raises(ModelError, match="neither adapter/ nor parts/"):
        load_base().load_trained(tmp_path)


def test_weights_that_do_not_fit_are_told_apart(tmp_path):
    """Another number of heads, missing and unknown names, a part of another size."""
    model = load_base()
    model.add_adapter(AdapterConfig(r=4, heads=5))
    model.set_trainable(["adapter", "connectors"])
    model.save_trained(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    config_file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())

    def refused(text: str) -> None:
        with pytest.raises(ModelError, match=text):
            load_base().load_trained(tmp_path)

    # the adapter
    config_file.write_text(json.dumps(config | {"heads": 3}))
    refused(
        r"adapter_model.safetensors: of the 84 weights expected, 56 of another shape "
        r"\(.*ilora_router.weight is \(5, 512\), expected \(3, 512\).*--heads"
    )
    config_file.write_text(json.dumps(config))
    state = load_file(file)
    name = next(name for name in state if name.endswith("v_proj.ilora_A.weight"))
    wrong = {key: value for key, value in state.items() if "layers.3" not in key}
    wrong[f"{name}x"] = wrong.pop(name)
    save_file(wrong, file)
    refused(r"22 missing \(.*layers.0.self_attn.v_proj.ilora_A.*1 unknown \(.*ilora_A.weightx\)")
    save_file(state, file)
    load_base().load_trained(tmp_path)

    # a part
    file = tmp_path / "parts" / "visual_qformer.safetensors"
    state = load_file(file)
    short = state | {"query": state["query"][..., :5].contiguous()}
    save_file(short, file, {"config": "{}"})
    refused(r"visual_qformer.safetensors: .*1 of another shape \(query is")
    save_file(short, file)
    refused("visual_qformer.safetensors: not a trained part")
    save_file(state, file, {"config": "{}"})
    save_file({"weight": torch.zeros(1)}, tmp_path / "parts/eyes.safetensors", {"config": "{}"})
    refused(
        "a module this model does not have: eyes; it has visual_qformer, audio_qformer, time, "
        "number, embeddings"
    )


def test_frozen_encoders_stay_in_evaluation_mode():
    model = load_base()
    model.train()
    assert model.llm.training
    assert not any(module.training for module in model.vision.modules())
    assert not any(module.training for module in model.audio.modules())


def test_an_adapter_that_was_cut_off_is_named(tmp_path):
    shutil.copytree(ASSETS / "crab_plus-tiny", tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="adapter_model.safetensors: cannot be read"):
        load_base().load_trained(tmp_path / "run")
