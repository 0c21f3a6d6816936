"""The mask decoder, the mask tokens of an LM, and masks from answer to score."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
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
from crab_min.answers import MASK_TOKENS
from crab_min.backbones.load import BackboneConfig, load_model
from crab_min.data import MASKED, add_mask_tokens, gold_mask, read_samples, swap_audio
from crab_min.errors import ModelError
from crab_min.evaluation.answering import masks_from_boxes, score_masks
from crab_min.evaluation.sam2 import Sam2, box_mask
from crab_min.interface import PromptPart
from crab_min.masks import MaskConfig, MaskDecoder, dice_loss, loss_of_masks, mask_loss
from crab_min.model import ASSETS, AdapterConfig
from crab_min.sources.av_uie import mask_classes
from crab_min.tasks import TASKS
from crab_min.world.folders import WorldConfig, build_world

SMALL = MaskConfig(width_in=12, width_out=20, width=32, queries=5, feedforward=40, low=16, size=32)


def decoder_input(b: int):
    torch.manual_seed(1)
    return torch.randn(b, 6, 20), [torch.randn(b, 16, 12) for _ in range(2)]


@pytest.mark.parametrize("classes", [False, True])
def test_batched_equals_one_by_one(classes):
    torch.manual_seed(0)
    decoder, (states, features) = MaskDecoder(SMALL).eval(), decoder_input(3)
    with torch.no_grad():
        whole = decoder(states, features, classes)
        assert whole.shape == (3, 71 if classes else 1, 32, 32)
        for i in range(3):
            torch.testing.assert_close(decoder(states[i:i + 1], [f[i:i + 1] for f in features], classes)[0], whole[i], atol=1e-5, rtol=1e-5)


def test_generator_layers_read_what_the_one_before_made():
    """Unchained, as released, only the last layer counts: changing the first changes nothing."""
    torch.manual_seed(0)
    for chained in (True, False):
        decoder, (states, features) = MaskDecoder(dataclasses.replace(SMALL, chained=chained)), decoder_input(1)
        with torch.no_grad():
            before = decoder(states, features)
            decoder.generator[0].mlp[0].bias += 1
            assert torch.equal(decoder(states, features), before) == (not chained)


def test_place_codes_are_saved(tmp_path):
    """The released code draws their matrices anew at each start."""
    torch.manual_seed(0)
    decoder, (states, features) = MaskDecoder(SMALL), decoder_input(1)
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    torch.manual_seed(99)
    other = MaskDecoder(SMALL)
    other.load_state_dict(load_file(tmp_path / "decoder.safetensors"))
    with torch.no_grad():
        assert torch.equal(decoder(states, features), other(states, features))


def test_losses_by_hand():
    """Two pixels, one right at odds e^20 and one at even odds: cross-entropy ln 2 / 2; dice 1 - 2 * 1 / (1.5 + 1)."""
    logits, gold = torch.tensor([[[[20., 0.]]]]), torch.tensor([[[[1., 0.]]]])
    assert dice_loss(logits, gold).item() == pytest.approx(1 - 2 / 2.5, abs=1e-3)
    assert mask_loss(logits, gold, bce=2, dice=0).item() == pytest.approx(np.log(2), abs=1e-4)
    classes = torch.zeros(71, 1, 2)
    classes[3, 0, 0] = 50.
    found = {0: logits[0], 1: classes}
    wanted = {0: gold[0], 1: torch.tensor([[[3, -1]]])}                        # a pixel of no class counts nothing
    assert loss_of_masks(found, wanted, 1, 0).item() == pytest.approx(np.log(2) / 4, abs=1e-4)
    assert loss_of_masks({}, wanted, 1, 0).item() == 0


# --- in the model ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def masked():
    """The shipped base with a small decoder and an adapter, and a batch of two images whose answers end in mask tokens and one whose does not."""
    torch.manual_seed(0)
    model = load_model(BackboneConfig(masks="decoder", mask_width=32, mask_queries=4))
    model.add_adapter(AdapterConfig())
    media = [model.encode("image", [np.random.default_rng(i).integers(0, 256, (1, 96, 96, 3), np.uint8)], [1.]) for i in range(3)]
    return model, [[PromptPart("image"), PromptPart("text", text="\nWhich thing sounds?")]] * 3, media


SAID = [f"The dog sounds. {''.join(MASK_TOKENS)}", f"So the bell and the cat sound. {''.join(MASK_TOKENS)}", "Nothing sounds."]


def test_gradients_reach_all_of_the_branch(masked):
    model, prompts, media = masked
    model.set_trainable("masks")
    batch = model.collate(prompts, media, SAID)
    batch["masks"] = [torch.ones(1, 96, 96), torch.zeros(1, 96, 96), None]
    loss, tokens = model(batch)
    (loss / tokens).backward()
    got = {name for name, p in model.masks.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    model.zero_grad(), model.masks.requires_grad_(False)
    wanted = {"read", "said", *(f"decoder.{name}" for name, _ in model.masks.decoder.named_parameters() if not name.startswith("classes"))}
    idle = ("key.bias", "cross_attention.query.weight", "cross_attention.query.bias", "cross_attention.key.weight")       # see GeneratorLayer
    assert not {name for name in wanted - got if not name.endswith(idle)}


def test_text_and_masks_together_for_any_batch(masked):
    """Masks do not depend on what else is in the batch; an answer without its tokens has none."""
    model, prompts, media = masked
    model.eval()
    whole = model.masks_of(model.collate(prompts, media, SAID), [False] * 3)
    assert whole[2] is None and whole[0].shape == (1, 96, 96)
    for i in range(2):
        alone, = model.masks_of(model.collate(prompts[i:i + 1], media[i:i + 1], SAID[i:i + 1]), [False])
        torch.testing.assert_close(alone, whole[i], atol=1e-4, rtol=1e-4)
    classes, = model.masks_of(model.collate(prompts[:1], media[:1], SAID[:1]), [True])
    assert classes.shape == (71, 96, 96)
    cut, = model.masks_of(model.collate(prompts[:1], media[:1], [SAID[0].replace(MASK_TOKENS[3], "")]), [False])
    assert cut is None
    assert len(model.generate(model.collate(prompts, media), 12)) == 3


def test_tokens_change_nothing_for_who_does_not_use_them(masked, tiny_model):
    """The LM with mask tokens gives other texts the same loss as the LM without."""
    model, prompts, media = masked
    losses = []
    for each in (model.eval(), tiny_model):
        with torch.no_grad():
            losses.append(each.losses(each.collate(prompts[:1], media[:1], ["The dog sounds."])))
    torch.testing.assert_close(*losses, atol=2e-2, rtol=1e-2)                             # six more words share the probability


def test_saved_and_loaded(masked, tmp_path):
    model, prompts, media = masked
    model.masks.requires_grad_(True)
    model.save_trained(tmp_path)
    model.masks.requires_grad_(False)
    torch.manual_seed(5)
    other = load_model(BackboneConfig(masks="decoder", mask_width=32, mask_queries=4))
    other.load_trained(tmp_path)
    batches = [(each.eval(), each.collate(prompts, media, SAID)) for each in (model, other)]
    (a, b, _), (c, d, _) = (each.masks_of(batch, [False] * 3) for each, batch in batches)
    assert torch.equal(a, c) and torch.equal(b, d)


def test_backbone_without_a_decoder_is_refused():
    with pytest.raises(ModelError, match="--backbone composed"):
        load_model(BackboneConfig(backbone="native", weights="tiny-random", masks="decoder"))


# --- data ------------------------------------------------------------------------------------------------------------------
def test_samples_with_masks(small_world):
    for split in ("train", "test"):
        samples = add_mask_tokens(read_samples(small_world, list(TASKS), split))
        for s in samples:
            named = s.task.name in MASKED and bool(s.task.parse(s.target).boxes if s.target else s.gold.boxes)
            assert bool(s.mask) == named and (MASK_TOKENS[0] in s.target) == (named and split == "train")
            if s.mask:
                assert gold_mask(s).shape == (96, 96) and gold_mask(s, 224).shape == (224, 224) and gold_mask(s).dtype == bool
                assert not s.task.parse(s.target).error if s.target else True            # mask tokens do not disturb the text's own answer


def test_swapped_sound_means_the_other_thing(tmp_path):
    root = build_world(WorldConfig(world_clips=8, world_test=40), 0, tmp_path)
    samples = read_samples(root, ["s4"], "test")
    changed = swap_audio(samples)
    assert changed
    for s in changed:
        before = next(x for x in samples if x.id == s.id)
        assert s.row["a_obj"] in before.row["silent"] and list(s.gold.boxes[0]) == before.row["silent"][s.row["a_obj"]]
        assert s.row["silent"][before.row["a_obj"]] == before.gold.boxes[0]
        a, b = ([p for p in x.media if p.kind == "audio"][0] for x in (before, s))
        assert a.path != b.path and Path(b.path).exists()
        assert [p for p in before.media if p.kind == "image"] == [p for p in s.media if p.kind == "image"]


def test_a_mask_of_another_size_than_its_image(tmp_path, small_world):
    s = next(x for x in add_mask_tokens(read_samples(small_world, ["s4"], "test")))
    Image.fromarray(np.kron(np.asarray(Image.open(s.mask)), np.ones((2, 3), np.uint8))).save(tmp_path / "0.png")
    other = dataclasses.replace(s, mask=str(tmp_path / "0.png"))
    assert gold_mask(other).shape == (192, 288) and np.array_equal(gold_mask(other, 96), gold_mask(s))


def test_training_row_without_a_mask_file_is_trained_on_text(small_world, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    s = add_mask_tokens(read_samples(small_world, ["s4"], "train"))[0]
    assert s.mask == "" and gold_mask(s) is None and s.target.endswith(MASK_TOKENS[-1])


def test_classes_of_avss_by_its_palette():
    """PASCAL VOC's: 1 is dark red, 14 (64, 128, 128); a grey of another set is no class."""
    colours = np.array([[[0, 0, 0], [128, 0, 0], [64, 128, 128], [9, 9, 9]]], np.uint8)
    assert mask_classes(colours).tolist() == [[0, 1, 14, -1]]


