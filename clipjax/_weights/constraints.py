"""The records behind `project`: a projection and what is known of it, and one update of the params that it governs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from clipjax._weights.allowed_values import Fact
from clipjax.typing import Context, Projection, State, Tree


class Constraint(NamedTuple):
    """A projection, and what this library knows of its own ones.

    Attributes:
      projection: what users may give.
      state: the class of its state.
      name: what it is called in reports.
      checkable: False for one that a weight may leave again by the next update.
      fitted: `fitted(state)`, a bool: False before the first refresh, when there is nothing yet to hold weights to.
      kept: `kept(target, before, after) -> masks` that broadcast to the target, from the projection's states before and
        after the update; for a projection that keeps these entries and sets all others to 0.
      facts: `facts(target, before, after, context) -> facts`, one for each leaf of the target in order: what the
        projection, in the states before and after the update, makes of any values of the leaf, whatever the other
        leaves are. For the transformations that are chained behind; None for a projection of whole trees.
      surely_zero: `surely_zero(target, state, context) -> bool tree`, True only where the target is projected to 0: a
        cheaper answer than projecting it.
      refits: True where every update fits the state to its target.
      once: `once(target, state, context) -> params`, what `hold_once` makes of the values to which the state was just
        fitted, where that is not what an update makes of them.
      check_fits: `check_fits(params, state, exact)` raises where the state is of other params or options; with `exact`
        also where an update would refresh it for that.
      tolerance: the relative difference up to which params count as the projection of the latent weights; 0 where
        projected values are exact in floating point, so that two compiled programs agree on them.
      tolerances: `tolerances(params) -> floats`, the same leaf by leaf, where it differs.
    """

    projection: Projection
    state: type = object
    name: str = "project"
    checkable: bool = True
    fitted: Callable[[State], jax.Array | bool] = lambda state: True
    kept: Callable[[Tree, State, State], Tree] | None = None
    surely_zero: Callable[[Tree, State, Context], Tree] | None = None
    facts: Callable[[Tree, State, State, Context], list[Fact]] | None = None
    refits: bool = False
    once: Callable[[Tree, State, Context], Tree] | None = None
    check_fits: Callable[[Tree, State, bool], object] = lambda params, state, exact: None
    tolerance: float = 0.0
    tolerances: Callable[[Tree], Tree] | None = None

    def frozen(self, target: Tree, state: State, context: Context) -> Tree:
        """The target projected, without a refresh."""
        if self.projection.apply_frozen is not None:
            return self.projection.apply_frozen(target, state, context)
        return self.projection.apply(target, state, context)[0]


class Update(NamedTuple):
    """One update of the governed leaves; trees have None at all others, and computing dtype where not said otherwise.

    Attributes:
      params: in their own dtype.
      weights: the params.
      steps: the updates, as the transformations before (or `inner`) give them.
      floats: the latent weights where there are some, else the params.
      target: floats + steps, the value that is projected.
      emptied: bool, True where the step is -weight: a transformation before sets it to 0. () where nobody asks.
      context: what the projection may use besides.
      active: bool, True from `start` on; None where that is always so.
    """

    params: Tree
    weights: Tree
    steps: Tree
    floats: Tree
    target: Tree
    emptied: Tree
    context: Context
    active: jax.Array | None
