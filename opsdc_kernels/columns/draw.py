"""Poisson samples of vocabulary columns: each is in with a probability of its own, and whether it
is follows from a seed, a place and the column alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.columns import compiled

HALVINGS = 14
"""Steps of the search for a threshold: each halves the logarithm of a range of `RANGE`."""
RANGE = 1e8
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_WORD = (1 << 64) - 1


class Sample(NamedTuple):
    """Columns, rising, with the probability π that each had of being here."""

    columns: Tensor
    probability_K: Tensor

    @classmethod
    def drawn(cls, probability_V: Tensor, seed: int, place: int) -> Sample:
        """A sample from these probabilities; waits for the device."""
        numbers = uniforms(seed, place, len(probability_V), probability_V.device)
        columns = (numbers < probability_V).nonzero().squeeze(1)
        return cls(columns, probability_V[columns])

    @property
    def weight_K(self) -> Tensor:
        """The factor a = 1/π of a sum over the sample."""
        return self.probability_K.reciprocal()

    @property
    def doubt_K(self) -> Tensor:
        """The factor (1 − π)/π² of a sum of squares, which is then the variance of such a sum."""
        return (1 - self.probability_K) / self.probability_K.square()


def probabilities(mass_V: Tensor, most: Tensor) -> Tensor:
    """π = min(1, mass/τ) [V] with the largest τ at which Σ (1/π − 1)·mass² is at most `most`: of
    all probabilities with that sum, those of the fewest columns. All 1 where there is no τ within
    `RANGE` of the largest mass."""
    high = mass_V.amax()
    low = high / RANGE
    allowed = torch.zeros_like(high, dtype=torch.bool)
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        within = torch.dot((middle - mass_V).clamp_(min=0), mass_V) <= most
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        allowed |= within
    threshold = torch.where(allowed, low, 0.0)
    return torch.where(mass_V >= threshold, 1.0, mass_V / threshold)


def uniforms(seed: int, place: int, size: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) of the columns [size], float64.

    A counter goes through the finalizer of SplitMix64 (Steele, Lea and Flood 2014): the numbers
    are the same wherever and in whatever order they are asked for.
    """
    start = _mixed(_mixed(seed) + place)
    if compiled.native().dll is not None and device.type == "cpu":
        return compiled.uniforms(_signed(start), size)
    x = torch.arange(1, size + 1, device=device) * _signed(GOLDEN) + _signed(start)
    for shift, factor in MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of unsigned 64 bits."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: int) -> int:
    x = (x + GOLDEN) & _WORD
    for shift, factor in MIX:
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The number of 64 bits that has these as a signed one."""
    return x - (1 << 64) if x >> 63 else x
