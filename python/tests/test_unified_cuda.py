"""The cases of vLLM's test_triton_unified_attention, on a GPU.

The grid of its parameters (in vLLM: tests/kernels/attention/test_triton_unified_attention.py):
batches, heads, head sizes, windows, soft caps, fp8 queries. Pages are full of numbers, and block
tables drawn with repetitions, as there.
"""

import itertools

import numpy as np
import pytest
import quire_attn as qa
from conftest import has_cuda

if not has_cuda():
    pytest.skip("no torch with a GPU here", allow_module_level=True)

import torch  # noqa: E402

DEVICE = torch.device("cuda", 0)
BATCHES = ([(1, 1328), (5, 18), (129, 463)], [(1, 523), (1, 37), (1, 2011)])
HEADS = ((4, 4), (8, 2), (5, 1))
HEAD_SIZES = (128, 256)
BLOCK_SIZE = 16
WINDOWS = (None, 64, 128, 256)
SOFT_CAPS = (None, 50.0)
# Few blocks, which sequences share; and so many that addresses need more than 32 bits.
NUM_BLOCKS = (2048, 32768)
SCALE = 0.0883883  # of all head sizes


def attend_exactly(query, lens, key_cache, value_cache, block_table, window, soft_cap):
    """float32: each sequence gathered from its pages, and the whole matrix of scores."""
    group = query.shape[1] // key_cache.shape[2]
    out, first = [], 0
    for (query_len, seq_len), blocks in zip(lens, block_table, strict=True):
        rows = query[first : first + query_len].float().transpose(0, 1)  # [heads, rows, head_size]
        first += query_len
        pages = blocks[: -(-seq_len // BLOCK_SIZE)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:seq_len].float().transpose(0, 1).repeat_interleave(group, 0)
            for cache in (key_cache, value_cache)
        )
        score = rows @ keys.transpose(1, 2) * SCALE
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        position = torch.arange(seq_len - query_len, seq_len, device=DEVICE)[:, None]
        age = position - torch.arange(seq_len, device=DEVICE)[None]
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        weights = score.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append((weights @ values).transpose(0, 1))
    return torch.cat(out)


class Case:
    def __init__(self, lens, heads, head_size, num_blocks, fp8):
        num_heads, num_kv_heads = heads
        self.lens = lens
        torch.manual_seed(0)
        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_size)
        tokens = sum(query_len for query_len, _ in lens)
        with torch.device(DEVICE):
            self.query = torch.randn(tokens, num_heads, head_size, dtype=torch.bfloat16)
            self.key_cache = torch.randn(shape, dtype=torch.bfloat16)
            self.value_cache = torch.randn(shape, dtype=torch.bfloat16)
            self.starts = torch.tensor(
                [0, *itertools.accumulate(m for m, _ in lens)], dtype=torch.int32
            )
            self.seq_lens = torch.tensor([n for _, n in lens], dtype=torch.int32)
            width = -(-max(n for _, n in lens) // BLOCK_SIZE)
            self.table = torch.randint(num_blocks, (len(lens), width), dtype=torch.int32)
            self.out = torch.full_like(self.query, torch.nan)
            self.scales = torch.ones(len(lens), num_kv_heads)
        self.fp8 = fp8
        if fp8:
            dtype = torch.float8_e4m3fn
            self.query, self.key_cache, self.value_cache = (
                x.to(dtype) for x in (self.query, self.key_cache, self.value_cache)
            )

    def call(self, window, soft_cap):
        scale = self.scales[:1, :1].expand(self.scales.shape) if self.fp8 else None
        qa.unified_attention(
            q=self.query, k=self.key_cache, v=self.value_cache, out=self.out,
            cu_seqlens_q=self.starts, seqused_k=self.seq_lens,
            max_seqlen_q=max(m for m, _ in self.lens), max_seqlen_k=max(n for _, n in self.lens),
            softmax_scale=SCALE, causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            block_table=self.table, softcap=soft_cap or 0.0,
            q_descale=self.scales[:1, :1] if self.fp8 else None, k_descale=scale, v_descale=scale,
            kv_quant_mode=1 if self.fp8 else 0,
        )  # fmt: skip
        return self.out


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lens", BATCHES, ids=["mixed", "decode"])
def test_vllms_grid(lens, heads, head_size, num_blocks, fp8):
    case = Case(lens, heads, head_size, num_blocks, fp8)
    worst = 0.0
    for window, soft_cap in itertools.product(WINDOWS, SOFT_CAPS):
        case.out.fill_(torch.nan)
        out = case.call(window, soft_cap).float()
        expected = attend_exactly(
            case.query, lens, case.key_cache, case.value_cache, case.table, window, soft_cap
        )
        where = f"window {window}, soft cap {soft_cap}"
        # vLLM's own bounds.
        atol, rtol = (1.5e-1, 1.5e-1) if fp8 else (1.5e-2, 1e-2)
        torch.testing.assert_close(
            out, expected, atol=atol, rtol=rtol, msg=lambda text, where=where: where + text
        )
        error = ((out - expected).norm() / expected.norm()).item()
        assert error < 1e-2, where  # of the whole; NaN never passes
        worst = max(worst, error)
    assert np.isfinite(worst)
