"""Several processes, one a GPU, on one training run: `torchrun --nproc-per-node N train.py ...`. Alone, each function here does the obvious.

Every process has the whole model and takes its share of the batches of a step. What is trained is small (adapters, connectors), so nothing is
wrapped: after the last backward pass of a step the gradients of all processes are added in one message, and each makes the same optimizer step.
A part that no sample of a process went through (an audio Q-Former, in a batch without sound) adds zeros; with torch's
DistributedDataParallel that is an error on one side and waiting without end on the other.
"""
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from crab_min.errors import RunError


def start(patience: timedelta = timedelta(hours=1)) -> torch.device:
    """Meet the processes that torchrun started beside this one; the device of this one. Raises RunError.

    patience: how long one waits for the others, for instance while the first builds the world. One that dies ends all: torchrun sees to it.
    """
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if gpus else "cpu")
    if gpus and local >= gpus:
        raise RunError(f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on a machine with {gpus} GPUs; start one a GPU: torchrun --nproc-per-node {gpus} train.py ...")
    if gpus and not dist.is_nccl_available():
        raise RunError("this torch has no NCCL, by which GPUs talk to each other; install a CUDA build of torch, or train on one GPU: python train.py ...")
    if gpus:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if gpus else "gloo", timeout=patience)
        except (ValueError, RuntimeError) as error:
            raise RunError(f"the processes did not find each other ({str(error).splitlines()[0]}); start them with torchrun, or alone: python train.py ...") from error
    return torch.device("cuda", local) if gpus else torch.device("cpu")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(thing) -> list:
    """What each process has, in the order of their numbers."""
    things = [thing] * count()
    if count() > 1:
        dist.all_gather_object(things, thing)
    return things


def on_first(make: Callable):
    """What the first process makes, for all; the others wait. Where files are made: they are made once."""
    things = [make() if rank() == 0 else None]
    if count() > 1:
        dist.broadcast_object_list(things)
    return things[0]


def sum_all(*numbers: float) -> list[float]:
    """The sums of numbers over the processes."""
    return [sum(each) for each in zip(*gather(numbers))]


@torch.no_grad()
def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes; one that nowhere has any stays None, so that the optimizer passes it over as it would in one process."""
    if count() == 1:
        return
    have = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat([have, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters)])
    dist.all_reduce(flat)
    have, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for p, part, some in zip(parameters, parts, have.tolist()):
        p.grad = part.view_as(p).to(p.dtype) if some else None


@torch.no_grad()
def broadcast_parameters(tensors: list[Tensor]) -> None:
    """The first process's values for all."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def shard(llm: nn.Module) -> None:
    """FSDP2: of the frozen weights of each decoder layer every process keeps its share, and has the others' while the layer works. What is trained stays whole on
    each, so that saving, clipping and `add_gradients` know nothing of this. All processes have to go through the LM equally often."""
    layers = max((m for m in llm.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True, ignored_params={p for p in layer.parameters() if p.requires_grad})


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in model.modules())
