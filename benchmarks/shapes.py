"""Named attention shapes, each with its source, and lengths as people write them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What an attention layer fixes; batch is 1 and queries are as many as keys.

    Attributes:
        source: where the numbers come from.
        block_size: queries and keys per block of a block mask.
    """

    source: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int

    def __str__(self) -> str:
        return (
            f"{self.dtype}, batch 1, {self.num_heads} query heads, {self.num_kv_heads} KV heads, "
            f"head_dim {self.head_dim}, {self.block_size}x{self.block_size} blocks"
        )


SHAPES = {
    "llama3_8b": Shape(
        source="Llama 3 8B, arXiv:2407.21783 table 3",
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        block_size=128,
    ),
    "toy": Shape(
        source="none: small enough to try the runner on a CPU",
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        dtype="bfloat16",
        block_size=64,
    ),
}


def parse_length(text: str) -> int:
    """Tokens: "8K" is 8192, "512" is 512."""
    digits = text.removesuffix("K")
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f'length {text!r} is no number of tokens; write it as "512" or "8K"')
    return int(digits) * (1024 if text.endswith("K") else 1)


def format_length(tokens: int) -> str:
    """The inverse of `parse_length`."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
