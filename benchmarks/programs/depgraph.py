"""Claim: `analyze` finds the groups of Torch-Pruning (DepGraph), and where that one is wrong it refuses or is right.

Two parts, and a verdict on each:
- Three twins, a ResNet block, a concatenation and an MLP, have the same weights in torch and in JAX. Each unit that
  Torch-Pruning finds from a layer is the set of all (leaf, axis, entries) that it removes together, in the layouts of
  JAX; so is each unit of `analysis.groups`. The two sets of units are equal, but for the outputs of the model.
- A table of models that people have. Both libraries take half of all the units that they find, at random. The change is
  the largest difference between the outputs of the network whose units are zero and of the one where they are cut, over
  the range of the former: 0 for a cut that is right, whatever it does to the accuracy.

Torch-Pruning is called as its README does: a `BasePruner` with the head among `ignored_layers`.
"""

from __future__ import annotations

import copy
import logging
import warnings

import depgraph_cases
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_pruning

import clipjax
from clipjax.structures import unit

EXACT = 1e-5
LEAVES = {"weight": "kernel", "running_mean": "mean", "running_var": "var", "bias": "bias"}


def drawn(case):
    """Random params of a case, and an input."""
    rng = np.random.default_rng(0)

    def values(path, shape):
        if path.endswith("kernel"):
            return rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        return rng.uniform(0.5, 1.5, shape) if path.endswith(("scale", "var")) else 0.3 * rng.normal(size=shape)

    params = {path: jnp.asarray(values(path, shape), jnp.float32) for path, shape in case.shapes.items()}
    return params, jnp.asarray(rng.normal(size=case.x), jnp.float32)


def leaf_name(name, params):
    """The path in JAX of a parameter or buffer in torch."""
    layer, _, kind = name.rpartition(".")
    path = f"{layer}/{LEAVES[kind]}"
    return path if path in params else f"{layer}/scale"


def to_torch(case, params, x):
    """The module with the same weights, and the input."""
    module = case.torch().eval()
    for name, old in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            new = np.asarray(params[leaf_name(name, params)])
            if new.ndim == 2:
                flat = new.shape[0] == 1024  # the map is flattened as height, width, channel in JAX
                new = new.reshape(64, 16, -1).swapaxes(0, 1).reshape(new.shape).T if flat else new.T
            elif new.ndim == 4:
                new = new.transpose(3, 2, 0, 1)
            old.copy_(torch.tensor(new.copy()))
    inputs = torch.tensor(np.asarray(x))
    return module, inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs


def removals(graph, group):
    """For each parameter and buffer of a group, by name: the axis in torch and the entries that are removed."""
    for dep, indices in group:
        module, entries = dep.target.module, [i if isinstance(i, int) else i.idx for i in indices]
        if isinstance(module, torch.nn.Parameter):
            yield graph._param_to_name[module], dep.target.pruning_dim, entries
            continue
        if not isinstance(module, torch.nn.Module) or not list(module.parameters(recurse=False)):
            continue
        inputs = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and graph.is_in_channel_pruning_fn(dep.handler)
        for name, array in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if array.ndim and (not inputs or name == "weight"):
                yield f"{graph._module2name[module]}.{name}", int(inputs), entries


def torch_units(module, inputs, params):
    """Every unit that a layer but the head makes, as the entries of leaves that go with it."""
    graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=inputs)
    found = set()
    for name, layer in module.named_modules():
        if name == "head" or not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        linear = isinstance(layer, torch.nn.Linear)
        prune = torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels
        for i in range(layer.weight.shape[0]):
            parts = {}
            for parameter, axis, entries in removals(graph, graph.get_pruning_group(layer, prune, idxs=[i])):
                path = leaf_name(parameter, params)
                where = path, -1 - axis if params[path].ndim > 1 else -1
                parts.setdefault(where, set()).update(entries)
            found.add(frozenset((path, axis, entry) for (path, axis), own in parts.items() for entry in own))
    return found


def our_units(analysis):
    """Every unit of the groups, as the entries of leaves that go with it."""
    return {
        frozenset(
            (member.path, member.axis, int(entry))
            for member in group.members
            for entry in np.flatnonzero(member.places == i)
        )
        for group in analysis.groups
        for i in range(group.units)
    }


def change(exact, cut):
    exact, cut = np.asarray(exact), np.asarray(cut)
    return float(np.abs(exact - cut).max() / np.ptp(exact))


def size(arrays):
    return sum(int(np.prod(x.shape)) for x in arrays)


