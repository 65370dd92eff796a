"""Where a step's time goes: launches and waits of the host, time of the device by kernel."""

from collections import Counter

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda_visit.kernels import TINY
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.saes import mixtures, settings, start
from benchmarks.cuda_visit.speed import NO_CHANGE, SIZES
from benchmarks.table import markdown
from sae_granary.train.loop import train_step
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

N_STEPS, N_KERNELS = 5, 20
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def run(at: Place) -> bool:
    """Steps of topk and batchtopk, codes in bfloat16 and in float32."""
    for name in ("topk", "batchtopk"):
        for dtype in ("bfloat16", "float32"):
            print(f"{_profile(at, name, dtype)}\n", flush=True)
    return True


def _profile(at: Place, name: str, dtype: str) -> str:
    size = TINY if at.tiny else SIZES[0]
    x = mixtures(size.batch, size.d_in, at.device)
    sae = start(name, size.d_in, size.d_sae, size.k, {"x": x})
    training, batch = Run.create(settings(name, at.device, NO_CHANGE, dtype), sae), RowInput({"x": x})
    for _ in range(3):
        train_step(training, batch)
    at.wait()
    wanted = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not at.tiny)
    with profile(activities=wanted) as profiled:
        for _ in range(N_STEPS):
            train_step(training, batch)
        at.wait()
    calls = Counter(event.name for event in profiled.events() or ())
    spent, times = by_kernel(profiled, at)
    counted = [sum(calls[call] for call in group) / N_STEPS for group in (LAUNCHES, WAITS)]
    title = (
        f"{name}, {dtype}, d_in {size.d_in}, d_sae {size.d_sae}, batch {size.batch}: {counted[0]:.0f} launches, "
        f"{counted[1]:.1f} waits and {sum(spent.values()) / N_STEPS / 1e3:.3f} ms of the device per step."
    )
    rows = [
        [kernel[:70], f"{times[kernel] / N_STEPS:.1f}", f"{microseconds / N_STEPS / 1e3:.3f}"]
        for kernel, microseconds in spent.most_common(N_KERNELS)
    ]
    return f"{title}\n\n{markdown(['kernel', 'calls', 'ms per step'], rows)}"


def by_kernel(profiled: profile, at: Place) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and calls of each kernel; on a CPU, of each operation."""
    device = DeviceType.CPU if at.tiny else DeviceType.CUDA
    spent, times = Counter[str](), Counter[str]()
    for event in profiled.events() or ():
        if event.device_type == device and not event.is_user_annotation:  # those span other events
            spent[event.name] += event.self_cpu_time_total if at.tiny else event.time_range.elapsed_us()
            times[event.name] += 1
    return spent, times
