"""Multi-head self-attention on a packed qkv."""


def attention_reference(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [B, H, N, N]
    return (weights @ v).transpose(1, 2).flatten(2)  # [B, N, H*d]


def attention(qkv):
    """[B, N, 3, H, d] -> [B, N, H*d]."""
    return attention_reference(qkv)
