"""Random small networks with half of the units of every group set to 0: the small model's outputs are the same."""

import collections

import jax
import numpy as np
import pytest
import random_features  # noqa: F401 - each registers its layers
import random_layers  # noqa: F401
import random_programs  # noqa: F401
import random_sequences  # noqa: F401
from random_networks import CUT, REFUSED, network

import clipjax

BLOCK = 50  # networks of one test; a quarter of a second each


def zeroed(params, groups, rng):
    """Half of the units of each group, at random and in each layer others, are 0 in all leaves that have the units."""
    params = {path: x.copy() for path, x in params.items()}
    for group in groups:
        dead = [rng.permutation(group.units)[: group.units // 2] for _ in range(2)]
        for path, axis, places, layers in group.of_params().members:
            leaf = params[path]
            by_layer = [leaf] if layers is None else np.moveaxis(leaf, (layers, axis), (0, -1))
            for layer, own in zip(by_layer, dead, strict=False):
                entries = np.moveaxis(layer, axis, -1) if layers is None else layer
                entries[..., np.isin(places, own)] = 0
    return params


def found_units(width, groups):
    """How many units of a width the groups have: all entries of one at a site of it, and none of another."""
    found = np.zeros(width.size, bool)
    for path, axis, own in width.sites:
        for places in [m.places for g in groups for m in g.members if (m.path, m.axis) == (path, axis)]:
            for u in range(width.size):
                mine = set(places[own == u])
                others = set(places[(own != u) & (own >= 0)])
                found[u] |= len(mine) == 1 and min(mine) >= 0 and not mine & others
    return int(found.sum())


def check(seed, counts):
    """Count what the groups of a network have, and compare its outputs, which are f64, with those of the small one."""
    net = network(seed)
    analysis = clipjax.analyze(net.apply, net.params, net.inputs)
    told = f"seed {seed}\n{net.text}\n{analysis}"
    groups = [group for group in analysis.groups if group.proved]  # `shrink` refuses others without `verify`
    for width in net.widths:
        found = found_units(width, groups)
        assert width.verdict != REFUSED or found == 0, f"{found} units that cannot be cut were found\n{told}"
        counts[width.verdict] += width.size
        counts[f"{width.verdict}, found"] += found
        if width.verdict == CUT and found < width.size:
            counts["missed", told] += width.size - found
    large = zeroed(net.params, groups, np.random.default_rng(seed))
    # Where the network must add another epsilon, it does so below, and not `shrink` but this test verifies it.
    moved = any(repair.epsilon for group in groups for repair in group.repairs)
    small, _, _ = shrunk = clipjax.shrink(large, analysis, exact=not moved)
    smaller = sum(x.size for x in small.values()) < sum(x.size for x in large.values())
    assert smaller == any(group.units > 1 for group in groups), told
    counts["networks that are smaller"] += smaller
    again = lambda params, x: net.apply(params, x, shrunk.epsilons)
    try:
        jax.eval_shape(again, small, net.inputs)
    except (TypeError, ValueError) as error:
        counts["networks that refuse their new sizes"] += 1
        counts["refused", f"{error}\n{told}"] += 1
        return
    both = jax.jit(lambda a, b, x: (net.apply(a, x), again(b, x)))(large, small, net.inputs)
    for one, other in zip(*both, strict=True):
        # Beside 1e-9 of the range a little of rounding, as where the outputs themselves are nothing else.
        np.testing.assert_allclose(other, one, 0, 1e-9 * np.ptp(one) + 1e-13, equal_nan=False, err_msg=told)


def check_block(block):
    counts = collections.Counter()
    with jax.enable_x64(True):
        for seed in range(BLOCK * block, BLOCK * (block + 1)):
            check(seed, counts)
    told = {key: n for key, n in counts.items() if isinstance(key, str)}
    examples = [key[1] for key in counts if not isinstance(key, str)]
    assert counts[f"{CUT}, found"] >= 0.98 * counts[CUT], "\n\n".join([str(told), *examples])
    assert counts["networks that are smaller"] >= 0.6 * BLOCK, told
    assert counts["networks that refuse their new sizes"] <= 0.04 * BLOCK, "\n\n".join([str(told), *examples])


@pytest.mark.parametrize("block", range(6))
def test_no_network_has_other_outputs_and_what_can_be_cut_is_found(block):
    check_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(6, 60))
def test_no_other_network_has_other_outputs(block):
    check_block(block)
