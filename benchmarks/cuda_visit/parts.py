"""The parts of a visit, in the order of their worth: first what only a GPU can show, and whether it is right."""

from benchmarks.cuda_visit.visit import Part

_HERE = "benchmarks.cuda_visit"

PARTS = [
    Part("products", f"{_HERE}.kernels:products_are_right", 60, "sparse products against the CPU"),
    Part("agreement", f"{_HERE}.kernels:steps_agree", 90, "steps of all types against the CPU"),
    Part("resume", f"{_HERE}.resume:run", 150, "runs that are killed and resumed, bitwise"),
    Part("steps-768", f"{_HERE}.kernels:steps_768", 90, "parts and steps, d_in 768, against the roofline"),
    Part("profile", f"{_HERE}.profile:run", 60, "launches, waits and kernels of a step, d_in 768"),
    Part("harvest-bert", f"{_HERE}.harvest:bert", 120, "BERT-base, layer 6, against its bare forward pass"),
    Part("writer", f"{_HERE}.storage:writer", 60, "writing bfloat16 rows"),
    Part("loader", f"{_HERE}.storage:loader", 60, "shuffled batches onto the device"),
    Part("peers", f"{_HERE}.rivals:run", 240, "sparsify, SAELens and dictionary_learning beside ours", ahead=True),
    Part("run", f"{_HERE}.commands:run_against_step", 120, "a whole run against its step"),
    Part("start-up", f"{_HERE}.commands:start_up", 120, "wall clock of the commands beyond their work"),
    Part("steps-2048", f"{_HERE}.kernels:steps_2048", 90, "parts and steps, d_in 2048, against the roofline"),
    Part("sweep", f"{_HERE}.sweeps:run", 90, "eight SAEs in one sweep against their steps alone"),
    Part("harvest-pooled", f"{_HERE}.harvest:pooled", 90, "pooled texts against SentenceTransformer.encode"),
    Part("harvest-llama", f"{_HERE}.harvest:llama", 120, "a 1B Llama, layer 8, against its bare forward pass"),
    Part("steps-k64", f"{_HERE}.kernels:steps_k64", 120, "both sizes again with k 64"),
]
