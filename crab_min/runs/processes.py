"""Several processes on one training run, one per GPU.

They are started by `torchrun --nproc-per-node N train.py ...`.

Every process has the whole model and takes its share of the batches of a step. The trained parts
are small (adapters, connectors), so the model is not wrapped. After the last backward pass of a
step the gradients of all processes are summed in a few messages, and each process makes the same
update.

A part may be used by no sample of a process, such as an audio Q-Former in a batch without sound. It
adds zeros to the sum; torch's DistributedDataParallel would wait for its gradient forever. A single
process sends no messages.

Page of the course: docs/course/54_several_gpus.md.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from crab_min.devices import choose_device
from crab_min.errors import RunError

MESSAGE = 2**26  # numbers: 268 MB of float32


def start(device_name: str = "", weights: str = "") -> torch.device:
    """Join the processes that torchrun started, and choose the device of this one.

    Args:
        device_name, weights: as devices.choose_device takes them.

    Raises:
        RunError: no such device, more processes than GPUs, or they cannot talk to each other.
    """
    # torchrun sets WORLD_SIZE
    device = choose_device(device_name, weights)
    if "WORLD_SIZE" not in os.environ:
        return device
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0

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
    return torch.device("cuda", local_rank) if gpus else device


def end() -> None:
    """Leave the process group.

    A process that fails does not call it: while the others wait in a collective it would wait for
    them. It ends, and torchrun ends the others.
    """
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
    """Sum the gradients over the processes, MESSAGE numbers at a time.

    A parameter without a gradient on all processes keeps none, so that the optimizer skips it as it
    would in a single process.
    """
    if count() == 1:
        return

    # where any process has a gradient
    has_gradient = [float(p.grad is not None) for p in parameters]
    flags = torch.tensor(has_gradient, device=parameters[0].device)
    dist.all_reduce(flags)
    learned = [p for p, anywhere in zip(parameters, flags.tolist()) if anywhere]

    # messages: each has at least one parameter, and a copy of it is all that this needs
    messages: list[list[nn.Parameter]] = []
    size = MESSAGE  # the first parameter begins a message
    for parameter in learned:
        if size + parameter.numel() > MESSAGE:
            messages.append([])
            size = 0
        messages[-1].append(parameter)
        size += parameter.numel()
    for together in messages:
        add_gradients_of(together)


def add_gradients_of(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of some parameters over the processes, in one message."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(message)
    sums = message.split([p.numel() for p in parameters])
    for parameter, gradient, total in zip(parameters, gradients, sums):
        parameter.grad = gradient.copy_(total.view_as(gradient))


@torch.no_grad()
def broadcast_parameters(tensors: list[Tensor]) -> None:
    """Overwrite the tensors of every process with those of the first."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def shard(llm: nn.Module) -> None:
    """Distribute the frozen weights of each layer of the LM over the processes (FSDP2).

    A process keeps its share, on its device, and gathers the other shares while the layer runs.
    It is called before the LM is moved to the device, which alone need not hold it, and before
    an adapter is added: what learns stays whole on each process, so saving, clipping and
    `add_gradients` stay the same. All processes must run the LM equally often.

    Raises:
        RunError: there is no process group.
    """
    if not dist.is_initialized():
        raise RunError("--fsdp: several GPUs share the LM; start it with torchrun")
    for stack in stacks(llm):
        for layer in stack_layers(stack):
            fully_shard(layer, reshard_after_forward=True)
        # one root, so that a layer's weights are gathered while the one before it runs
        fully_shard(stack, reshard_after_forward=True, ignored_params=set(stack.parameters()))


def stacks(llm: nn.Module) -> list[nn.Module]:
    """Return an LM's decoder, and before it its encoder if it has one; no head, no media."""
    return [llm.encoder, llm.decoder] if llm.config.is_encoder_decoder else [llm.get_decoder()]


def stack_layers(stack: nn.Module) -> nn.ModuleList:
    """Return the layers of a stack; T5's are blocks."""
    return stack.block if hasattr(stack, "block") else stack.layers