# --- scores ----------------------------------------------------------------------------------------------------------------
def test_scores_of_perfect_absent_and_denied(small_world):
    samples = add_mask_tokens(read_samples(small_world, ["s4", "ref_avs"], "test"))
    samples.append(dataclasses.replace(samples[-1], id="ref_avs/test/none", mask=""))     # an expression that means nothing there
    perfect = [None if gold_mask(s) is None else gold_mask(s).astype(np.float32) for s in samples]
    scores = score_masks(samples, perfect)
    assert scores["s4"]["coverage"] == 1 and scores["s4"]["miou"] > .9 and scores["s4"]["hard_f"] > .9
    assert scores["ref_avs"]["null_s"] == scores["ref_avs"]["null_s_background"] == 0 and scores["ref_avs"]["null_n"] > 0
    nothing = score_masks(samples, [None] * len(samples))
    assert nothing["s4"]["coverage"] == nothing["s4"]["miou"] == nothing["s4"]["hard_miou"] == 0
    assert nothing["s4"]["n"] == scores["s4"]["n"]                                        # scored, not left out
    quarter = np.zeros((224, 224))
    quarter[:112, :112] = 1
    everywhere = score_masks(samples, [quarter] * len(samples))["ref_avs"]
    assert everywhere["null_s"] == pytest.approx(.5) and everywhere["null_s_background"] == pytest.approx((1 / 3) ** .5)


