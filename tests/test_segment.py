"""The mask decoder, the mask tokens of an LM, and masks from answer to score."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2Processor,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

import infer
import train
from crab_min import trainer
from crab_min.answers import MASK_TOKENS, Answer
from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, BackboneConfig, MaskDecoderConfig
from crab_min.data import gold_mask, read_samples
from crab_min.errors import ModelError
from crab_min.evaluation.masks import masks_from_boxes, score_masks
from crab_min.evaluation.sam2 import Sam2, box_mask
from crab_min.evaluation.scores import score_all
from crab_min.evaluation.swaps import swap_audio
from crab_min.interface import PromptPart
from crab_min.masks import (
    MASK_TOKEN_COUNT,
    MaskBranch,
    MaskConfig,
    MaskDecoder,
    dice_loss,
    loss_of_masks,
    mask_loss,
)
from crab_min.model import ASSETS
from crab_min.recipes.crab import add_mask_tokens
from crab_min.sources.av_uie import CLASSES, mask_classes, mask_path
from crab_min.tasks import TASKS
from crab_min.world.folders import WorldConfig, build_world

DECODER = MaskDecoderConfig(decoder=True, width=32, queries=4)
SMALL = MaskConfig(width_in=12, width_out=20, width=32, queries=5, feedforward=40, low=16, size=32)


# --- the decoder ----------------------------------------------------------------------------------
def decoder_input(batch: int):
    """Return states of the mask tokens and vision features of two scales."""
    torch.manual_seed(1)
    return torch.randn(batch, 6, 20), [torch.randn(batch, 16, 12) for _ in range(2)]


def make_decoder(**changes) -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(dataclasses.replace(SMALL, **changes))


def test_sizes_are_those_of_the_answers_and_of_the_dataset():
    assert len(MASK_TOKENS) == MASK_TOKEN_COUNT
    assert SMALL.class_count == CLASSES


@pytest.mark.parametrize("classes", [False, True])
def test_batched_equals_one_by_one(classes):
    decoder, (states, features) = make_decoder().eval(), decoder_input(3)
    with torch.no_grad():
        together = decoder(states, features, classes)
        assert together.shape == (3, 71 if classes else 1, 32, 32)
        for i in range(3):
            one = slice(i, i + 1)
            alone = decoder(states[one], [f[one] for f in features], classes)
            torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chained", [True, False])
def test_generator_layers_read_what_the_one_before_made(chained):
    """Unchained, as released, only the last layer counts, the first changes nothing."""
    decoder, (states, features) = make_decoder(chained=chained), decoder_input(1)
    with torch.no_grad():
        before = decoder(states, features)
        decoder.generator[0].mlp[0].bias += 1
        assert torch.equal(decoder(states, features), before) == (not chained)


def test_positional_encodings_are_saved(tmp_path):
    """The released code draws their matrices anew at each start."""
    decoder, (states, features) = make_decoder(), decoder_input(1)
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    torch.manual_seed(99)
    other = MaskDecoder(SMALL)
    other.load_state_dict(load_file(tmp_path / "decoder.safetensors"))
    with torch.no_grad():
        assert torch.equal(decoder(states, features), other(states, features))


def test_losses_by_hand():
    """Two pixels, one right at odds e^20, one at even odds: cross-entropy ln 2 / 2."""
    logits, gold = torch.tensor([[[[20.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert dice_loss(logits, gold).item() == pytest.approx(1 - 2 / 2.5, abs=1e-3)
    loss = mask_loss(logits, gold, lambda_bce=2, lambda_dice=0)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-4)

    # a batch with a mask and with classes, where a pixel of no class does not count
    classes = torch.zeros(71, 1, 2)
    classes[3, 0, 0] = 50.0
    wanted = {0: gold[0], 1: torch.tensor([[[3, -1]]])}
    loss = loss_of_masks({0: logits[0], 1: classes}, wanted, 1, 0)
    assert loss.item() == pytest.approx(np.log(2) / 4, abs=1e-4)
    assert loss_of_masks({}, wanted, 1, 0).item() == 0


def test_states_are_found_where_all_mask_tokens_stand_in_order():
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    branch = MaskBranch(SMALL, llm, first=43)
    assert branch.ids.tolist() == [43, 44, 45, 46, 47, 48]
    ids = torch.tensor(
        [
            [5, 3, 43, 44, 45, 46, 47, 48],
            [1, 43, 44, 2, 45, 46, 47, 48],  # with a word between
            [1, 44, 43, 45, 46, 47, 48, 3],  # in another order
            [1, 2, 43, 44, 45, 46, 47, 3],  # one is missing
            [43, 44, 45, 46, 47, 48, 1, 2],  # no state predicts the first
        ]
    )
    output = llm(input_ids=ids, output_hidden_states=True)
    states = output.hidden_states[-1]
    found = branch.find(ids, states)
    assert found.keys() == {0, 1}
    assert torch.equal(found[0], states[0, 1:7])
    assert torch.equal(found[1], states[1, [0, 1, 3, 4, 5, 6]])
    # ids between the words and the mask tokens belong to media, and are never generated
    assert output.logits.shape[-1] == 49
    assert output.logits[..., 40:43].amax() == torch.finfo(torch.float32).min


# --- in the model ---------------------------------------------------------------------------------
ANSWERS = [
    f"The dog sounds. {''.join(MASK_TOKENS)}",
    f"So the bell and the cat sound. {''.join(MASK_TOKENS)}",
    "Nothing sounds.",
]


@pytest.fixture(scope="module")
def masked():
    """The shipped base with a small decoder; prompts and features of three images.

    Two of the ANSWERS to them end in mask tokens.
    """
    torch.manual_seed(0)
    model = load_model(BackboneConfig(), DECODER)
    model.add_adapter(AdapterConfig())
    prompt = [PromptPart("image"), PromptPart("text", text="\nWhich thing sounds?")]
    media = []
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 256, (1, 96, 96, 3), np.uint8)
        media.append(model.encode("image", [image], [1.0]))
    return model, [prompt] * 3, media


def test_gradients_reach_all_of_the_branch(masked):
    model, prompts, media = masked
    model.set_trainable(["mask_decoder", "mask_tokens"])
    batch = model.collate(prompts, media, ANSWERS)
    batch.masks = [torch.ones(1, 96, 96), torch.zeros(1, 96, 96), None]
    model(batch).backward()
    reached = set()
    for name, p in model.mask_branch.named_parameters():
        if p.grad is not None and p.grad.abs().sum() > 0:
            reached.add(name)
    model.zero_grad()
    model.mask_branch.requires_grad_(False)

    # keys and queries of an attention with one key have no effect (see GeneratorLayer)
    attention = "cross_attention"
    idle = ("key.bias", f"{attention}.query.weight", f"{attention}.query.bias")
    idle += (f"{attention}.key.weight",)
    for name, _ in model.mask_branch.named_parameters():
        if not name.endswith(idle) and not name.startswith("decoder.classes"):
            assert name in reached


def test_text_and_masks_together_for_any_batch(masked):
    """Masks do not depend on the batch; an answer without mask tokens has none."""
    model, prompts, media = masked
    model.eval()

    def masks_of(answers: list[str], classes: bool = False) -> list:
        n = len(answers)
        return model.predict_masks(model.collate(prompts[:n], media[:n], answers), [classes] * n)

    together = masks_of(ANSWERS)
    assert together[2] is None and together[0].shape == (1, 96, 96)
    for i in range(2):
        batch = model.collate(prompts[i : i + 1], media[i : i + 1], ANSWERS[i : i + 1])
        (alone,) = model.predict_masks(batch, [False])
        torch.testing.assert_close(alone, together[i], atol=1e-4, rtol=1e-4)
    (classes,) = masks_of(ANSWERS[:1], classes=True)
    assert classes.shape == (71, 96, 96)
    assert masks_of([ANSWERS[0].replace(MASK_TOKENS[3], "")]) == [None]
    assert len(model.generate(model.collate(prompts, media), 12)) == 3


def test_mask_tokens_change_nothing_for_answers_without_them(masked, tiny_model):
    """The LM with mask tokens gives other texts the same loss as the LM without."""
    model, prompts, media = masked
    losses = []
    for lm in (model.eval(), tiny_model):
        with torch.no_grad():
            batch = lm.collate(prompts[:1], media[:1], ["The dog sounds."])
            losses.append(lm.token_losses(batch))
    # six more tokens share the probability
    torch.testing.assert_close(*losses, atol=2e-2, rtol=1e-2)


def test_saved_and_loaded(masked, tmp_path):
    model, prompts, media = masked
    model.mask_branch.requires_grad_(True)
    model.save_trained(tmp_path)
    model.mask_branch.requires_grad_(False)
    torch.manual_seed(5)
    other = load_model(BackboneConfig(), DECODER)
    other.load_trained(tmp_path)
    masks = []
    for saved in (model, other):
        batch = saved.eval().collate(prompts, media, ANSWERS)
        masks.append(saved.predict_masks(batch, [False] * 3))
    for before, after in zip(masks[0][:2], masks[1][:2]):
        assert torch.equal(before, after)


def test_backbone_without_a_decoder_is_refused():
    with pytest.raises(ModelError, match="--backbone composed"):
        load_model(BackboneConfig(backbone="omni", weights="tiny-random"), DECODER)


# --- data -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train", "test"])
def test_samples_with_masks(small_world, split):
    for s in add_mask_tokens(read_samples(small_world, list(TASKS), split)):
        answer = s.task.parse(s.target) if s.target else s.gold
        has_mask = bool(s.task.mask_head) and bool(answer.boxes)
        assert bool(s.mask) == has_mask
        assert (MASK_TOKENS[0] in s.target) == (has_mask and split == "train")
        if has_mask:
            assert gold_mask(s).shape == (96, 96) and gold_mask(s).dtype == bool
            assert gold_mask(s, 224).shape == (224, 224)
            assert not answer.error  # mask tokens do not disturb the text's own answer


def test_swapped_sound_means_the_other_thing(tmp_path):
    world = WorldConfig(world_clips=8, world_test=12)
    root = build_world(world, 0, tmp_path, still=True)
    samples = {s.id: s for s in read_samples(root, ["s4"], "test")}
    changed = swap_audio(list(samples.values()))
    assert changed
    for s in changed:
        before = samples[s.id]
        sounding, silent = before.row["a_obj"], before.row["silent"]
        assert s.row["a_obj"] in silent and list(s.gold.boxes[0]) == silent[s.row["a_obj"]]
        assert s.row["silent"][sounding] == before.gold.boxes[0]
        sound_before, sound = (next(p for p in x.media if p.kind == "audio") for x in (before, s))
        assert sound.path != sound_before.path and Path(sound.path).exists()
        images = [[p for p in x.media if p.kind == "image"] for x in (before, s)]
        assert images[0] == images[1]


def test_a_mask_of_another_size_than_its_image(tmp_path, small_world):
    s = next(s for s in add_mask_tokens(read_samples(small_world, ["s4"], "test")))
    larger = np.kron(np.asarray(Image.open(s.mask)), np.ones((2, 3), np.uint8))
    Image.fromarray(larger).save(tmp_path / "0.png")
    other = dataclasses.replace(s, mask=str(tmp_path / "0.png"))
    assert gold_mask(other).shape == (192, 288)
    assert np.array_equal(gold_mask(other, 96), gold_mask(s))


def test_training_row_without_a_mask_file_is_trained_on_text(small_world, monkeypatch):
    samples = read_samples(small_world, ["s4"], "train")
    lost = mask_path(Path(samples[0].media[0].path), "s4", samples[0].row)
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path != str(lost) and exists(path))
    s = add_mask_tokens(samples)[0]
    assert s.mask == "" and gold_mask(s) is None and s.target.endswith(MASK_TOKENS[-1])


def test_classes_of_avss_by_its_palette():
    """PASCAL VOC's: 1 is dark red, 14 (64, 128, 128); an unknown grey is no class."""
    colours = [[[0, 0, 0], [128, 0, 0], [64, 128, 128], [9, 9, 9]]]
    assert mask_classes(np.array(colours, np.uint8)).tolist() == [[0, 1, 14, -1]]


