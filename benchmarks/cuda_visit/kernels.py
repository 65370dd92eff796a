"""The kernels and the steps as parts of the visit."""

from benchmarks.cuda_visit import agreement, products, speed
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.roofline import Size

TINY = Size(16, 256, 4, 64)


def products_are_right(at: Place) -> bool:
    """The sparse products of every kernel."""
    cases = products.cases()
    return _show(products.check(at.device, at.kernels, cases[3:4] if at.tiny else cases))


def steps_agree(at: Place) -> bool:
    """Training steps of all types."""
    return _show(agreement.check(at.device, at.kernels))


def steps_768(at: Place) -> bool:
    """The usual size."""
    return _time(at, speed.SIZES[0])


def steps_2048(at: Place) -> bool:
    """The large size."""
    return _time(at, speed.SIZES[2])


def steps_k64(at: Place) -> bool:
    """Both sizes, twice as many active latents."""
    return _time(at, speed.SIZES[1], speed.SIZES[3])


def _show(checked: tuple[bool, str]) -> bool:
    passed, text = checked
    print(text, flush=True)
    return passed


def _time(at: Place, *sizes: Size) -> bool:
    for size in [TINY] if at.tiny else sizes:
        print(f"{speed.measure(size, at.device, at.kernels)}\n", flush=True)
    return True
