"""The mask decoder, the mask tokens of an LM, and masks from answer to score."""
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crab_min.backbones import BackboneConfig, load_model
from crab_min.interface import Part
from crab_min.model import AdapterConfig, ModelError
from crab_min.segment import TOKENS, MaskConfig, MaskDecoder, dice_loss, loss_of_masks, mask_loss

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
