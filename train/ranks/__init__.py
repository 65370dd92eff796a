"""Training on several ranks, the processes that torchrun starts.

place.py     which rank this process is, from torchrun's environment
meet.py      how the ranks find each other
hearts.py    signs of life of each
world.py     what they tell each other, and which of them is gone
step.py      what the ranks add up in a step
trainer.py   a trainer of which rank 0 writes the files
run.py       one SAE on all ranks, each with its part of every batch
"""
