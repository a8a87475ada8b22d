"""Which loader suits a data set and a machine, with the reason in words. No heavy imports."""

from importlib.util import find_spec

ROOM = 0.7  # share of free memory that a resident set may take; the rest is for the model and its activations


def choose(
    decoded_bytes: int, *, is_jpeg: bool, device: str, free_bytes: int, has_ffcv: bool, has_dali: bool
) -> tuple[str, str]:
    """Name of a loader ("resident" | "ffcv" | "dali") and one sentence why.

    Args:
        decoded_bytes: all pixels of the set, decoded.
        is_jpeg: some images are stored as JPEG.
        device: type of the training device, such as "cpu" or "cuda".
        free_bytes: memory free on that device (host memory for "cpu").
        has_ffcv, has_dali: the packages can be imported.
    """
    size, room = _size(decoded_bytes), _size(int(free_bytes * ROOM))
    if decoded_bytes <= free_bytes * ROOM:
        return "resident", f"{size} of pixels fit in the {room} of {device} memory that may be used"
    too_large = f"{size} of pixels exceed the {room} of {device} memory that may be used"
    if is_jpeg and device == "cuda" and has_dali:
        return "dali", f"{too_large}; DALI decodes JPEG on the GPU"
    if has_ffcv:
        return "ffcv", f"{too_large}; FFCV streams the file"
    if has_dali:
        return "dali", f"{too_large}; FFCV is not installed, DALI streams the file"
    return "resident", f"{too_large}; neither FFCV nor DALI is installed, so set data.memory to mmap"


def installed(package: str) -> bool:
    """True when a package (such as "ffcv" or "nvidia.dali") can be found, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.3g} MB"
