"""A device that is not the CPU, with real values, for machines without a GPU.

    set_up()
    with Factories(): model.to("far"); ...

A tensor on it keeps a CPU tensor inside and says that it is on "far". An operator that is given
tensors of both devices raises, as on a GPU. Tensors without dimensions may be on the CPU, and so
may indices. There is no float64 on it, as on Apple's GPUs (MPS).
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
syncs: Counter[str] = Counter()  # how often the CPU waited for the device, by operator
# operators whose result has a size that depends on values
SIZED_BY_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.repeat_interleave}
# operators that may be given tensors of two devices
MOVES = {aten._to_copy, aten.copy_, aten.index, aten.index_put_, aten._index_put_impl_}


class Far(torch.Tensor):
    """A tensor on the device "far"; `near` has its values."""

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        if near.dtype == torch.float64:
            raise TypeError("far has no float64")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device="far:0",
        )
        tensor.near = near
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, *args, **(kwargs or {}))

    def tolist(self) -> list:
        syncs["tolist"] += 1
        return self.near.tolist()

    def __repr__(self) -> str:
        return f"Far({self.near})"


def run(operator, *args, **kwargs):
    """Run an operator on the tensors inside; raise where devices are mixed."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    is_far = any(isinstance(tensor, Far) for tensor in tensors)
    others = [t for t in tensors if not isinstance(t, Far) and t.dim()]
    if is_far and others and operator.overloadpacket not in MOVES:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{operator}: tensors on far, and of shapes {shapes} on the CPU")

    # a factory and a copy name the device of their result
    device = kwargs.get("device")
    to_far = is_far if device is None else torch.device(device).type == "far"
    if is_far and waits(operator.overloadpacket, to_far, args):
        syncs[operator.overloadpacket.__name__] += 1
    if device is not None:
        kwargs["device"] = "cpu"
    near_args, near_kwargs = tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs))
    result = operator(*near_args, **near_kwargs)
    if operator._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]  # in place
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map_only(torch.Tensor, Far, result) if to_far else result


def waits(packet, to_far: bool, args: tuple) -> bool:
    """Tell whether a GPU must have finished before the CPU goes on."""
    if packet is aten.index:  # by a mask: as many rows as there are ones
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    reads = packet in (aten._local_scalar_dense, aten.equal) or packet in SIZED_BY_VALUES
    return reads or not to_far


LIBRARY: list[torch.library.Library] = []  # the registration lasts as long as this object


def set_up() -> None:
    """Register the device, once per process."""
    if LIBRARY:
        return
    _setup_privateuseone_for_python_backend("far")
    LIBRARY.append(torch.library.Library("_", "IMPL"))
    LIBRARY[0].fallback(run, "PrivateUse1")
    torch.far.get_amp_supported_dtype = lambda: [torch.bfloat16]


# what PyTorch makes in C++ as an empty tensor that grows, which no tensor on "far" can
FACTORIES = {torch.tensor, torch.as_tensor, torch.arange, torch.linspace}


class Factories(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and moves them to "far"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in FACTORIES and torch.device(kwargs.get("device") or "cpu").type == "far":
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)