def cut(case, params, x, groups, exact=True):
    """Half of the units of some groups cut, at random: the share of the params that is left, and the change."""
    keys = dict(zip(params, jax.random.split(jax.random.key(1), len(params)), strict=True))
    scores = {path: jax.random.uniform(keys[path], leaf.shape) for path, leaf in params.items()}
    masks = clipjax.make_mask(scores, 0.5, structure=unit(groups=groups), scope="leaf")
    zeroed = {path: leaf if masks[path] is None else leaf * masks[path] for path, leaf in params.items()}

    def apply_small(small, x):  # an RMSNorm of d' units adds epsilon * d / d', see `Shrunk.epsilons`
        scales = {path: leaf.size / small[path].size for path, leaf in params.items() if path.endswith("scale")}
        return case.apply(small | {path.replace("scale", "epsilon"): 1e-5 * ratio for path, ratio in scales.items()}, x)

    small, _, _ = clipjax.shrink(zeroed, groups, exact=exact, verify=(apply_small, x))
    moved = change(case.apply(zeroed, x), apply_small(small, x))
    return f"{size(small.values()) / size(params.values()):.0%} left, change {moved:.1e}", moved


def ours(case, params, x):
    """The share of the params that is left, and the change; then what keeps other units from being cut."""
    analysis = clipjax.analyze(case.apply, params, x)
    groups = [group for group in analysis.groups if group.proved]
    said, moved = cut(case, params, x, groups) if groups else ("refused", None)
    why = [f"{next(iter(group))}: {group.refusal}" for group in analysis.groups if not group.proved]
    pins = (why for row in analysis.rows for pins in row.pins[-2:] for why in pins)
    why += [reason for reason in pins if "put of the model" not in reason and "window" not in reason]
    if why:
        said += f"; pinned: {', '.join(dict.fromkeys(why))}"
    if analysis.inexact:
        why = ", ".join(dict.fromkeys(reason for group in analysis.inexact for reason in group.statistics))
        said += f"; `exact=False`: {cut(case, params, x, [*groups, *analysis.inexact], exact=False)[0]}, since {why}"
    return said, moved


def theirs(module, inputs, heads, whole_heads):
    """The same of Torch-Pruning; or how it fails."""
    torch.manual_seed(0)
    zeroed, whole = copy.deepcopy(module), size(module.parameters())
    layers = {getattr(module, name): n for name, n in heads.items()}
    try:
        pruner = torch_pruning.pruner.BasePruner(
            module,
            inputs,
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=0.5,
            ignored_layers=[module.head],
            num_heads=layers,
            prune_num_heads=whole_heads,
            prune_head_dims=not whole_heads,
            head_pruning_ratio=0.5,
        )
        kept = {}
        for group in pruner.step(interactive=True):
            for name, axis, entries in removals(pruner.DG, group):
                length = dict((*zeroed.named_parameters(), *zeroed.named_buffers()))[name].shape[axis]
                own = kept.setdefault((name, axis), list(range(length)))
                kept[name, axis] = [entry for i, entry in enumerate(own) if i not in set(entries)]
            group.prune()
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0]}", None
    with torch.no_grad():
        for (name, axis), own in kept.items():
            array = dict((*zeroed.named_parameters(), *zeroed.named_buffers()))[name]
            dead = sorted(set(range(array.shape[axis])) - set(own))
            array.index_fill_(axis, torch.tensor(dead, dtype=torch.long), 0.0)
        try:
            moved = change(zeroed(inputs), module(inputs))
        except Exception as error:
            return f"the cut model fails: {type(error).__name__}: {str(error).splitlines()[0]}", None
    return f"{size(module.parameters()) / whole:.0%} left, change {moved:.1e}", moved


def main() -> None:
    """Print the comparison of groups, the table, and the verdicts."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"jax {jax.__version__}, torch {torch.__version__}, torch-pruning {torch_pruning.__version__}")
    same = True
    for name, case in depgraph_cases.TWINS.items():
        params, x = drawn(case)
        module, inputs = to_torch(case, params, x)
        with torch.no_grad():
            apart = change(case.apply(params, x), module(inputs))
        assert apart < EXACT, (name, apart)
        found, expected = our_units(clipjax.analyze(case.apply, params, x)), torch_units(module, inputs, params)
        same &= found == expected
        print(f"{name}: twins apart by {apart:.0e}; {len(found)} units, {len(found & expected)} of them the same")
    print(f"The same groups in all three: {'holds' if same else 'FAILS'}\n")
    print("| model | clipjax | Torch-Pruning |")
    print("| --- | --- | --- |")
    right = True
    for name, case in depgraph_cases.CASES.items():
        params, x = drawn(case)
        (found, moved), (other, _) = (
            ours(case, params, x),
            theirs(*to_torch(case, params, x), case.heads, case.whole_heads),
        )
        right &= moved is None or moved < EXACT
        print(f"| {name} | {found} | {other} |")
    print(f"No cut of `analysis.groups` moves an output by {EXACT:.0e} of the range: {'holds' if right else 'FAILS'}")


if __name__ == "__main__":
    main()
