"""What a device is called, and what it has units for."""

import os
import shutil

import torch


def find_device(name: str | None = None) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", "mps"); of None, an accelerator if there is one.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on units that are faster than those for float32.

    Where bfloat16 is emulated, they are many times slower. Intel's AVX-512 units for it are slower too, without AMX,
    which a virtual machine may hide: ViT-B/16 gave 0.59 times the images of float32 on Emerald Rapids, with torch 2.13.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    by_intel = cpu_capabilities().get("cpu_name", "").startswith("Intel")
    return _is_cpu_with(device, "amx_bf16", *(() if by_intel else ("avx512_bf16",)))


def has_amx(device: torch.device) -> bool:
    """Whether this is a CPU with AMX, Intel's units for whole matrices in bfloat16."""
    return _is_cpu_with(device, "amx_bf16")


def has_fast_int8(device: torch.device) -> bool:
    """Whether PyTorch multiplies matrices of 8-bit integers on units of their own; on other CPUs it loops over the
    numbers, and takes some 25 times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _is_cpu_with(device, "avx512_vnni", "amx_int8")


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs for this device: of a CPU, a C++ compiler. Other devices fail in the
    first call if they lack something.
    """
    return device.type != "cpu" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _is_cpu_with(device: torch.device, *units: str) -> bool:
    capabilities = cpu_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in units)


def cpu_capabilities() -> dict[str, bool | int | str]:
    """What this CPU has and is called, by PyTorch's names; empty where PyTorch does not know."""
    return getattr(torch.cpu, "get_capabilities", dict)()
