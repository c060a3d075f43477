"""Random numbers by address: the same draw whoever asks, in any order, on any device.

`key` turns an address such as (seed, "mask", epoch, row) into 63 bits; `generator` seeds torch with it for a draw on
the CPU;
`hashed` spreads many keys into many numbers on any device by integer arithmetic alone (SplitMix64: Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators", figure 17), so that CPU and GPU agree to the bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*address: int | str) -> int:
    """63 bits for an address."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator at an address: rng.generator(seed, "order", epoch)."""
    return torch.Generator().manual_seed(key(*address))


def permutation(size: int, *address: int | str) -> Tensor:
    """(size,) int64: the numbers below `size` in an order that the address alone decides."""
    return torch.randperm(size, generator=generator(*address))


def hashed(keys: Tensor, *counters: Tensor | int) -> Tensor:
    """int64 in [0, 2**63): one well-mixed number for each broadcast combination of keys and counters."""
    x = keys
    for counter in counters:
        x = _mix(x + (torch.as_tensor(counter, dtype=torch.int64, device=keys.device) + 1) * _GOLDEN)
    return _mix(x + _GOLDEN) & 0x7FFF_FFFF_FFFF_FFFF


def uniform(keys: Tensor, *counters: Tensor | int) -> Tensor:
    """float32 in [0, 1): 24 bits of `hashed`."""
    return (hashed(keys, *counters) >> 39).float() * 2.0**-24


def below(limit: Tensor | int, keys: Tensor, *counters: Tensor | int) -> Tensor:
    """int64 in [0, limit); the bias of the remainder is below limit / 2**63."""
    return hashed(keys, *counters) % limit


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def seed_everything(*address: int | str) -> None:
    """Put torch's own generators (CPU and every GPU) at an address: dropout draws from them."""
    torch.manual_seed(key(*address))  # pyright: ignore[reportUnknownMemberType]


def permuted(positions: Tensor, size: int, *address: int | str) -> Tensor:
    """Where each of `positions` (int64, below `size`) goes in a shuffle of `size` rows that the address alone decides.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands inside (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains", section 3): any position of any epoch of any corpus, in no
    memory.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask, secret = (1 << half) - 1, torch.tensor(key(*address))
    result, outside = positions.clone(), torch.ones_like(positions, dtype=torch.bool)
    while bool(outside.any()):
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(8):
            left, right = right, left ^ (hashed(secret, right, turn) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result
