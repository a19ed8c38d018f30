"""The GPU at hand: whether there is one, and whether it can still be used."""

import torch


def nvidia_gpu() -> torch.device:
    """The current one; raises ValueError where there is none."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError(f"it needs an NVIDIA GPU that torch can use; torch {torch.__version__} finds none")
    return torch.device("cuda", torch.cuda.current_device())


def context_is_lost() -> bool:
    """Whether an error has left the GPU unusable for this process."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True
