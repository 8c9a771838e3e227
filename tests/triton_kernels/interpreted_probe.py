"""Whether Triton's interpreter works at all, asked by without_a_gpu.py: what nearly every kernel does, in little code.

It is Triton's Python on the machine's numpy, and the two need not know each other: with Triton 3.6, numpy 2.5 refuses
loops as long as an argument says.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _sums_kernel(x, out, count, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + row * count + at, mask=at < count, other=0.0), 0)
    if total > 0:
        tl.store(out + row, total)


if __name__ == "__main__":
    out = torch.full((2,), -1.0)
    _sums_kernel[(2,)](torch.tensor([[1.0, 2, 3], [0, 0, 0]]), out, 3, BLOCK=2)
    assert out.tolist() == [6, -1]
