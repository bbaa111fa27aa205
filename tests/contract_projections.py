"""The rows of the contract for `project`."""

import jax
import jax.numpy as jnp
import numpy as np
from contract_leaves import capped, named, on_spheres
from contract_row import row

import clipjax
from clipjax import projections


def short_rows(bound):
    def holds(params, state):
        for _, x in named(params):
            assert np.sqrt(np.square(x).sum()) <= bound

    return holds


def of_matrices(path, leaf):
    return leaf.ndim >= 2


def positive(params):
    return jax.tree.map(jnp.abs, params)


def nowhere_negative(params, state):
    assert all((x >= 0).all() for _, x in named(params))


PROJECTION_ROWS = [
    row("project", "weight", lambda _, start: clipjax.project(projections.identity(), start=start), start=(0, 2)),
    row("project_master", "inner", lambda opt: clipjax.project(projections.identity(), carry=True, inner=opt)),
    row("project_norm", "weight", lambda _: clipjax.project(projections.max_norm(0.9)), short_rows(0.9)),
    row("project_sphere", "weight", lambda _: clipjax.project(projections.sphere()), on_spheres),
    row(
        "project_sphere_unit",
        "inner",
        lambda opt: clipjax.project(projections.sphere(0.5, axis=-1), carry=True, inner=opt, where=of_matrices),
        on_spheres,
    ),
    row(
        "project_cap",
        "weight",
        lambda _: clipjax.project(projections.spectral_cap(0.6), where=of_matrices),
        capped(0.6),
    ),
    row(
        "project_frame",
        "inner",
        lambda opt: clipjax.project(projections.orthonormal(), carry=True, inner=opt, where=of_matrices),
        capped(1.0),
    ),
    row("project_function", "weight", lambda _: clipjax.project(positive, carry=True), nowhere_negative),
]
