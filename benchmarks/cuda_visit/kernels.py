"""The kernels and the steps as parts of the visit."""

from benchmarks.cuda_visit import agreement, products, speed
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.roofline import Size

TINY = Size(16, 256, 4, 64)


def products_are_right(at: Place) -> bool:
    """The sparse products of every kernel."""
    cases = products.cases()
    return products.check(at.device, at.kernels, cases[3:4] if at.tiny else cases)


def steps_agree(at: Place) -> bool:
    """Training steps of all types."""
    return agreement.check(at.device, at.kernels)


def steps_768(at: Place) -> bool:
    """The usual size."""
    return _time(at, speed.SIZES[0])


def steps_2048(at: Place) -> bool:
    """The large size."""
    return _time(at, speed.SIZES[2])


def steps_k64(at: Place) -> bool:
    """Both sizes, twice as many active latents."""
    return _time(at, speed.SIZES[1], speed.SIZES[3])


def block_sizes(at: Place) -> bool:
    """Block sizes of the kernels, which no time has chosen yet."""
    if at.kernels == ["eager"]:
        print("No Triton on this device: nothing to choose.")
        return True
    from benchmarks.cuda_visit import blocks

    blocks.measure(TINY if at.tiny else speed.SIZES[0], at.device)
    return True


def _time(at: Place, *sizes: Size) -> bool:
    for size in [TINY] if at.tiny else sizes:
        speed.measure(size, at.device, at.kernels)
        print(flush=True)
    return True
