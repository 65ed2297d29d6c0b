"""Several processes, one model: what the engines (Accelerate, Transformers, torch) lack for fast attention.

sequence*   a sequence over several processes: Window exchanges halos, Nystrom landmarks, Performer running states
pipeline*   the layers over several processes, trained by torch.distributed.pipelining
estimate*   memory and time of a layout, on paper
"""