# --- scores ---------------------------------------------------------------------------------------
def test_scores_of_perfect_absent_and_denied(small_world):
    samples = add_mask_tokens(read_samples(small_world, ["s4", "ref_avs"], "test"))
    # an expression that means nothing there
    samples.append(dataclasses.replace(samples[-1], id="ref_avs/test/none", mask=""))
    golds = [gold_mask(s) for s in samples]
    perfect = [None if gold is None else gold.astype(np.float32) for gold in golds]
    scores = score_masks(samples, perfect)
    s4, ref_avs = scores["s4"], scores["ref_avs"]
    assert s4["coverage"] == 1 and s4["miou"] > 0.9 and s4["hard_f"] > 0.9
    assert ref_avs["null_s"] == ref_avs["null_s_background"] == 0 and ref_avs["null_n"] > 0

    # answers without a mask are scored, not left out
    nothing = score_masks(samples, [None] * len(samples))["s4"]
    assert nothing["coverage"] == nothing["miou"] == nothing["hard_miou"] == 0
    assert nothing["n"] == s4["n"]

    # a quarter of the image where there is nothing
    quarter = np.zeros((224, 224))
    quarter[:112, :112] = 1
    everywhere = score_masks(samples, [quarter] * len(samples))["ref_avs"]
    assert everywhere["null_s"] == pytest.approx(0.5)
    assert everywhere["null_s_background"] == pytest.approx((1 / 3) ** 0.5)