# --- SAM2 ------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    """A tiny random SAM2 in a folder, as a checkpoint lies on the hub."""
    folder = tmp_path_factory.mktemp("sam2")
    backbone = Sam2HieraDetConfig(hidden_size=8, image_size=[128, 128], blocks_per_stage=[1] * 4, embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 4],
                                  global_attention_blocks=[], window_size_per_stage=[8, 4, 4, 4], window_positional_embedding_background_size=[4, 4])
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[32] * 2, [16] * 2, [8] * 2], fpn_hidden_size=32)
    torch.manual_seed(0)
    Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=128),
                         mask_decoder_config=Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32))).save_pretrained(folder)
    Sam2Processor(image_processor=Sam2ImageProcessor(size={"height": 128, "width": 128}), target_size=128).save_pretrained(folder)
    return Sam2(str(folder))


def test_sam2_each_object_by_its_own_points(sam2):
    """Several objects at once are as each alone; the image is encoded once."""
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    objects = [((10, 20, 100, 120), [(30, 40), (50, 60)]), ((0, 0, 224, 224), []), ((120, 100, 200, 210), [(150, 150), (160, 170)])]
    calls, encode = [], sam2.model.get_image_embeddings
    sam2.model.get_image_embeddings = lambda pixels: calls.append(1) or encode(pixels)
    masks = sam2.masks(image, objects)
    assert len(calls) == 1 and masks.shape == (3, 60, 100) and masks.dtype == bool
    del sam2.model.get_image_embeddings
    for i, each in enumerate(objects):
        assert (sam2.masks(image, [each])[0] == masks[i]).mean() > .999
    assert sam2.masks(image, []).shape == (0, 60, 100)
    assert sam2.masks(image, [((k, k, k + 20, k + 20), [(k + 5, k + 5)]) for k in range(50)]).shape == (50, 60, 100)


