"""I-LoRA, interaction-aware LoRA, as a method of PEFT.

Papers: Crab (2503.13068) and Crab+ (2603.04128), "Interaction-aware LoRA". LoRA adds one low-rank
update to a linear. I-LoRA adds several, which share their matrix A, and a router that weighs them
for every token, so that each head can serve a different audio-visual interaction:

    y = W x + b + (alpha / r) * sum_k w_k B_k A dropout(x),        w = softmax(R x)

    symbol      variable                      shape
    x           x                             (..., D_in)     tokens; any leading axes
    W, b        base_layer                    (D_out, D_in)   frozen
    A           ilora_A[name].weight          (r, D_in)
    B_1 .. B_K  ilora_B[name].weight          (D_out, K r)    side by side; zero at the start
    R           ilora_router[name].weight     (K, D_in)
    w           w                             (..., K)        sums to 1 over the heads
    alpha / r   scaling[name]

Every B_k starts at zero, so a new adapter changes nothing. The router reads each token by itself,
without dropout, and its softmax is taken in float32. With one head w is 1: that is LoRA.

The sum over the heads (`loop_form`) is computed as one product (`stacked_form`):

    sum_k w_k B_k (A x) = [B_1 ... B_K] [w_1 A x; ...; w_K A x]

Importing this module registers the method. PEFT does the rest: `get_peft_model(model,
ILoraConfig(...))` on any Hugging Face model, saving, several adapters, switching, disabling,
modules_to_save.

What differs from the released code: all heads share one dropout mask, as in the equation and in
Crab+ (Crab draws one mask per head and computes A x K times); an adapter can be disabled, and one
with a single head can be merged (both releases refuse).

Page of the course: docs/course/12_crab_ilora.md.
"""

import inspect
import math
import re
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, NoMatchingPeftModuleError, register_peft_method
from torch import Tensor, nn
from torch.nn import functional as F

from crab_min.errors import ModelError


class ILoraError(ModelError):
    """A setting or a module that I-LoRA cannot work with."""


class MergeError(ILoraError, NotImplementedError):
    """An impossible merge; PEFT expects a NotImplementedError for it."""


# --- the equation ---------------------------------------------------------------------------------
def route(logits: Tensor) -> Tensor:
    """Return w = softmax(R x) (..., K) in float32, from the router's logits R x."""
    return F.softmax(logits, dim=-1, dtype=torch.float32)


