"""provisional"""
from dataclasses import dataclass, field
import torch
from torch import nn
from torch.nn import functional as F
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
import math

@dataclass
class ILoraConfig(PeftConfig):
    r: int = 8
    alpha: float = 16
    heads: int = 3
    dropout: float = 0.0
    target_modules: object = None
    exclude_modules: object = None
    layers_to_transform: object = None
    layers_pattern: object = None
    modules_to_save: object = None
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ILORA
        if isinstance(self.target_modules, list): self.target_modules = set(self.target_modules)

class ILoraLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("r", "scaling", "heads", "ilora_dropout")
    def __init__(self, base_layer, adapter_name, config):
        super().__init__()
        self.base_layer = base_layer
        self.ilora_A, self.ilora_B, self.ilora_router, self.ilora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r, self.scaling, self.heads = {}, {}, {}
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
    def update_layer(self, n, c):
        i, o = self.base_layer.in_features, self.base_layer.out_features
        self.ilora_A[n] = nn.Linear(i, c.r, bias=False); self.ilora_router[n] = nn.Linear(i, c.heads, bias=False)
        self.ilora_B[n] = nn.Linear(c.heads * c.r, o, bias=False); nn.init.zeros_(self.ilora_B[n].weight)
        for m in (self.ilora_A[n], self.ilora_router[n]): nn.init.kaiming_uniform_(m.weight, a=math.sqrt(5))
        self.ilora_dropout[n] = nn.Dropout(c.dropout)
        self.r[n], self.heads[n], self.scaling[n] = c.r, c.heads, c.alpha / c.r
        self._move_adapter_to_device_of_base_layer(n)
        self.set_adapter(self.active_adapters)
    def forward(self, x, *a, **k):
        y = self.base_layer(x, *a, **k)
        if self.disable_adapters: return y
        for n in self.active_adapters:
            if n not in self.ilora_A: continue
            h = self._cast_input_dtype(x, self.ilora_A[n].weight.dtype)
            w = F.softmax(self.ilora_router[n](h).float(), dim=-1).to(h.dtype)
            u = (w.unsqueeze(-1) * self.ilora_A[n](self.ilora_dropout[n](h)).unsqueeze(-2)).flatten(-2)
            y = y + self.scaling[n] * self.ilora_B[n](u).to(y.dtype)
        return y

class ILoraModel(BaseTuner):
    prefix = "ilora_"
    tuner_layer_cls = ILoraLayer
    target_module_mapping = {}
    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kw):
        if isinstance(target, ILoraLayer): return target.update_layer(adapter_name, peft_config)
        new = ILoraLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters: new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

m = str.__new__(PeftType, "ILORA"); m._name_ = m._value_ = "ILORA"; setattr(PeftType, "ILORA", m)
PeftType._member_names_.append("ILORA"); PeftType._member_map_["ILORA"] = m; PeftType._value2member_map_["ILORA"] = m
register_peft_method(name="ilora", config_cls=ILoraConfig, model_cls=ILoraModel)