def test_the_splits_of_ref_avs_are_scored_apart(small_world):
    samples = add_mask_tokens(read_samples(small_world, ["ref_avs"], "test"))
    there = next(sample for sample in samples if gold_mask(sample) is not None)
    rows = []
    for split, mask in (("test_s", there.mask), ("test_u", there.mask), ("test_n", "")):
        row = {**there.row, "split": split}
        gold = there.gold if mask else Answer(exists=False)
        rows.append(dataclasses.replace(there, row=row, mask=mask, gold=gold))
    perfect = gold_mask(there).astype(np.float32)
    scores = score_masks(rows, [perfect, None, perfect])
    assert scores["ref_avs seen"]["miou"] > 0.9 and scores["ref_avs unseen"]["miou"] == 0
    assert scores["ref_avs null"]["null_s"] > 0 and scores["ref_avs null"]["n"] == 0

    text = there.task.format(there.gold)
    types = score_all(rows, [text, "<answer> false</answer>", text])["ref_avs"]["types"]
    assert [types[name]["metric"] for name in ("seen", "unseen", "null")] == [1, 0, 0]


# --- SAM2 -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    """A tiny random SAM2 in a folder, as a checkpoint lies on the hub."""
    folder = tmp_path_factory.mktemp("sam2")
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[128, 128],
        blocks_per_stage=[1] * 4,
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 4],
        global_attention_blocks=[],
        window_size_per_stage=[8, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32] * 2, [16] * 2, [8] * 2],
        fpn_hidden_size=32,
    )
    prompts = Sam2PromptEncoderConfig(hidden_size=32, image_size=128)
    decoder = Sam2MaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32
    )
    config = Sam2Config(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    torch.manual_seed(0)
    Sam2Model(config).save_pretrained(folder)
    images = Sam2ImageProcessor(size={"height": 128, "width": 128})
    Sam2Processor(image_processor=images, target_size=128).save_pretrained(folder)
    return Sam2(str(folder))


def test_sam2_each_object_by_its_own_points(sam2):
    """Several objects at once are as each alone; the image is encoded once."""
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    objects = [
        ((10, 20, 100, 120), [(30, 40), (50, 60)]),
        ((0, 0, 224, 224), []),
        ((120, 100, 200, 210), [(150, 150), (160, 170)]),
    ]
    calls, encode = [], sam2.model.get_image_embeddings
    sam2.model.get_image_embeddings = lambda pixels: calls.append(1) or encode(pixels)
    masks = sam2.masks(image, objects)
    assert len(calls) == 1 and masks.shape == (3, 60, 100) and masks.dtype == bool
    del sam2.model.get_image_embeddings
    for mask, box_and_points in zip(masks, objects):
        assert (sam2.masks(image, [box_and_points])[0] == mask).mean() > 0.999
    assert sam2.masks(image, []).shape == (0, 60, 100)
    many = [((k, k, k + 20, k + 20), [(k + 5, k + 5)]) for k in range(50)]
    assert sam2.masks(image, many).shape == (50, 60, 100)


def test_sam2_from_text_to_score(sam2, small_world):
    """Unparsed, denied and empty answers are scored; a box outside is no answer."""
    s4 = add_mask_tokens(read_samples(small_world, ["s4"], "test"), in_target=False)[:1] * 4
    texts = [
        "The dog is at [10,20,90,100] points [40,50],[60,70].",
        "a dog",
        "[10,20,900,100]",
        "",
    ]
    masks = masks_from_boxes(s4, texts, sam2)
    assert masks[0].shape == (96, 96) and masks[1:] == [None, None, None]
    scores = score_masks(s4, masks)["s4"]
    assert scores["coverage"] == 0.25 and scores["n"] == 4
    ref = add_mask_tokens(read_samples(small_world, ["ref_avs"], "test"), in_target=False)[:1]
    (denied,) = masks_from_boxes(ref, ["<answer> false</answer>"], sam2)
    assert denied.shape == (96, 96) and not denied.any()


def test_sam2_that_is_not_there_says_what_to_get():
    with pytest.raises(ModelError, match="hf download /no/such/sam2"):
        Sam2("/no/such/sam2")


def test_box_as_a_mask():
    answer = TASKS["s4"].parse("[56,0,112,224] [0,0,1,1]")
    mask = box_mask(answer, 8, 8)
    assert mask[:, 2:4].all() and mask.sum() == 16 + 1


# --- the stage ------------------------------------------------------------------------------------
def train_command(world: Path, out: str) -> list[str]:
    data = f"--data {world} --tasks s4,ref_avs --test-rows 2"
    return f"crab-tiny --stage masks {data} --steps 4 --text-steps 2 --out {out}".split()


@pytest.fixture(scope="module")
def mask_run(small_world, tmp_path_factory) -> Path:
    """A run that learns the text of the answers in two steps, and masks in two more."""
    run = tmp_path_factory.mktemp("masks") / "run"
    assert train.main(train_command(small_world, str(run))) == 0
    return run


def test_the_stage_trains_connectors_with_the_text_and_then_the_decoder(mask_run):
    scores = json.loads((mask_run / "metrics.json").read_text())["masks"]
    assert set(scores) == {"s4", "ref_avs"}
    assert scores["s4"]["n"] > 0 and 0 <= scores["s4"]["miou"] <= 1
    parts = {file.stem: load_file(file) for file in (mask_run / "parts").iterdir()}
    # the positional encodings are saved too
    encodings = {name for name in parts["mask_decoder"] if name.startswith("decoder.places")}
    assert encodings == {"decoder.places.0.matrix", "decoder.places.1.matrix"}

    # it starts from the shipped run, whose embeddings go on as they are
    start = load_model(BackboneConfig())
    start.load_trained(ASSETS / "crab_plus-tiny")
    unchanged = set()
    for name, module in start.trainable_modules().items():
        state = module.state_dict()
        if name in parts and all(torch.equal(parts[name][key], state[key]) for key in state):
            unchanged.add(name)
    assert unchanged == {"embeddings"}
    assert parts.keys() >= {"visual_qformer", "audio_qformer", "time", "number"}


def test_a_run_killed_while_the_decoder_learns_continues_with_the_same_losses(
    mask_run, small_world, tmp_path, monkeypatch
):
    """The LM has read the answers with what the first phase made of adapter and connectors."""
    update, calls = trainer.update, []

    def interrupted(*arguments) -> float:
        calls.append(1)
        if len(calls) == 4:  # the second step of the second phase
            raise KeyboardInterrupt
        return update(*arguments)

    command = [*train_command(small_world, str(tmp_path / "cut")), "--save-every", "1"]
    monkeypatch.setattr(trainer, "update", interrupted)
    assert train.main(command) == 130
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_3"]
    monkeypatch.undo()
    assert train.main(command) == 0

    logs = []
    for run in (mask_run, tmp_path / "cut"):
        with open(run / "log.csv", encoding="utf-8") as file:
            logs.append([(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)])
    assert logs[0] == logs[1] and len(logs[0]) == 4
    for part in ("mask_decoder", "visual_qformer"):
        file = f"parts/{part}.safetensors"
        whole, cut = load_file(mask_run / file), load_file(tmp_path / "cut" / file)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_masks_of_a_run_are_made_again_by_infer(mask_run, small_world, tmp_path):
    data = f"--data {small_world} --tasks s4,ref_avs --test-rows 2"
    evaluate = f"--eval --run {mask_run} {data} --out"
    assert infer.main([*evaluate.split(), str(tmp_path / "decoder")]) == 0
    assert infer.main([*evaluate.split(), str(tmp_path / "boxes"), "--masks", "box"]) == 0
    before, again, boxes = (
        json.loads((folder / "metrics.json").read_text())["masks"]
        for folder in (mask_run, tmp_path / "decoder", tmp_path / "boxes")
    )
    assert again["s4"]["miou"] == pytest.approx(before["s4"]["miou"], abs=1e-3)
    assert boxes["s4"]["coverage"] > 0.5


def test_infer_draws_a_mask_or_says_what_it_lacks(
    mask_run, small_world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    s = read_samples(small_world, ["s4"], "test")[0]
    paths = {p.kind: p.path for p in s.media}
    clip = ["--image", paths["image"], "--audio", paths["audio"]]
    ask = ["--task", "s4", *clip, "--json", "--run", str(mask_run), "--picture", "p.png"]
    assert infer.main([*ask, "--masks", "box"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["error"] or Image.open(reply["mask"]).size == (224, 224)
    assert infer.main([*ask, "--masks", "sam2", "--sam2", str(tmp_path / "none")]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert "SAM2" in reply["no_mask"] and Path("p.png").exists()

    # a run without a decoder
    split = ["--eval", "--data", str(small_world), "--masks", "decoder"]
    assert infer.main([*split, "--run", str(ASSETS / "crab_plus-tiny"), "--out", "eval"]) == 2
    assert "--stage masks" in capsys.readouterr().err and not Path("eval").exists()


def test_steps_of_text_leave_some_for_the_masks(small_world, tmp_path, capsys):
    command = train_command(small_world, str(tmp_path / "run"))
    assert train.main([*command, "--text-steps", "4"]) == 2
    assert "of 4 steps none is left for the masks" in capsys.readouterr().err
    # the settings alone tell it: no model is loaded, no row is read
    nothing = f"crab-tiny --stage masks --steps 9 --text-steps 9 --data {tmp_path}/nothing"
    assert train.main([*nothing.split(), "--init-from", "", "--base", "nothing"]) == 2
    assert "of 9 steps none is left for the masks" in capsys.readouterr().err
    assert train.main(["crab-tiny", "--stage", "unified", "--text-steps", "4"]) == 2
    assert "--text-steps wants --stage masks" in capsys.readouterr().err
