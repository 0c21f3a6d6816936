"""Tutorial 3: I-LoRA, from the equation to a trained router. Read beside Crab (arXiv 2503.13068), the section on interaction-aware LoRA.

    python tutorials/03_ilora.py                    (about a minute on a CPU; the first time it also builds a world)

LoRA adds one low-rank update to a linear. I-LoRA has several B for one A, and a router that weighs them for every token: one update may
serve video tokens, another the words of an answer. This script computes one by hand, trains the tiny base with LoRA and with I-LoRA on
four tasks, and draws which head serves which tokens.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from crab_min.backbones.composed import load_base
from crab_min.data import read_samples
from crab_min.evaluation.pictures import draw_routing
from crab_min.evaluation.routing import record_routing_stats
from crab_min.features import Features, Mixer
from crab_min.ilora import ILoraConfig, ILoraLinear, route
from crab_min.model import AdapterConfig
from crab_min.world.folders import WorldConfig, build_world

# 1. The equation: y = W x + (alpha / r) * sum_k w_k B_k A x, w = softmax(R x), each token by itself.
torch.manual_seed(0)
linear, x = nn.Linear(6, 4, bias=False), torch.randn(2, 6)                    # two tokens
layer = ILoraLinear(linear, "default", ILoraConfig(r=2, alpha=4, heads=3, dropout=0))
A, R, B = (part["default"].weight for part in (layer.ilora_A, layer.ilora_router, layer.ilora_B))
print(f"A {tuple(A.shape)}, R {tuple(R.shape)}, and three B of (4, 2) side by side: {tuple(B.shape)}")
print(f"fresh, B is zero and nothing changes: {torch.equal(layer(x), linear(x))}")
nn.init.normal_(B)
w = route(x @ R.T)
y = linear(x)
for k in range(3):                                                            # as it reads, head by head
    y = y + 4 / 2 * w[:, k:k + 1] * (x @ A.T @ B[:, 2 * k:2 * k + 2].T)
print(f"w of the two tokens: {[[round(v, 2) for v in row] for row in w.tolist()]}; the layer gives the same in one product: {torch.allclose(layer(x), y, atol=1e-6)}\n")

# 2. One line makes it an adapter of any Hugging Face model.
model = load_base()
adapted = get_peft_model(model.llm, ILoraConfig(r=8, alpha=16, heads=3, target_modules="all-linear"))
adapted.print_trainable_parameters()

# 3. LoRA against I-LoRA: the same rank, the same batches.
STEPS, TASKS = 60, ["a2v", "ks", "avqa", "arig"]
samples = read_samples(build_world(WorldConfig(world_clips=240, world_test=12), seed=0), TASKS, "train", limit=100)
shared = Features(load_base())
shared.prepare(samples)
models = {}
for adapter in ("lora", "ilora"):
    torch.manual_seed(0)
    model = models[adapter] = load_base()
    model.add_adapter(AdapterConfig(adapter=adapter, r=8, alpha=16, dropout=0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=4e-3, weight_decay=0), []
    for _, batch in zip(tqdm(range(STEPS), desc=adapter), Mixer(samples, 12, 0)):
        loss, tokens = model(model.collate([s.parts for s in batch], shared(batch), [s.target for s in batch]))
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / tokens)
    print(f"{adapter:<6} {sum(p.numel() for p in trained):>8,} trained parameters, loss a token {sum(losses[:5]) / 5:.2f} at first, {sum(losses[-10:]) / 10:.2f} in the last ten steps")
print("One seed and sixty steps say which runs, not which is better; I-LoRA of this rank has about twice LoRA's parameters.\n")

# 4. Which head serves which tokens? The router's weights, by task, kind of token, layer and linear.
model, routes = models["ilora"].eval(), {}
for task in TASKS:
    batch = [s for s in samples if s.task.name == task][:24]
    with record_routing_stats(model) as routes[task], torch.no_grad():
        model(model.collate([s.parts for s in batch], shared(batch), [s.target for s in batch]))
print(f"{'task':<6} {'tokens':<7} {'entropy':>7}  most one-sided router (entropy 1: all heads alike; 0: one head alone)")
for task, each in routes.items():
    for kind in dict.fromkeys(kind for kind, *_ in each.share):
        weights = {key[1:]: w for key, w in each.share.items() if key[0] == kind}
        layer, linear = max(weights, key=lambda key: weights[key].max())
        entropy = sum(e for key, e in each.entropy.items() if key[0] == kind) / len(weights)
        print(f"{task:<6} {kind:<7} {entropy:>7.2f}  layer {layer}, {linear}: {' '.join(f'{v:.2f}' for v in weights[layer, linear])}")
draw_routing(Path("answers/tutorial_03.png"), routes)
print("\npicture: answers/tutorial_03.png. What the heads cost in time and memory: benchmarks/RESULTS.md (python benchmarks/ilora.py)")
print("Now set heads=1 in AdapterConfig: the router has nothing to choose, and it is LoRA.")
