"""Models without weights: what `--plan` counts parameters and memory on.

Classes and sizes are those of a run, built on the meta device: tensors with a shape and a precision
but without memory. Sizes come from a config.json, where a name is a folder or stands in the hub
cache, or from sizes.py. Nothing is downloaded, tokenizers neither: where there is none, a token of
text is four characters.
"""

from pathlib import Path

import tokenizers
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from crab_min.backbones.sizes import HUB_SIZES
from crab_min.beats import read_file
from crab_min.errors import ModelError


def without_weights(model_class: type[PreTrainedModel], name: str) -> PreTrainedModel:
    """Build a model of transformers in the precision in which it would be loaded.

    Args:
        name: hub id or folder.

    Raises:
        ModelError: its sizes are not known here.
    """
    return model_class(find_config(name, model_class.config_class)).to(torch.bfloat16)


def find_config(name: str, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return the config of a model by hub id or folder.

    Args:
        config_class: its class, or AutoConfig.

    Raises:
        ModelError: neither sizes.py nor this machine has one.
    """
    if name in HUB_SIZES:
        make = AutoConfig.for_model if config_class is AutoConfig else config_class
        return make(**HUB_SIZES[name])
    try:
        return config_class.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: its sizes are not known here, and --plan downloads nothing; give a folder "
            f"with its config.json, or one of {', '.join(HUB_SIZES)}"
        ) from error


def beats_sizes(path: str) -> dict:
    """Return the config of a BEATs checkpoint.

    Without the file it is {}, which stands for that of all published ones.
    """
    return read_file(path)["cfg"] if Path(path).is_file() else {}


def counting_tokenizer(end: str, special: dict[str, str], size: int = 0) -> PreTrainedTokenizerFast:
    """Make a tokenizer that takes four characters of a text for a token.

    Args:
        end: the special token at the end of an answer.
        special: other special tokens by attribute.
        size: of the vocabulary, filled with tokens that occur nowhere.
    """
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": end}
    vocabulary = [*names.values(), *special.values()]
    vocabulary += [f"<{i}>" for i in range(len(vocabulary), size)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    four = tokenizers.Regex(r"[\s\S]{1,4}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(four, "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=special, **names
    )
