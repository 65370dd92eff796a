"""The parts of a visit, in the order of their worth: first whether it is right and how fast a step is.

FIRST and SECOND are two visits of at most 7 minutes each, for a machine that is available for 15 minutes.
"""

from benchmarks.cuda_visit.visit import Part

_HERE = "benchmarks.cuda_visit"

FIRST = [
    Part("products", f"{_HERE}.kernels:products_are_right", 45, "sparse products against the CPU"),
    Part("agreement", f"{_HERE}.kernels:steps_agree", 75, "steps of all types against the CPU"),
    Part("steps-768", f"{_HERE}.kernels:steps_768", 90, "steps and their parts, d_in 768, against the roofline"),
    Part("profile", f"{_HERE}.profile:run", 45, "launches, waits and kernels of a step, d_in 768"),
    Part("block-sizes", f"{_HERE}.kernels:block_sizes", 60, "block sizes of the kernels, d_in 768"),
    Part("harvest-bert", f"{_HERE}.harvest:bert", 105, "BERT-base, layer 6, against its bare forward pass"),
]
SECOND = [
    Part("resume", f"{_HERE}.resume:run", 90, "runs that are killed and resumed, bitwise"),
    Part("peers", f"{_HERE}.rivals:run", 165, "sparsify, SAELens and dictionary_learning beside ours", ahead=True),
    Part("run", f"{_HERE}.commands:run_against_step", 90, "a whole run against its step"),
    Part("steps-2048", f"{_HERE}.kernels:steps_2048", 75, "steps and their parts, d_in 2048, against the roofline"),
]
REST = [
    Part("writer", f"{_HERE}.storage:writer", 60, "writing bfloat16 rows"),
    Part("loader", f"{_HERE}.storage:loader", 60, "shuffled batches onto the device"),
    Part("start-up", f"{_HERE}.commands:start_up", 120, "wall clock of the commands beyond their work"),
    Part("sweep", f"{_HERE}.sweeps:run", 90, "eight SAEs in one sweep against their steps alone"),
    Part("harvest-pooled", f"{_HERE}.harvest:pooled", 90, "pooled texts against SentenceTransformer.encode"),
    Part("harvest-llama", f"{_HERE}.harvest:llama", 120, "a 1B Llama, layer 8, against its bare forward pass"),
    Part("steps-k64", f"{_HERE}.kernels:steps_k64", 120, "both sizes again with k 64"),
]
PARTS = [*FIRST, *SECOND, *REST]
VISITS = {"first": FIRST, "second": SECOND, "rest": REST}


def chosen(names: list[str] | None) -> list[Part]:
    """The parts of these names, of parts or of visits, in the order of PARTS; None: all."""
    wanted = {part.name for name in names or VISITS for part in VISITS.get(name, [])} | set(names or [])
    return [part for part in PARTS if part.name in wanted]
