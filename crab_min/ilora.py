"""I-LoRA, interaction-aware LoRA (Crab 2503.13068, section 3.3; Crab+ 2603.04128), as a method of PEFT.

    y = W x + b + (alpha / r) * sum_k w_k B_k A dropout(x),        w = softmax(R x)

Every adapted linear gets one A (r x in), K heads B_k (out x r) and a router R (K x in). The router looks at each token
by itself and at the input without dropout; its softmax is taken in float32. Every B_k is zero at the start, so a fresh
adapter changes nothing. The heads stand side by side in one matrix B (out x K r), and their sum is one product:

    sum_k w_k B_k (A x) = B [w_1 A x; ...; w_K A x]

Importing this module registers the method, and PEFT does the rest: `get_peft_model(model, ILoraConfig(...))` on any
Hugging Face model, saving, several adapters, switching, disabling, modules_to_save. What differs from the released
code: one dropout mask for all heads, as in the equation and in Crab+ (Crab draws one a head and computes A x K times);
an adapter can be disabled, and one with a single head, which is plain LoRA, can be merged (both releases refuse).

Shapes: (..., D_in) tokens, R rank, K heads.
"""
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import NoMatchingPeftModuleError, register_peft_method
from torch import Tensor, nn
from torch.nn import functional as F


class ILoraError(ValueError):
    """A setting or a module that I-LoRA cannot work with: the value, what was expected, what to do."""


class MergeError(ILoraError, NotImplementedError):
    """A merge that cannot be; also a NotImplementedError, which PEFT raises for methods without merging."""


