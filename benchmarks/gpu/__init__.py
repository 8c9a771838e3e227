"""`make gpu`: builds, tests, sanitizes and measures the library on the GPU that is there.

__main__.py is the command: its stages, their clocks and what is written. plan.py says which stages there are, and
processes.py runs them. measuring.py is the process that times: ceilings first, then cases by importance (rows.py,
layers.py, heads.py, steps.py), each by cases.py and timing.py. tables.py makes the page, order.py the order of kernels
that follows from it.
"""
