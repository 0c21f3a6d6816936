"""Several processes on one training run, one per GPU.

They are started by `torchrun --nproc-per-node N train.py ...`.

Every process has the whole model and takes its share of the batches of a step. The trained parts
are small (adapters, connectors), so the model is not wrapped. After the last backward pass of a
step the gradients of all processes are summed in one message, and each process makes the same
update.

A part may be used by no sample of a process, such as an audio Q-Former in a batch without sound. It
adds zeros to the sum; torch's DistributedDataParallel would wait for its gradient forever. A single
process sends no messages.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from crab_min.errors import RunError


def start() -> torch.device:
    """Join the processes that torchrun started, and choose the device of this one.

    Raises:
        RunError: there are more processes than GPUs, or they cannot talk to each other.
    """
    # torchrun sets WORLD_SIZE
    gpus = torch.cuda.device_count()
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if gpus else "cpu")

    # one GPU per process
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if gpus and local_rank >= gpus:
        raise RunError(
            f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on a machine with {gpus} GPUs; "
            f"start one per GPU: torchrun --nproc-per-node {gpus} train.py ..."
        )
    if gpus and not dist.is_nccl_available():
        raise RunError(
            "this torch has no NCCL, by which GPUs talk to each other; install a CUDA build of "
            "torch, or train on one GPU: python train.py ..."
        )
    if gpus:
        torch.cuda.set_device(local_rank)

    # the group of all processes
    if not dist.is_initialized():
        try:
            # they wait an hour for each other, for example while the first one builds the world
            dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(hours=1))
        except (ValueError, RuntimeError) as error:
            raise RunError(
                f"the processes did not find each other ({str(error).splitlines()[0]}); "
                "start them with torchrun, or alone: python train.py ..."
            ) from error
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def end() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def on_first(make: Callable):
    """Let the first process make a value while the others wait.

    Returns the value on all processes.
    """
    values = [make() if rank() == 0 else None]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_all(*numbers: float) -> list[float]:
    """Sum each of the numbers over the processes."""
    return [sum(values) for values in zip(*gather(numbers))]


@torch.no_grad()
def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes, in one message.

    A parameter without a gradient on all processes keeps none, so that the optimizer skips it as it
    would in a single process.
    """
    if count() == 1:
        return

    # one flag per parameter, then all gradients
    has_gradient = [float(p.grad is not None) for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = torch.tensor(has_gradient, device=parameters[0].device)
    message = torch.cat([flags, *(gradient.flatten().float() for gradient in gradients)])
    dist.all_reduce(message)

    # the sums, in the same order
    flags, *sums = message.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, total, anywhere in zip(parameters, sums, flags.tolist()):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if anywhere else None


@torch.no_grad()
def broadcast_parameters(tensors: list[Tensor]) -> None:
    """Overwrite the tensors of every process with those of the first."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def shard(llm: nn.Module) -> None:
    """Distribute the frozen weights of each decoder layer over the processes (FSDP2).

    A process keeps its share, and gathers the other shares while the layer runs. Trained weights
    stay whole on each process, so saving, clipping and `add_gradients` stay the same. All processes
    must run the LM equally often.
    """
    # the layers are the largest list of modules in the LM
    lists = [module for module in llm.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))
    for layer in layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, reshard_after_forward=True, ignored_params=trained)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` has been called on a part of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
