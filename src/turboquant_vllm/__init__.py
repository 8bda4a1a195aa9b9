"""4-bit key/value caches for transformers ("TQ4", after TurboQuant), and attention that reads them directly.

from turboquant_vllm import TQ4Codec, tq4_attention

codec = TQ4Codec(head_dim=128, device="cuda")
k, v = codec.compress(keys), codec.compress(values)     # [B, H_kv, N_kv, 128] -> 136 bytes a token and head
out = tq4_attention(q, k, v, codec, is_causal=True)     # [B, H_q, N_q, 128]
"""

from turboquant_vllm.attention import merge_attention_states, tq4_attention
from turboquant_vllm.codebook import Codebook, lloyd_max
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.paged_attention import tq4_paged_attention
from turboquant_vllm.store import tq4_store

__version__ = "2.0.0"

__all__ = [
    "Codebook",
    "PagedTQ4Cache",
    "TQ4Codec",
    "TQ4Keys",
    "TQ4Tensor",
    "__version__",
    "lloyd_max",
    "merge_attention_states",
    "tq4_attention",
    "tq4_paged_attention",
    "tq4_store",
]
