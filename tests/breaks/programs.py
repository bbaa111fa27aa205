"""Breaks of clipjax/_programs."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant(
        "_programs/dead_units.py",
        "for path, count in found.items() if count}",
        "for path, count in ()}",
        "verifying",
        "needs_a_word",
    ),
    Mutant("_programs/analysis.py", "if models.is_module(apply_fn):", "if False:", "analysis", "in_the_place"),
    Mutant(
        "_programs/squared_inputs.py", "total if part is None else total + part", "total", "sensitivities", "hidden"
    ),
    Mutant(
        "_programs/squared_inputs.py",
        "sorted(range(len(kernel)), key=kernel.__getitem__)",
        "range(len(kernel))",
        "sensitivities",
        "experts or way",
    ),
    Mutant(
        "_programs/squared_inputs.py",
        "shape[out] // groups, axis=0",
        "shape[out] // groups, axis=1",
        "sensitivities",
        "experts",
    ),
    Mutant("_programs/squared_inputs.py", "jnp.sum(totals, axis=0)", "totals[0]", "sensitivities", "stacked"),
    Mutant("_programs/sensitivities.py", "jnp.maximum(number, 1)", "1", "sensitivities", "twice"),
    Mutant("_programs/group_leaves.py", "has_score[found[0].position]", "has_score != []", "groups", "bad_groups"),
    Mutant("_programs/group_leaves.py", "ok = size == wanted and", "ok = size % units == 0 and", "groups", "chance"),
    Mutant("_programs/group_leaves.py", "units * times if last else units", "units * times", "groups", "chance"),
    Mutant(
        "_programs/group_units.py",
        "is None or leaf.layers < leaf.axis",
        "is None or x.size",
        "group_units",
        "each_layer",
    ),
    Mutant(
        "_programs/group_units.py",
        "if i - ndim in leaf.own",
        "if i == 0",
        "groups group_units",
        "each_layer or sharded",
    ),
    Mutant("_programs/group_units.py", "masks[leaf.position] & mask", "mask", "groups", "reference"),
    Mutant(
        "_programs/group_units.py", "jnp.int32, shape, 1) % n ==", "jnp.int32, shape, 1) // n ==", "groups", "sharded"
    ),
    Mutant(
        "_programs/shrinking.py",
        "written if times[path] == 1 else",
        "written if times[path] else",
        "groups",
        "collide",
    ),
    Mutant("_programs/shrinking.py", "sorted({int(leaf.places[i])", "sorted({int(i)", "shrinking", "flattened"),
    Mutant(
        "_programs/dead_units.py", "-(-alive.sum(1).max() // multiple)", "alive.sum(1).max() // multiple", "cutting"
    ),
    Mutant("_programs/dead_units.py", "alive.sum(1).max()", "alive.sum(1).min()", "cutting", "each_layer"),
    Mutant("_programs/shrinking.py", "+ repair.offset) *", ") *", "cutting", "makes_up"),
    Mutant("_programs/shrinking.py", "repair.epsilon * ratio", "repair.epsilon / ratio", "cutting", "makes_up"),
    Mutant("_programs/shrinking.py", "group.proved or verify", "group.members or verify", "verifying", "walk_alone"),
    Mutant("_programs/shrinking.py", "not group.statistics or not exact", "group.members", "verifying", "walk_alone"),
    Mutant("_programs/cutting.py", "self.kept & other.kept", "other.kept", "cutting", "query"),
    Mutant("_programs/cutting.py", "rows if cut.layers < axis else rows.T", "rows", "cutting", "behind"),
    Mutant("_programs/cutting.py", "x.shape[axis] > 1 == x.shape[cut.layers]", "not x.size", "cutting", "refused"),
    Mutant("_programs/verifying.py", "np.isfinite(a) & np.isfinite(b)", "np.isfinite(a)", "verifying", "change"),
    Mutant("_programs/verifying.py", "max(floor, TOLERANCES[dtype])", "TOLERANCES[dtype]", "verifying", "rounding"),
    Mutant("_programs/models.py", "new * (changed[1] if changed[0] == groups else groups)", "new", "models", "nnx"),
    Mutant("_programs/models.py", "_note_sizes(model, before, _arrays(tree))", "pass", "models", "nnx"),
    Mutant(
        "_programs/models.py", "_note_sizes(made, _arrays(opened(model)), _arrays(tree))", "pass", "models", "equinox"
    ),
    Mutant("_programs/rules.py", 'made.insert(equation.params["axis"]', "made.insert(0", "rules", "alternate"),
    Mutant(
        "_programs/rules.py",
        'pin(updates, f"{where} writes its entries where the data decide", [j])',
        "pass",
        "rules",
        "pinned",
    ),
    Mutant("_programs/exactness.py", '"scatter": (0, 2)', '"scatter": (0, 0)', "rules", "written_into"),
    Mutant("_programs/exactness.py", 'in _PASS_ON or name == "sort"', "in _PASS_ON", "exactness", "not_zero"),
    Mutant("_programs/exactness.py", "return found - missing", "return found", "exactness", "not_zero"),
    Mutant("_programs/layers.py", "stacked and not nested", "stacked", "stacked_layers", "every_turn"),
    Mutant("_programs/layers.py", "return alike and", "return alike or", "stacked_layers", "another_layer"),
    Mutant("_programs/walking.py", "_line(equation) or called_at", "_line(equation)", "refusals", "gather"),
    Mutant("_programs/proving.py", "or (a != a and b != b)", "", "refusals", "gather_by_the_data"),
    Mutant("_programs/shrinking.py", "if test is None and exact:", "if not exact:", "cutting", "makes_up"),
    Mutant("_programs/groups.py", '(average|hidden|counter)$"', '(hidden|counter)$"', "proof_set", "haiku"),
    Mutant("_programs/program.py", ' or own[member.path].name != "kernel"', "", "proof_set", "prune_mask"),
    Mutant("_programs/exactness.py", '"stack": (), ', '"stack": (0,), ', "rules", "ones_beside"),
    Mutant("_programs/origins.py", 'if name == "stack":', 'if name == "stacks":', "rules", "stacked"),
    Mutant(
        "_programs/axes.py",
        "np.tile(np.repeat(known[own[0]], inner), outer)",
        "np.tile(known[own[0]], inner * outer)",
        "axes",
    ),
    Mutant(
        "_programs/axes.py", "cut(part, [left, part.size - left]", "cut(part, [part.size - left, left]", "axes", "sums"
    ),
    Mutant(
        "_programs/proving.py",
        "if not one.passes and not _same_number(",
        "if False and not _same_number(",
        "analysis",
        "certain",
    ),
    Mutant(
        "_programs/proving.py", "!= shape or getattr(v.aval", "!= shape and getattr(v.aval", "analysis", "fixed_width"
    ),
    Mutant("_programs/proving.py", "atoms[0].pins[found] = None", "proved.add(atoms[0])", "analysis", "certain"),
    Mutant("_programs/proving.py", "if ratio != 1:", "if ratio != ratio:", "means", "follows"),
    Mutant(
        "_programs/means.py",
        'mean.used = "the scale behind it is used elsewhere"',
        'mean.used = ""',
        "means",
        "statistic",
    ),
    Mutant("_programs/means.py", "or _counted(own) != _counted(mean.axes)", "", "means", "another_leaf"),
    Mutant(
        "_programs/program.py",
        'if end in named and (groups.is_statistic(end) or "/" in end)',
        "if end == path == None",
        "analysis",
        "linen",
    ),
    Mutant(
        "_programs/exactness.py", "if id(step) in means.sums:", "if id(step) in ():", "means", "refuses_other_widths"
    ),
    Mutant(
        "_programs/exactness.py",
        "is not None and not bool(np.isfinite",
        "is None and not bool(np.isfinite",
        "analysis",
        "not_finite",
    ),
    Mutant(
        "_programs/shrinking.py", "what = program.differs(new)", 'what = ""', "analysis", "another_one_at_the_width"
    ),
    Mutant("_programs/shrinking.py", "if what and 1 in new.values():", "if what == 1:", "analysis", "single_unit"),
    Mutant("_programs/roles.py", "elif leaf in looked_up:", "elif not steps:", "analysis", "roles"),
    Mutant("_programs/cutting.py", "return entries(x, units[name][1])", "return x", "cutting", "several_entries"),
    Mutant(
        "_programs/program.py", "return closed.replace(jaxpr=jaxpr), out", "return closed, out", "analysis", "needs"
    ),
    Mutant("_programs/program.py", "groups.inside_collection(path): value", '"": value', "verifying", "alone"),
    Mutant("_programs/models.py", '("query/kernel", -2)', '("query/kernel", -1)', "models", "heads"),
    Mutant("_programs/models.py", "slice(len(old) - len(several), None)", "slice(len(several))", "models", "heads"),
    Mutant("_programs/cutting.py", "(blocks == blocks[..., :1]).all()", "True", "cutting_formats", "splits"),
    Mutant("_programs/cutting.py", "x = _taken(x, axis, own)", "pass", "cutting_formats", "training_goes_on"),
    Mutant("_programs/cutting.py", ".counts == x.shape", ".counts", "cutting_formats", "several_axes"),
    Mutant("_programs/cutting.py", "own = Cut(blocks[..., 0], cut.layers)", "own = cut", "cutting_formats", "goes_on"),
    Mutant("_programs/cutting.py", "return jnp.full_like(x, bits[path])", "return x", "cutting_formats", "goes_on"),
)
