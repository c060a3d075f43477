"""Counter-based random numbers: a draw depends on its key alone, not on the order of draws or on the device.

`key` makes 63 bits of components such as (seed, "mask", epoch, row); `generator` seeds torch with it for a draw on the
CPU; `hashed` makes many numbers of many keys on any device by integer arithmetic alone (SplitMix64: Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators", figure 17), so that CPU and GPU agree to the bit.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*components: int | str) -> int:
    """63 bits that the components determine: rng.key(seed, "mask", epoch, row)."""
    digest = hashlib.blake2b("/".join(map(str, components)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*components: int | str) -> torch.Generator:
    """A CPU generator seeded with `key(*components)`."""
    return torch.Generator().manual_seed(key(*components))


def permutation(size: int, *components: int | str) -> Tensor:
    """(size,) int64: the numbers below `size` in an order that the components determine."""
    return torch.randperm(size, generator=generator(*components))


def hashed(keys: Tensor, *counters: Tensor | int) -> Tensor:
    """int64 in [0, 2**63): one well-mixed number for each broadcast combination of keys and counters."""
    x = keys
    for counter in counters:
        if isinstance(counter, int):  # no tensor of it: a GPU would have to wait for the copy
            x = _mix(x + _signed((counter + 1) * _GOLDEN))
        else:
            x = _mix(x + (counter.long() + 1) * _GOLDEN)
    return _mix(x + _GOLDEN) & 0x7FFF_FFFF_FFFF_FFFF


def uniform(keys: Tensor, *counters: Tensor | int) -> Tensor:
    """float32 in [0, 1): 24 bits of `hashed`."""
    return (hashed(keys, *counters) >> 39).float() * 2.0**-24


def below(limit: Tensor | int, keys: Tensor, *counters: Tensor | int) -> Tensor:
    """int64 in [0, limit); the bias of the modulus is below limit / 2**63."""
    return hashed(keys, *counters) % limit


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _signed(x: int) -> int:
    """The lowest 64 bits as a signed number, as int64 arithmetic wraps."""
    return (x + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def seed_everything(*components: int | str) -> None:
    """Seed torch's default generators (CPU and every GPU) with `key(*components)`: dropout draws from them."""
    torch.manual_seed(key(*components))  # pyright: ignore[reportUnknownMemberType]


def permuted(positions: Tensor, size: int, *components: int | str) -> Tensor:
    """The elements at `positions` (int64, below `size`) of a permutation of `size` rows that the components determine.

    A Feistel network on the smallest even number of bits that holds `size`, repeated while its result is out of range
    (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3). Needs no memory for the
    permutation.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask, round_key = (1 << half) - 1, torch.tensor(key(*components))
    result, out_of_range = positions.clone(), torch.ones_like(positions, dtype=torch.bool)
    while bool(out_of_range.any()):
        left, right = result[out_of_range] >> half, result[out_of_range] & mask
        for round_index in range(8):
            left, right = right, left ^ (hashed(round_key, right, round_index) & mask)
        result[out_of_range] = (left << half) | right
        out_of_range = result >= size
    return result
