"""Seeds are functions of (seed, fold, stage, purpose, step), the same on every machine, and all different."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_atl.randomness import Key, derive


def test_every_combination_has_a_seed_of_its_own():
    seeds = {
        Key(seed, fold, stage).derive(purpose, step)
        for seed, fold, stage, purpose, step in itertools.product(
            range(4), range(1, 6), ("multitask", "retraining", "finetuning/ce"), ("crop", "order"), range(20)
        )
    }
    assert len(seeds) == 4 * 5 * 3 * 2 * 20


def test_neighbouring_numbers_are_not_run_together():
    assert derive(1, 11, "x") != derive(11, 1, "x")
    assert derive(1, 1, "x", 11) != derive(1, 11, "x", 1)


def test_seeds_stay_what_they_were():
    """Results of earlier versions could not be reproduced otherwise."""
    assert derive(0, 1, "clustering/-3/64") == 3608969712364487694
    assert Key(2, 5, "retraining").derive("crop", 7) == 3386927066083422784


@given(st.integers(0, 2**63), st.integers(1, 20), st.text(max_size=10), st.integers(0, 10**6))
def test_seeds_are_what_generators_take(seed, fold, purpose, step):
    found = derive(seed, fold, purpose, step)
    assert 0 <= found < 2**63
    torch.Generator().manual_seed(found)


def test_generators_are_new_each_time_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, later = (
        torch.rand(5, generator=Key(0, 1, "multitask").generator("crop", step)) for step in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(torch.get_rng_state(), before)