@dataclass
class ILoraConfig(PeftConfig):
    """Defaults are Crab's; Crab+ takes r 128, alpha 256, dropout .1. Raises ILoraError."""
    r: int = field(default=8, metadata={"help": "rank"})
    alpha: float = field(default=16, metadata={"help": "the update is multiplied by alpha / r"})
    heads: int = field(default=3, metadata={"help": "number of B matrices that the router mixes"})
    dropout: float = field(default=0.05, metadata={"help": "dropout before A; the router sees the input without it"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "linears to adapt: ends of names, a regex of whole names, or all-linear"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linears to leave alone"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "only these layers"})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the layer list that layers_to_transform counts in"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ILORA
        if self.r < 1 or self.heads < 1:
            raise ILoraError(f"r={self.r}, heads={self.heads}: both must be 1 or more")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ILoraError(f"layers_to_transform={self.layers_to_transform} has no effect on target_modules="
                             f"{self.target_modules!r}; put the layers into the regex, or give a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ILoraError(f"layers_pattern={self.layers_pattern!r} has no effect alone; set layers_to_transform too")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)


class ILoraLayer(nn.Module, BaseTunerLayer):
    """A linear and its adapters: `ilora_A`, `ilora_router` and `ilora_B` hold a small linear for each adapter name."""

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("scaling", "ilora_dropout")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: ILoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.ilora_A, self.ilora_B, self.ilora_router, self.ilora_dropout = (nn.ModuleDict() for _ in range(4))
        self.scaling: dict[str, float] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, name: str, config: ILoraConfig) -> None:
        """Add (or start anew) the adapter `name`."""
        d_in, d_out = self.base_layer.in_features, self.base_layer.out_features
        self.ilora_A[name] = nn.Linear(d_in, config.r, bias=False)
        self.ilora_router[name] = nn.Linear(d_in, config.heads, bias=False)
        self.ilora_B[name] = nn.Linear(config.heads * config.r, d_out, bias=False)     # B_k is columns k R to (k + 1) R
        nn.init.kaiming_uniform_(self.ilora_A[name].weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.ilora_router[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.ilora_B[name].weight)
        self.ilora_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[name] = config.alpha / config.r
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)                                         # W x + b
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.ilora_A:
                y = self.add_update(name, x, y)
        return y

    def add_update(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y + (alpha / r) * sum_k w_k B_k A dropout(x) for tokens x (..., D_in), y (..., D_out).

        The last product adds to y as it goes, so that no second array of the size of y is made.
        """
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, self.ilora_A[name].weight.dtype)
        low = self.ilora_A[name](self.ilora_dropout[name](x))                           # (..., R)
        w = route(self.ilora_router[name](x)).to(low.dtype)                             # (..., K)
        mixed = (w[..., None] * low[..., None, :]).reshape(-1, w.shape[-1] * low.shape[-1])                 # (n, K R)
        B = self.ilora_B[name].weight
        if torch.is_autocast_enabled(x.device.type) or y.dtype == mixed.dtype:
            return torch.addmm(y.reshape(-1, len(B)), mixed, B.T, alpha=self.scaling[name]).view(y.shape)
        return y + (self.scaling[name] * (mixed @ B.T)).view(y.shape).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight, which only a single head allows. Raises MergeError."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ilora_A]
        for name in names:
            if (heads := self.ilora_router[name].out_features) > 1:
                raise MergeError(f"adapter {name!r} has {heads} heads, and the router mixes them anew for every token, "
                                 f"so no single weight does the same; keep the adapter beside the model, it can be "
                                 f"saved and loaded with PEFT (only an adapter with heads=1 can be merged)")
        for name in names:
            weight = self.base_layer.weight.data + self.get_delta_weight(name)
            if safe_merge and not weight.isfinite().all():
                raise MergeError(f"adapter {name!r}: merged weights would not be finite; train it again, or take an "
                                 f"earlier state")
            self.base_layer.weight.data = weight
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.weight.data -= self.get_delta_weight(self.merged_adapters.pop())

    def get_delta_weight(self, name: str) -> Tensor:
        """(alpha / r) B A (D_out, D_in) of an adapter with one head, whose w is 1."""
        delta = self.scaling[name] * self.ilora_B[name].weight.data @ self.ilora_A[name].weight.data
        return delta.to(self.base_layer.weight.dtype)


class ILoraLinear(ILoraLayer):
    """The layer under the name that PEFT needs: `all-linear` finds an adapted linear by `Linear` in its class name."""


class ILoraModel(BaseTuner):
    """Puts an adapter into every targeted linear; matching, freezing, saving and switching are BaseTuner's."""

    prefix, tuner_layer_cls, target_module_mapping = "ilora_", ILoraLayer, {}

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            ends = Counter(name.split(".")[-1] for name in linears)
            raise ILoraError(f"{error} This model's linears end in {', '.join(f'{end} ({n})' for end, n in ends.items())}; "
                             f"give a list of such ends, or a regex of whole names like {linears[0]!r}") from error

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, ILoraLayer):
            return target.update_layer(adapter_name, peft_config)
        if not isinstance(target, nn.Linear):
            raise ILoraError(f"{current_key} is a {type(target).__name__}, and I-LoRA adapts nn.Linear only; narrow "
                             f"target_modules={peft_config.target_modules} or set exclude_modules")
        layer = ILoraLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def route(logits: Tensor) -> Tensor:
    """w (..., K), float32, of the router's logits R x."""
    return F.softmax(logits, dim=-1, dtype=torch.float32)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep what the routers say: `with record_routing(model) as weights: model(...)`.

    weights: name of the adapted linear in `model` -> w (..., K) of its last forward, float32, without gradient.
    """
    weights, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, ILoraLayer):
            def keep(router, inputs, logits, name=name):
                weights[name] = route(logits.detach())
            hooks += [router.register_forward_hook(keep) for router in layer.ilora_router.values()]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def register() -> None:
    """Make PEFT know the method: its enum is closed, so one member is added; PEFT's own registration does the rest."""
    if "ILORA" not in PeftType.__members__:
        member = str.__new__(PeftType, "ILORA")
        member._name_ = member._value_ = "ILORA"
        setattr(PeftType, "ILORA", member)
        PeftType._member_names_.append("ILORA")
        PeftType._member_map_["ILORA"] = PeftType._value2member_map_["ILORA"] = member
        register_peft_method(name="ilora", config_cls=ILoraConfig, model_cls=ILoraModel)


register()
