import numpy as np
import quire_attn as qa

q, k, v = (np.random.randn(2, 50, 4, 64).astype(np.float32) for _ in range(3))
out = qa.flash_attn_func(q, k, v, causal=True)
scores = np.einsum("bihd,bjhd->bhij", q, k) / 8 + np.triu(np.full((50, 50), -np.inf), 1)
weights = np.exp(scores - scores.max(-1, keepdims=True))
expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
assert np.abs(out - expected).max() < 1e-5
print(f"quire_attn {qa.__version__}: as NumPy says, to {np.abs(out - expected).max():.1e}")
