"""Weights from influence in other people's trainers; each module imports the package that it is for.

`huggingface` has a Trainer, `lightning` a callback. A loop of one's own, also one with Accelerate or under
DistributedDataParallel, needs nothing but `kdaif_fast.distill.InfluenceWeighting`; `examples/` has one of each.
"""