def test_sam2_from_text_to_score(sam2, small_world):
    """Unparsed, denied and empty answers are scored; a box outside of the picture is no answer."""
    s4 = add_mask_tokens(read_samples(small_world, ["s4"], "test"), tokens=False)[:1] * 4
    texts = ["The dog is at [10,20,90,100] points [40,50],[60,70].", "a dog", "[10,20,900,100]", ""]
    masks = masks_from_boxes(s4, texts, sam2)
    assert [m is None for m in masks] == [False, True, True, True] and masks[0].shape == (96, 96)
    scores = score_masks(s4, masks)["s4"]
    assert scores["coverage"] == .25 and scores["n"] == 4
    ref = add_mask_tokens(read_samples(small_world, ["ref_avs"], "test"), tokens=False)[:1]
    denied, = masks_from_boxes(ref, ["<answer> false</answer>"], sam2)
    assert denied.shape == (96, 96) and not denied.any()


def test_sam2_that_is_not_there_says_what_to_get():
    with pytest.raises(ModelError, match="hf download /no/such/sam2"):
        Sam2("/no/such/sam2")


def test_box_as_a_mask():
    answer = TASKS["s4"].parse("[56,0,112,224] [0,0,1,1]")
    mask = box_mask(answer, 8, 8)
    assert mask[:, 2:4].all() and mask.sum() == 16 + 1


# --- the stage -------------------------------------------------------------------------------------------------------------
def test_stage_from_command_to_mask(small_world, tmp_path, monkeypatch, capsys):
    """Training, its files, the run's masks again by infer.py, and a mask drawn for one picture; boxes as masks; SAM2 that is not there."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["crab-tiny", "--stage", "masks", "--data", str(small_world), "--tasks", "s4,ref_avs", "--steps", "3", "--text-steps", "1", "--mask-width", "32", "--mask-queries", "4", "--out", "run"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert set(metrics["masks"]) == {"s4", "ref_avs"} and metrics["masks"]["s4"]["n"] > 0 and 0 <= metrics["masks"]["s4"]["miou"] <= 1
    saved = load_file("run/modules.safetensors")
    assert {name for name in saved if name.startswith("masks.decoder.places")} == {"masks.decoder.places.0.matrix", "masks.decoder.places.1.matrix"}
    before = load_file(ASSETS / "crab_plus-tiny" / "modules.safetensors")
    same = {name.split(".")[0] for name in before if torch.equal(saved[name], before[name])} - {name.split(".")[0] for name in before if not torch.equal(saved[name], before[name])}
    assert same == {"words"}                                                  # the connectors learned with the text
    eval_command = ["--eval", "--run", "run", "--data", str(small_world), "--tasks", "s4,ref_avs"]
    for extra in ([], ["--masks", "box", "--out", "boxes"]):
        assert infer.main([*eval_command, *extra]) == 0
    again = json.loads(Path("run/eval_test/metrics.json").read_text())["masks"]
    assert again["s4"]["miou"] == pytest.approx(metrics["masks"]["s4"]["miou"], abs=1e-3)
    assert json.loads(Path("boxes/metrics.json").read_text())["masks"]["s4"]["coverage"] > .5
    s = read_samples(small_world, ["s4"], "test")[0]
    image, sound = (next(p.path for p in s.media if p.kind == kind) for kind in ("image", "audio"))
    ask = ["--task", "s4", "--image", image, "--audio", sound, "--json", "--run", "run", "--picture", "p.png"]
    capsys.readouterr()
    assert infer.main([*ask, "--masks", "box"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["error"] or Image.open(said["mask"]).size == (224, 224)
    assert infer.main([*ask, "--masks", "sam2", "--sam2", str(tmp_path / "none")]) == 0
    assert "SAM2" in json.loads(capsys.readouterr().out)["no_mask"] and Path("p.png").exists()
    assert infer.main(["--eval", "--data", str(small_world), "--masks", "decoder", "--run", str(ASSETS / "crab_plus-tiny")]) == 2
    assert "--stage masks" in capsys.readouterr().err
