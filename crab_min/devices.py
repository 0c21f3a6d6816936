"""The device of a process, and the precision of the products on it.

    device    training             encoding, generating, ranking, masks
    CUDA      bfloat16 autocast    bfloat16 autocast
    CPU       bfloat16 autocast    float32
    MPS       float32              float32

Autocast needs hardware with fast bfloat16 products (NVIDIA Ampere and newer, CPUs with AVX-512
BF16). It is off elsewhere, and with --no-bf16. Products of float32 matrices use TF32 on CUDA. A CPU
does not answer in bfloat16, so that the tiny presets answer alike on every processor. MPS is taken
where --device asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crab_min.errors import RunError


def choose_device(name: str = "", weights: str = "") -> torch.device:
    """Choose the device of this process: CUDA if it is there, else the CPU.

    Args:
        name: "cuda", "cpu" or "mps" of --device; "" chooses.
        weights: pretrained weights of the LM, which are not put on a CPU unasked; "" for none.

    Raises:
        RunError: no such device, one that torch cannot use, or one too slow for the weights.
    """
    has_cuda = torch.cuda.is_available()
    available = {"cpu": True, "cuda": has_cuda, "mps": torch.backends.mps.is_available()}
    gpus = torch.cuda.device_count()

    # the driver counts NVIDIA's GPUs, and yet this torch cannot use them
    if gpus and not has_cuda and name in ("", "cuda"):
        raise RunError(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use the GPU "
            f"that the driver reports (number of GPUs: {gpus}). Mostly the driver is too old: "
            "update it, or install an older build: pip install torch torchvision torchaudio "
            "--index-url https://download.pytorch.org/whl/cu126, or give --device cpu"
        )
    if name and not available[name]:
        others = [other for other, is_there in available.items() if is_there]
        raise RunError(f"--device {name}: not on this machine, which has {', '.join(others)}")
    if weights and not name and not has_cuda:
        other = "; --device mps uses Apple's GPU" if available["mps"] else ""
        raise RunError(
            f"{weights}: pretrained weights, and torch finds no NVIDIA GPU on this machine; give "
            f"--device cpu to run them on the CPU, which takes minutes per answer{other}"
        )

    device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def describe_device(device: torch.device) -> str:
    """Name a device, and the memory of a GPU."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 1e9:.0f} GB)"


def free_memory() -> None:
    """Return what torch keeps of freed tensors to the device, after an out-of-memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def bf16_autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Return a context for matrix products in bfloat16, where the hardware has them."""
    if device.type == "meta":  # --plan counts shapes
        device = torch.device("cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_fast_bf16(device))


def in_float32(device: torch.device) -> torch.autocast:
    """Return a context inside of which nothing is cast to bfloat16."""
    return bf16_autocast(device, wanted=False)


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def one_core_per_thread() -> Iterator[None]:
    """Make each thread that begins in the block compute on one core of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
