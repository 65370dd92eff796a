"""Every architecture of the installed transformers: are harvested rows what the model computes for the window alone?

`python -m benchmarks.architectures` builds each from a tiny configuration, harvests rows at the first, a middle and the
last block from ragged texts, and compares them with each window run alone (no padding, no mask, float32). Writes
benchmarks/ARCHITECTURES.md. Takes about 10 minutes on 2 cores.
"""