def loop_form(y: Tensor, low: Tensor, w: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Add the update head by head, as the equation reads; the layer does not use it.

    Args:
        y: output of the frozen linear, W x + b (..., D_out).
        low: A dropout(x) (..., r).
        w: routing weights (..., K).
        B: all heads side by side (D_out, K r).
        scaling: alpha / r.

    Returns:
        y + scaling * sum_k w_k B_k low (..., D_out).
    """
    update = torch.zeros_like(y)
    for k, B_k in enumerate(B.chunk(w.shape[-1], dim=1)):  # B_k (D_out, r)
        update = update + w[..., k : k + 1] * (low @ B_k.T)  # (..., D_out)
    return y + scaling * update


def stacked_form(y: Tensor, low: Tensor, w: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Add the update with one product over all heads; otherwise as `loop_form`."""
    # every head's share of A x, one behind the other: [w_1 A x; ...; w_K A x]
    weighted = w[..., :, None] * low[..., None, :]  # (..., K, r)
    stacked = weighted.reshape(-1, B.shape[1])  # (n, K r)

    # the product adds to y as it goes, so that no second array of the size of y is made
    if torch.is_autocast_enabled(y.device.type) or y.dtype == stacked.dtype:
        return torch.addmm(y.reshape(-1, len(B)), stacked, B.T, alpha=scaling).view(y.shape)
    # addmm wants one type: a half-precision base with a float32 adapter adds in two steps
    return y + (scaling * (stacked @ B.T)).view(y.shape).to(y.dtype)


class ILoraLinear(nn.Module, BaseTunerLayer):
    """A frozen linear and its adapters: one A, router and B per adapter name.

    PEFT's `all-linear` finds it again by "Linear" in its name.
    """

    # PEFT finds the parts of an adapter by these names
    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("scaling", "ilora_dropout")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: "ILoraConfig"):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.ilora_A = nn.ModuleDict()
        self.ilora_B = nn.ModuleDict()
        self.ilora_router = nn.ModuleDict()
        self.ilora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        # state that BaseTunerLayer reads
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, name: str, config: "ILoraConfig") -> None:
        """Add the adapter `name`, or start it anew."""
        self.ilora_A[name] = nn.Linear(self.in_features, config.r, bias=False)
        self.ilora_router[name] = nn.Linear(self.in_features, config.heads, bias=False)
        self.ilora_B[name] = nn.Linear(config.heads * config.r, self.out_features, bias=False)
        self.ilora_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[name] = config.alpha / config.r

        # with every B_k zero a new adapter changes nothing
        nn.init.kaiming_uniform_(self.ilora_A[name].weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.ilora_router[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.ilora_B[name].weight)
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.ilora_B[name].weight, a=math.sqrt(5))

        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        # PEFT's protocol: a disabled adapter does not act, even if it was merged before
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)  # W x + b
        if adapter_names and not self.disable_adapters:
            return self.add_mixed(adapter_names, x, y)
        if self.disable_adapters or self.merged:
            return y
        # usually one; an active adapter need not target this linear
        for name in self.active_adapters:
            if name in self.ilora_A:
                y = self.add_update(name, x, y)
        return y

    def add_update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the update of the adapter `name` for tokens x (..., D_in) to y (..., D_out)."""
        # the adapter of a half-precision base is float32; autocast would cast by itself
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, self.ilora_A[name].weight.dtype)
        low = self.ilora_A[name](self.ilora_dropout[name](x))  # (..., r)
        w = route(self.ilora_router[name](x)).to(low.dtype)  # (..., K)
        return stacked_form(y, low, w, self.ilora_B[name].weight, self.scaling[name])

    def add_mixed(self, adapter_names: list[str], x: Tensor, y: Tensor) -> Tensor:
        """Add to each row of a batch the update of its own adapter.

        Args:
            adapter_names: by sample; "__base__" for none. A sample may have several rows (beams).

        Raises:
            ILoraError: an adapter is merged, or the rows are no multiple of the names.
        """
        repeats, rest = divmod(len(x), len(adapter_names))
        if self.merged or rest:
            raise ILoraError(f"adapter_names={adapter_names}: one name per sample; unmerge first")
        rows = [name for name in adapter_names for _ in range(repeats)]
        for name in set(rows) & self.ilora_A.keys():
            chosen = torch.tensor([name == row for row in rows], device=x.device).nonzero()[:, 0]
            update = self.add_update(name, x[chosen], y[chosen]).to(y.dtype)
            y = y.index_copy(0, chosen, update)
        return y

    # --- merging, possible with one head
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight. Raises MergeError: several heads."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.ilora_A]
        # refuse before anything is changed
        for name in names:
            heads = self.ilora_router[name].out_features
            if heads > 1:
                raise MergeError(
                    f"adapter {name!r} has {heads} heads, and the router mixes them anew for every "
                    f"token, so no single weight does the same; keep the adapter beside the model, "
                    f"PEFT saves and loads it (only an adapter with heads=1 can be merged)"
                )
        for name in names:
            weight = self.base_layer.weight.data + self.get_delta_weight(name)
            if safe_merge and not weight.isfinite().all():
                raise MergeError(
                    f"adapter {name!r}: merged weights would not be finite; train it again, or "
                    f"take an earlier state"
                )
            self.base_layer.weight.data = weight
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.weight.data -= self.get_delta_weight(self.merged_adapters.pop())

    def get_delta_weight(self, name: str) -> Tensor:
        """Return (alpha / r) B A (D_out, D_in) of an adapter with one head, whose w is 1."""
        A, B = self.ilora_A[name].weight.data, self.ilora_B[name].weight.data
        delta = self.scaling[name] * B @ A
        return delta.to(self.base_layer.weight.dtype)


# --- settings -------------------------------------------------------------------------------------
@dataclass
class ILoraConfig(PeftConfig):
    """Sizes and targets of an adapter. Raises ILoraError for settings without sense.

    The defaults are Crab's; Crab+ takes r=128, alpha=256, dropout=0.1.
    """

    r: int = 8  # rank
    alpha: float = 16  # the update is multiplied by alpha / r
    heads: int = 3  # number of B matrices that the router mixes
    dropout: float = 0.05  # before A; the router sees the input without it
    # linears to adapt: ends of names, a regex of whole names, or "all-linear"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # linears to leave alone
    init_weights: bool = True  # False: B is random too, so that a new adapter changes the model
    layers_to_transform: list[int] | int | None = None  # only these layers,
    layers_pattern: list[str] | str | None = None  # counted in the layer list of this name
    modules_to_save: list[str] | None = None  # trained and saved whole

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ILORA
        if self.r < 1 or self.heads < 1:
            raise ILoraError(f"r={self.r}, heads={self.heads}: both must be 1 or more")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ILoraError(
                f"layers_to_transform={self.layers_to_transform} has no effect on target_modules="
                f"{self.target_modules!r}; put the layers into the regex, or give a list of names"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ILoraError(
                f"layers_pattern={self.layers_pattern!r} has no effect alone; "
                f"set layers_to_transform too"
            )


# --- the method in PEFT ---------------------------------------------------------------------------
class ILoraModel(BaseTuner):
    """The method: puts an adapter into every targeted linear, BaseTuner does the rest."""

    prefix = "ilora_"
    tuner_layer_cls = ILoraLinear
    target_module_mapping = {}

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise ILoraError(f"{error} {describe_linears(model)}") from error

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        """Give the adapter's name of each sample to every layer, PEFT's mixed batches."""
        if adapter_names is None:
            yield
            return
        known = {"__base__", *self.peft_config}
        if self.training or not known.issuperset(adapter_names):
            raise ILoraError(
                f"adapter_names={adapter_names}: mixed batches are for model.eval(), and its "
                f"adapters are {', '.join(sorted(known))}"
            )
        add_names = partial(with_names, adapter_names)
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (ILoraLinear, AuxiliaryTrainingWrapper)):
                    hook = module.register_forward_pre_hook(add_names, with_kwargs=True)
                    hooks.enter_context(hook)
            yield

    def _check_merge_allowed(self):
        super()._check_merge_allowed()
        # all layers before the first one is changed
        for name, layer in self.model.named_modules():
            if not isinstance(layer, ILoraLinear):
                continue
            weight = layer.base_layer.weight
            if type(weight.data) is not Tensor or weight.element_size() == 1:
                raise MergeError(
                    f"{name} has quantized weights ({weight.dtype}); merge into the whole base"
                )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        # a further adapter on the same linear
        if isinstance(target, ILoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):
            raise ILoraError(
                f"{current_key} is a {type(target).__name__}, and I-LoRA adapts nn.Linear only; "
                f"narrow target_modules={peft_config.target_modules} or set exclude_modules"
            )
        if reads_weight(type(parent), target_name):
            raise ILoraError(
                f"{current_key}: {type(parent).__name__} reads its weight and never calls it, so "
                "an adapter would not act; leave it out with exclude_modules"
            )
        layer = ILoraLinear(target, adapter_name, peft_config)
        # only the active adapter is trained
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def with_names(names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """Add `adapter_names` to what a layer is called with."""
    return args, {**kwargs, "adapter_names": names}


@lru_cache
def reads_weight(kind: type[nn.Module], name: str) -> bool:
    """Tell whether modules of a class use the weight of their linear `name` without calling it.

    nn.MultiheadAttention does so, nn.TransformerEncoderLayer without gradients, and Mamba.
    """
    use = re.compile(rf"(?<!isinstance\()self\.{name}\.weight\b(?!\.| =)")
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    with suppress(OSError, TypeError):  # a class without source
        return any(use.search(inspect.getsource(base)) for base in bases)
    return False


def describe_linears(model: nn.Module) -> str:
    """Say which linears a model has, for an error about targets that match none."""
    # names end alike in all layers: count each end once
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = Counter(name.split(".")[-1] for name in names)
    listed = ", ".join(f"{end} ({count})" for end, count in ends.items())
    return (
        f"This model's linears end in {listed}; "
        f"give a list of such ends, or a regex of whole names like {names[0]!r}"
    )


def register() -> None:
    """Make PEFT know the method, whose closed enum of methods gets one more member."""
    if "ILORA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "ILORA")
    member._name_ = member._value_ = "ILORA"
    PeftType.ILORA = member
    PeftType._member_names_.append("ILORA")
    PeftType._member_map_["ILORA"] = member
    PeftType._value2member_map_["ILORA"] = member
    register_peft_method(name="ilora", config_cls=ILoraConfig, model_cls=ILoraModel)


register()
