"""One small call of every variant of the native decode, for NVIDIA's compute-sanitizer:

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --kernel-name kernel_substring=tq4 --report-api-errors no \\
            python benchmarks/sanitize.py
done
"""

from __future__ import annotations

import torch

from turboquant_vllm import TQ4Codec, reference
from turboquant_vllm.cuda.decode import decode


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for head_dim in (64, 128, 256):
        codec = TQ4Codec(head_dim)
        centroids, rotation = codec.centroids.cuda(), codec.rotation.cuda()
        for group, q_len in ((1, 1), (4, 1), (8, 1), (5, 3), (8, 4)):
            shape = (2, 3, 77)
            k, v = (torch.randint(256, (*shape, head_dim // 2), dtype=torch.uint8) for _ in range(2))
            k_norms, v_norms = (torch.rand(shape) + 1 for _ in range(2))
            q = torch.randn(2, 3 * group, q_len, head_dim).half()
            want, _ = reference.attention(q, k, k_norms, v, v_norms, codec.centroids, codec.rotation, 0.1, True)
            k, k_norms, v, v_norms = (x.cuda() for x in (k, k_norms, v, v_norms))
            for dtype, split_len in ((torch.float16, None), (torch.float16, 32), (torch.bfloat16, None)):
                query = q.to(dtype).cuda()  # written by a copy: initcheck follows the kernels of this project alone
                tensors = (query, k, k_norms, v, v_norms, centroids, rotation)
                out, _ = decode(*tensors, sm_scale=0.1, is_causal=True, split_len=split_len)
                if dtype == torch.float16:
                    worst = max(worst, (out.cpu() - want).abs().max().item() / want.abs().max().item())
    print(f"largest error in float16, relative to the largest magnitude: {worst:.1e}")


if __name__ == "__main__":
    main()
