# %% [markdown]
# # 33. What a patch costs, and how it is shared
#
# * Paper: [PAVE](https://arxiv.org/abs/2503.19794), parameters and FLOPs; one LLM, many patches
# * Code: [pave.py](../crab_min/pave.py): `Patch`, `Patches`; [plan.py](../crab_min/tools/plan.py)
# * Read first: [32](32_channels.py)
#
# A patch adds about 0.1 % to the parameters and FLOPs of a 7B model. By hand, with two operations
# for a product and its sum, a patch $C$ wide of $L$ blocks and $K$ side tokens per frame:
#
# $$ \mathrm{parameters} = (V + W + 2) C + L (7 C^2 + 5 C) + 2 C^2 + 2 C + 2 C D + 3 D $$
#
# $$ \mathrm{FLOPs} = 2 T Q (V C + L (5 C^2 + 2 K C) + 2 C^2 + 2 C D)
#    + 2 U S W C + 4 L T K C^2 $$
#
# | symbol | variable | audio |
# |---|---|---|
# | $V$, $W$, $D$ | widths of video, side channel, LLM | 1152, 1024, 3584 |
# | $T$, $Q$ | frames, tokens per frame | 32, 196 |
# | $U$, $S$ | side steps, tokens per step | 59, 1 |

# %%
import sys
from pathlib import Path

sys.path += [".", ".."]  # the repository, from its folder or from tutorials/

from functools import partial
from itertools import product

import torch

from crab_min.backbones.composed import load_base
from crab_min.backbones.load import load_model
from crab_min.config import AdapterConfig, BackboneConfig, SideChannelConfig
from crab_min.evaluation.figures import GREY, TEAL, YELLOW, new_figure, save
from crab_min.pave import Patch, PatchConfig
from crab_min.recipes.pave import RELEASED_SHAPES
from crab_min.tools.measure import operations_of
from crab_min.trained_parts import save_part

# %% [markdown]
# ## Parameters and FLOPs, by the formula and counted
#
# On torch's meta device, which has shapes and no values.

# %%
LLM = {"0.5B": 896, "7B": 3584}  # name -> D
V, C, T, Q, L = 1152, 512, 32, 196, 2
flops = {}
for (llm, D), (channel, (U, S, W)) in product(LLM.items(), RELEASED_SHAPES.items()):
    with torch.device("meta"):
        patch = Patch(PatchConfig(V, W, D, hidden=C, layers=L))
        video, side = torch.empty(1, T, Q, V), torch.empty(1, U, S, W)
    K = -(-U // T) * S  # of the frames with most
    parameters = (V + W + 2) * C + L * (7 * C**2 + 5 * C) + 2 * C**2 + 2 * C + 2 * C * D + 3 * D
    assert parameters == sum(parameter.numel() for parameter in patch.parameters())
    products = T * Q * (V * C + L * (5 * C**2 + 2 * K * C) + 2 * C**2 + 2 * C * D)
    products += U * S * W * C + 2 * L * T * K * C**2
    assert 2 * products == operations_of(partial(patch, video, side))
    flops[f"{llm}, {channel}"] = 2 * products
    print(f"{llm}, {channel}: {parameters:,} parameters, {2 * products / 1e12:.3f} TFLOPs")

# %% [markdown]
# ## Beside the frozen model and LoRA
#
# PAVE trains a LoRA of rank 64 with the patch. It is many times as large, but can be merged into
# the LLM; then it costs nothing. `python train.py pave-7b --plan` counts the operations of the
# frozen model too: 131.8 TFLOPs for a prompt of 6,846 tokens (2026-11-30).

# %%
counts = {}
for llm in LLM:
    name = f"llava-hf/llava-onevision-qwen2-{llm.lower()}-ov-hf"
    large = load_model(BackboneConfig("llava_onevision", weights=name), empty=True)
    counts[f"{llm}, frozen"] = sum(p.numel() for p in large.parameters())
    with torch.device("meta"):
        large.add_adapter(AdapterConfig("lora", r=64, alpha=16))
        large.add_side_channel("audio", 1024, SideChannelConfig(side="audio"))
    named = list(large.named_parameters())
    counts[f"{llm}, LoRA"] = sum(p.numel() for name, p in named if "lora_" in name)
    counts[f"{llm}, patch"] = sum(p.numel() for p in large.patches.parameters())
for title, count in counts.items():
    print(f"{title:<13}{count:>15,}{count / counts[title.split(',')[0] + ', frozen']:>9.2%}")
left, right = (figure := new_figure(9, 3)).subplots(1, 2)
left.barh(list(counts), list(counts.values()), color=[GREY, YELLOW, TEAL] * 2)
left.set(xscale="log", title="parameters", xlim=(1e6, 2e10))
right.barh(list(flops), [count / 1e12 for count in flops.values()], color=TEAL)
right.set(title="TFLOPs of the patch for a clip")
left.invert_yaxis()
right.invert_yaxis()
# figure: left, parameters on a logarithmic axis; right, what the side channels cost in operations
save(figure, Path("answers/33_pave_cost.png"))

# %% [markdown]
# ## A patch is a file
#
# Anyone with the same frozen model adds the file to it: about 18 MB for 7B in half precision.
# Several patches add up: $z + g_1 + g_2$. Other video LLMs take the same class (`Patches.add_to` in
# [composed.py](../crab_min/backbones/composed.py) and [omni.py](../crab_min/backbones/omni.py)).

# %%
mine, yours = load_base(), load_base()
mine.add_side_channel("audio", 128, SideChannelConfig(side="audio", width=128))
torch.nn.init.ones_(mine.patches["audio"].norm.weight)  # as if it had learned
name, folder = "patch_audio", Path("answers/shared_patch")
save_part(folder, name, mine.part_state(name), mine.part_config(name))
file = folder / "parts" / f"{name}.safetensors"
yours.load_patch(file)
z, v, s = torch.randn(10, 6, 192), torch.randn(10, 6, 128), torch.randn(10, 48, 128)
patched = [model.patches.add_to([z], [v], [{"audio": (s, None)}])[0] for model in (mine, yours)]
assert torch.allclose(*patched) and not torch.allclose(patched[0], z)
print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, in float32")

# %% [markdown]
# ## Exercises
#
# 1. A third block, as released for MUSIC-AVQA. Change `196, 2` to `196, 3`; expect
#    `7B, audio: 10,833,920 parameters, 0.110 TFLOPs`.
# 2. A patch half as wide. Change `512, 32` to `256, 32`; expect `7B, audio: 3,454,976 parameters`.
