"""The operators of a CPU that vLLM's engine needs, in Python: its wheels for GPUs have none.

VLLM_TARGET_DEVICE=cpu PYTHONPATH=tests python -m pytest -n 0 -p vllm_cpu_operators tests/test_vllm_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("_C", "FRAGMENT")


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        if not hasattr(torch.ops._C, name):
            _library.define(schema)
            _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return define


_operator("init_cpu_memory_env(int[] nodes) -> ()")(lambda nodes: None)
_operator("init_cpu_threads_env(str s) -> str")(lambda s: "")
_operator("greedy_argmax(Tensor x) -> Tensor")(lambda x: x.argmax(-1).view(-1))


@_operator("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor")
def _sample(logits, seeds):
    noise = [torch.empty_like(logits[0]).exponential_(generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return (logits.softmax(-1) / torch.stack(noise)).argmax(-1)


@_operator("compute_slot_mapping_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, int e) -> ()")
def _slots(query_start_loc, positions, block_table, slot_mapping, block_size):
    count = positions.shape[0]
    request = torch.searchsorted(query_start_loc.long(), torch.arange(count), right=True) - 1
    request = request.clamp(0, block_table.shape[0] - 1)
    slot_mapping[:count] = block_table[request, positions // block_size].long() * block_size + positions % block_size
    slot_mapping[count:] = -1


@_operator("rejection_greedy_sample_kernel_impl(Tensor(a!) a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor? f, int g) -> ()")
def _reject(out, cu_num_draft_tokens, draft, target, bonus, is_greedy, max_spec_len):
    start = 0
    for row, stop in enumerate(cu_num_draft_tokens.tolist()):
        is_right = True
        for place in range(stop - start):
            if is_right:
                out[row, place] = target[start + place]
                is_right = bool(draft[start + place] == target[start + place])
        if is_right:
            out[row, stop - start] = bonus.view(-1)[row]
        start = stop


@_operator("eagle_prepare_inputs_padded_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, Tensor(e!) e, int n) -> ()")
def _prepare_inputs(cu_num_draft_tokens, valid_count, query_start_loc, indices_to_sample, num_rejected, num_reqs):
    drafts = cu_num_draft_tokens.diff(prepend=cu_num_draft_tokens.new_zeros(1))[:num_reqs]
    rejected = torch.where(drafts > 0, drafts + 1 - valid_count[:num_reqs], 0)
    num_rejected[:num_reqs] = rejected
    indices_to_sample[:num_reqs] = query_start_loc[1 : num_reqs + 1] - 1 - rejected


@_operator(
    "eagle_prepare_next_token_padded_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, Tensor(e!) e, int v, int s, int n)"
    " -> ()"
)
def _prepare_next_token(sampled, is_discarded, backup, next_token, valid_count, vocab_size, sampled_per_req, num_reqs):
    for row in range(num_reqs):
        tokens = [] if is_discarded[row] else [t for t in sampled[row, :sampled_per_req].tolist() if -1 < t < vocab_size]
        next_token[row] = tokens[-1] if tokens else backup[row]
        valid_count[row] = len(tokens)


@_operator(
    "eagle_step_slot_mapping_metadata_kernel_impl(Tensor a, Tensor b, Tensor(c!) c, Tensor(d!) d, Tensor(e!) e, int f, int g, "
    "int h) -> ()"
)
def _step(positions, block_table, seq_lens, out_positions, out_slots, block_size, max_model_len, pad):
    count = positions.shape[0]
    new = positions + 1
    is_beyond = new >= max_model_len
    new = torch.where(is_beyond, 0, new)
    block = (new // block_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table[torch.arange(count), block].long() * block_size + new % block_size
    out_positions[:count] = new
    out_slots[:count] = torch.where(is_beyond, pad, slots)
    out_slots[count:] = pad
    seq_lens[:count] = torch.where(is_beyond, 1, seq_lens[:count] + 1).clamp(max=max_model_len)


@_operator(
    "copy_and_expand_eagle_inputs_kernel_impl(Tensor a, Tensor b, Tensor c, Tensor(d!) d, Tensor(e!) e, Tensor(f!) f, "
    "Tensor(g!) g, Tensor(h!) h, Tensor(i!) i, Tensor j, Tensor k, int l, int m, int n, int o, bool p) -> ()"
)
def _copy_and_expand(
    ids,
    positions,
    next_ids,
    out_ids,
    out_positions,
    out_is_rejected,
    out_is_masked,
    out_new_indices,
    out_hidden_mapping,
    starts,
    ends,
    padding_id,
    parallel_id,
    total,
    slots,
    shift,
):
    for row, end in enumerate(ends.tolist()):
        start, following = int(starts[row]), int(starts[row + 1])
        valid = end - start + (0 if shift else 1)
        out = start + row * (slots - 1 if shift else slots)
        rejected = following - end - 1
        whole = valid + slots + rejected
        out_ids[out : out + valid] = ids[start + shift : start + shift + valid]
        out_ids[out + valid] = next_ids[row]
        out_ids[out + valid + 1 : out + valid + slots] = parallel_id
        out_ids[out + valid + slots : out + whole] = padding_id
        out_positions[out : out + whole] = positions[start] + torch.arange(whole)
        out_positions[out + valid + slots : out + whole] = 0
        out_is_rejected[out : out + whole] = torch.arange(whole) >= valid + slots
        out_is_masked[out : out + whole] = (torch.arange(whole) > valid) & (torch.arange(whole) < valid + slots)
        out_new_indices[row * slots : (row + 1) * slots] = out + valid + torch.arange(slots)
        if shift:
            out_hidden_mapping[start:following] = out + torch.arange(following - start)


@_operator("prepack_moe_weight(Tensor a, Tensor(b!) b, str c) -> ()")
def _prepack(weight, out, isa):
    out.copy_(weight)


def _gated(x, act):
    if act == "swigluoai":  # as in gpt-oss
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    assert act == "silu", act
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@_operator(
    "cpu_fused_moe(Tensor(a!) a, Tensor b, Tensor c, Tensor d, Tensor? e, Tensor? f, Tensor g, Tensor h, bool i, str j, str k)"
    " -> ()"
)
def _experts(out, x, w13, w2, w13_bias, w2_bias, weights, ids, skip_weights, act, isa):
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        hidden = torch.nn.functional.linear(x[tokens], w13[expert], None if w13_bias is None else w13_bias[expert].to(x.dtype))
        bias = None if w2_bias is None else w2_bias[expert].to(x.dtype)
        result = torch.nn.functional.linear(_gated(hidden, act).to(x.dtype), w2[expert], bias).float()
        total.index_add_(0, tokens, result if skip_weights else result * weights[tokens, places, None].float())
    out.copy_(total)


@_operator(
    "causal_conv1d_update_cpu_vec(Tensor a, Tensor(b!) b, Tensor c, Tensor? d, str? e, Tensor? f, Tensor? g, int h) -> Tensor"
)
def _update_conv(x, conv_state, weight, bias, activation, state_indices, query_start_loc, pad):
    assert x.ndim == 2  # a token of each sequence
    assert query_start_loc is None
    out = torch.zeros_like(x)
    for row, slot in enumerate(state_indices.flatten().tolist()):
        if slot == pad:
            continue
        seen = torch.cat([conv_state[slot], x[row, :, None].to(conv_state.dtype)], -1)
        result = (seen.float() * weight.float()).sum(-1) + (0 if bias is None else bias.float())
        out[row] = torch.nn.functional.silu(result) if activation in ("silu", "swish") else result
        conv_state[slot] = seen[:, 1:]
    return out


def _scan_step(state, x, dt, A, B, C):
    """One token of a sequence: ``state [heads, dim, n]`` anew, and what comes of it; x, dt ``[heads, dim]``."""
    B, C = (one.float().repeat_interleave(len(x) // len(one), 0) for one in (B, C))
    state = state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B[:, None]
    return state, (state * C[:, None]).sum(-1)


@_operator(
    "mamba_chunk_scan_fwd_cpu(Tensor(a!) a, Tensor(b!) b, Tensor c, Tensor d, Tensor e, Tensor f, Tensor g, Tensor? h, "
    "Tensor? i, Tensor j) -> ()"
)
def _scan(out, states, x, dt, A, B, C, D, z, cu_seqlens):
    for row in range(len(cu_seqlens) - 1):
        for token in range(int(cu_seqlens[row]), int(cu_seqlens[row + 1])):
            own = x[token].float()
            step = dt[token, :, None].expand_as(own)
            states[row], y = _scan_step(states[row], own, step, A.float()[:, None, None], B[token], C[token])
            y = y + (0 if D is None else D[:, None] * own)
            out[token] = (y if z is None else y * torch.nn.functional.silu(z[token].float())).view_as(out[token])


@_operator(
    "selective_state_update_cpu(Tensor(a!) a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor f, Tensor? g, Tensor? h, "
    "Tensor? i, bool j, Tensor? k, Tensor? l, int m, Tensor(n!) n, Tensor? o, Tensor? p) -> ()"
)
def _update_state(state, x, dt, A, B, C, D, z, dt_bias, softplus, indices, targets, null, out, accepted, cu_seqlens):
    assert accepted is None  # a token of each sequence
    assert cu_seqlens is None
    for row in range(len(x)):
        slot = row if indices is None else int(indices[row].flatten()[0])
        target = slot if targets is None else int(targets[row].flatten()[0])
        if slot == null:
            continue
        step = dt[row].float() + (0 if dt_bias is None else dt_bias.float())
        step = torch.nn.functional.softplus(step) if softplus else step
        new, y = _scan_step(state[slot].float(), x[row].float(), step, A.float(), B[row], C[row])
        state[target] = new
        y = y + (0 if D is None else D.float() * x[row].float())
        out[row] = y if z is None else y * torch.nn.functional.silu(z[row].float())


from vllm.model_executor.custom_op import CustomOp  # noqa: E402  (needs the operators)

CustomOp.dispatch_forward = lambda self, *args, **kwargs: self.forward_native
