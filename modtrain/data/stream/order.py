"""The order of the samples: a pseudo-random permutation per epoch, in constant memory.

A Feistel network (Luby and Rackoff 1988) permutes the numbers of b bits; numbers outside the data
set are put through it again until they fall inside (cycle walking: Black and Rogaway 2002), which
leaves a permutation of the data set. Nothing is stored and any position is found at once, so that a
run resumes at sample 10^12 as fast as at sample 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8
# Few bits give few permutations; with 16 numbers or more, walking costs a small data set nothing.
_FEWEST_BITS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK_64 = (1 << 64) - 1


class SampleOrder:
    """Position in the stream → sample number.

    The position counts samples consumed over all epochs: epoch p // num_samples, and within it the
    p % num_samples-th of a permutation that depends on seed and epoch alone.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"an order of {num_samples} samples")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        bits = max(_FEWEST_BITS, (num_samples - 1).bit_length())
        # Widths of the two halves, in bits; they change places each round.
        self._widths = (bits // 2, bits - bits // 2)

    def lookup(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at ``positions``, in the same shape, both int64."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        if not self.shuffle:
            return np.asarray(offsets)
        seed = _mix(np.array([self.seed & _MASK_64], dtype=np.uint64))
        keys_P = _mix(seed + epochs.ravel().astype(np.uint64) * _GOLDEN)
        numbers_P = self._permute(offsets.ravel().astype(np.uint64), keys_P)
        outside = np.flatnonzero(numbers_P >= self.num_samples)
        while outside.size:
            walked = self._permute(numbers_P[outside], keys_P[outside])
            numbers_P[outside] = walked
            outside = outside[walked >= self.num_samples]
        return numbers_P.astype(np.int64).reshape(epochs.shape)

    def _permute(
        self, numbers_P: NDArray[np.uint64], keys_P: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        left_width, right_width = self._widths
        left = numbers_P >> np.uint64(right_width)
        right = numbers_P & np.uint64((1 << right_width) - 1)
        for _ in range(_NUM_ROUNDS):
            keys_P = keys_P + _GOLDEN
            # The upper bits of a product are its best mixed.
            hashed = _mix(right ^ keys_P) >> np.uint64(64 - left_width)
            left, right = right, left ^ hashed
            left_width, right_width = right_width, left_width
        return (left << np.uint64(right_width)) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of 64 bits to 64, a bijection (splitmix64: Steele et al. 2014). Overflow is meant."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
