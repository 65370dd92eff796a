"""`python -m benchmarks.kernel_resources`: what each Triton kernel needs of a multiprocessor of an H100 or H200.

Needs Triton and no GPU: the kernels are compiled for compute capability 9.0 with the block sizes and numbers of warps
that a step uses. Printed are registers per thread, shared memory of a program, bytes of spilled registers, and how many
of the multiprocessor's 64 warps can be active at once. `make kernels` asserts that nothing is spilled.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.table import markdown

CAPABILITY = 90
REGISTERS, SHARED, WARPS, PROGRAMS = 2**16, 227 * 2**10, 64, 32  # of a multiprocessor; a program takes 1 KB more
TYPES = {
    **dict.fromkeys(("indices", "offsets", "indptr", "starts", "spans", "columns", "kept_columns", "chosen"), "*i64"),
    **dict.fromkeys(("grad", "mean", "square", "weights", "sums", "values", "chosen_values"), "*fp32"),
    **dict.fromkeys(("matrix", "losses", "kept_norms", "bias", "row_slack", "share", "kept_values"), "*fp32"),
    **dict.fromkeys(("table", "out", "rows"), "*fp32"),
    **dict.fromkeys(("rounded", "latents", "entries", "maxima"), "*bf16"),
    **dict.fromkeys(("groups", "numbers"), "*i32"),
    **dict.fromkeys(("squares", "dots"), "*fp32"),
    **dict.fromkeys(("scale", "step_size", "root", "eps", "new_mean", "beta2", "new_square", "decay"), "fp32"),
    **dict.fromkeys(("absent", "underflow", "summing", "tiny"), "fp32"),
}


@dataclass(frozen=True)
class Use:
    """A kernel as a step launches it."""

    module: str
    kernel: str
    constants: Mapping[str, Any]
    n_warps: int
    max_registers: int | None = None
    n_stages: int = 3
    types: Mapping[str, str] = field(default_factory=dict)  # of arguments, where they differ from TYPES


class Resources(NamedTuple):
    """What a program needs."""

    registers: int  # per thread
    shared: int  # bytes
    spilled: int  # bytes per thread
    n_warps: int
    uses_matrix_units: bool
    reads_16_bytes: bool  # at a time, per thread

    @property
    def active_warps(self) -> int:
        """Warps of a multiprocessor that can be active at once. Registers are given to warps in units of 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // per_warp // self.n_warps
        return min(by_registers, SHARED // (self.shared + 1024), WARPS // self.n_warps, PROGRAMS) * self.n_warps


def uses(d_in: int, k: int) -> Iterator[Use]:
    """The kernels of a step at d_in and k."""
    from sae_granary.sae_core.kernels import triton_bag, triton_dot, triton_rows

    block = max(16, min(triton_bag.MAX_BLOCK, 1 << (d_in - 1).bit_length()))
    limits = triton_bag.OPTIONS["num_warps"], triton_bag.OPTIONS.get("maxnreg")
    bags = {"CHUNK": triton_bag.CHUNK, "BLOCK": block, "TILE": triton_bag.TILE}
    dots = {"ENTRIES": triton_dot.ENTRIES, "SPLIT": triton_dot.SPLIT, "BLOCK": block, "ACCUMULATOR": "float32"}
    of_dots = triton_dot.OPTIONS["num_warps"], triton_dot.OPTIONS["maxnreg"]
    for table in ("*fp32", "*bf16"):
        types = {"table": table, "weights": table, "out": table, "columns": table, "rows": table}
        yield Use("triton_bag", "sum_chunks", bags, *limits, types=types)
        yield Use("triton_bag", "sum_bags", {**bags, "SQUARES": False, "DOTS": False}, *limits, types=types)
        yield Use("triton_dot", "dot_at_entries", {**dots, "STEP": 1, "BIAS": False}, *of_dots, types=types)
    types = {"columns": "*fp32", "indices": "*i32"}
    yield Use("triton_dot", "dot_at_entries", {**dots, "STEP": 2, "BIAS": True}, *of_dots, types=types)
    yield Use("triton_bag", "sum_bags", {**bags, "SQUARES": True, "DOTS": True}, *limits)
    sizes = triton_rows._sizes(d_in)
    whole = {"BLOCK": sizes["BLOCK"]}
    sums = {"squares": "*fp64", "grown": "*fp64", "latents": "*i64", "more": "*fp32"}
    for kernel in ("square_rows", "add_rows"):
        yield Use("triton_rows", kernel, {**whole, "PROJECT": True}, sizes["num_warps"], types=sums)
    for unit in (False, True):
        yield Use("triton_rows", "update_rows", {**whole, "UNIT": unit, "DECOUPLED": unit}, sizes["num_warps"])
    yield from _of_screen(d_in, k)


def _of_screen(d_in: int, k: int) -> Iterator[Use]:
    from sae_granary.sae_core.kernels import gpu_screen

    group, room = gpu_screen.GROUP, gpu_screen._power_of_two(gpu_screen.PER_K * k)
    width = gpu_screen._power_of_two(d_in)
    finds = {"BLOCK": gpu_screen.SEARCHED, "TILE": gpu_screen.TILE, "GROUP": group}
    rounds = {"GROUP": group, "BLOCK": min(gpu_screen.ROUNDED, width)}
    yield Use("triton_screen", "round_rows", {"BLOCK": min(1024, width)}, 4)
    for switch in (False, True):
        latents = {"bound": "*fp32", "shifted": "*fp32"}
        yield Use("triton_screen", "round_latents", {**rounds, "SHIFT": switch}, 4, types=latents)
        constants = {**gpu_screen.BLOCKS, "GROUP": group, "MAGNITUDE": switch, "STORE": True, "FIND_TOP": not switch}
        constants["WIDEN"] = False
        yield Use("triton_screen", "product", constants, gpu_screen.PRODUCT["num_warps"], types={"rows": "*bf16"})
        search = {**finds, "SEARCH": switch, "BINS": 0 if switch else gpu_screen.BINS}
        yield Use("triton_select", "find", search, 4, types={"columns": "*i32", "counts": "*i64"})
        largest = {"WIDTH": room, "SLOTS": gpu_screen._power_of_two(k), "MAGNITUDE": switch}
        yield Use("triton_select", "choose_largest", largest, gpu_screen._warps(room), types={"columns": "*i32"})
    for of_bound in ("TIES", "PER_LATENT", None):
        kept = {"BLOCK": gpu_screen.KEPT} | {name: name == of_bound for name in ("TIES", "PER_LATENT")}
        types = {"columns": "*i32", "counts": "*i64", "rows": "*i64", "bound": "*fp32" if of_bound else "fp32"}
        yield Use("triton_select", "count_wanted", kept, 1, types=types)
        yield Use("triton_select", "keep_wanted", kept, 1, types=types)
    unbinned = {**finds, "SEARCH": False, "BINS": 0}
    yield Use("triton_select", "find", unbinned, 4, types={"columns": "*i32", "counts": "*i64"})
    counts = {"BINS": gpu_screen.BINS, "BLOCK": gpu_screen.COUNTED}
    yield Use("triton_screen", "histogram", counts, 4, types={"counts": "*i64"})


def compile_use(use: Use) -> Resources:
    """Compile a kernel and read what the assembler says of it."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"sae_granary.sae_core.kernels.{use.module}"), use.kernel)
    # A launch compiles arguments that are 1 in: what is read is contiguous, and only then takes 16 bytes at a time.
    contiguous = {name: 1 for name in kernel.arg_names if name.endswith("stride_column")}
    constants = contiguous | {
        name: triton.language.float32 if value == "float32" else value for name, value in use.constants.items()
    }
    types = {**TYPES, **use.types}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    numbers = [i for i, n in enumerate(kernel.arg_names) if signature[n] not in ("constexpr", "fp32")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in numbers})
    options = {"num_warps": use.n_warps, "num_stages": use.n_stages, "maxnreg": use.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    shared = max(found["SHARED"], int(compiled.metadata.shared))
    spilled, ptx = found["STACK"] + found["LOCAL"], compiled.asm["ptx"]
    return Resources(found["REG"], shared, spilled, use.n_warps, "wgmma" in ptx, "ld.global.v4.b32" in ptx)


def main() -> int:
    """Print the table for the sizes of `benchmarks.cuda_visit`."""
    rows = []
    for d_in in (768, 2048):
        for use in uses(d_in, 32):
            got = compile_use(use)
            switches = " ".join(name.lower() for name, value in use.constants.items() if value is True)
            name = f"{use.kernel} {switches} {use.types.get('table', '').removeprefix('*')}".rstrip()
            numbers = [use.n_warps, got.registers, got.shared, got.spilled, got.active_warps]
            rows.append([name, str(d_in), *map(str, numbers)])
    print(markdown(["kernel", "d_in", "warps", "registers", "shared", "spilled", "active warps of 64"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
