"""Breaks of clipjax/_reports, and of the plots."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_reports/reporting.py", "if number else name", "if not number else name", "reporting", "numbered"),
    Mutant("_reports/reporting.py", "yield from _states(state.inner)", "pass", "reporting", "inside"),
    Mutant("_reports/reporting.py", "/ float(max(size, 1))", "/ float(size)", "reporting", "nothing_governed"),
    Mutant("_reports/distributions.py", "np.isfinite(w) & (w != 0)", "np.isfinite(w)", "summarizing", "survivors"),
    Mutant(
        "_reports/distributions.py",
        "np.mean(w**4) / power**2",
        "np.mean(w**4) / power**2 - 3",
        "summarizing",
        "kurtosis",
    ),
    Mutant("_reports/distributions.py", "np.ldexp(w, -exponent)", "np.ldexp(w, 0)", "summarizing", "any_scale"),
    Mutant("_reports/distributions.py", "10 * np.log10(", "20 * np.log10(", "summarizing", "sqnr"),
    Mutant("_reports/summarizing.py", "np.where(mask, w, np.zeros_like(w))", "w", "summarizing", "pruned_weights"),
    Mutant(
        "_reports/summarizing.py",
        "leaf if z is None else z",
        "leaf",
        "summarizing",
        "quantized",
    ),
    Mutant(
        "_reports/summarizing.py", "if own is not None and bits is not None:", "if False:", "summarizing", "codes_and"
    ),
    Mutant("_reports/reporting.py", "if steps or not formed else {}", "", "quantizing_formats", "same_bits"),
    Mutant(
        "_reports/plotted.py", "levels[levels != 0] if bits == 1 else levels", "levels", "plots", "levels_of_the_grid"
    ),
    Mutant("_reports/plotted.py", "found[2] or found[1] not in apart", "True", "plotted", "each_leaf"),
    Mutant("_reports/plotted.py", "norm[norm < 0] = np.nan", "pass", "plotted", "gap"),
    Mutant("_reports/figures.py", "& (values > 0)", "", "plotted", "gap"),
    Mutant("_reports/figures.py", "                break\n", "                pass\n", "figures", "overlap"),
    Mutant("_reports/figures.py", "len(given) == len(panels)", "len(given) >= len(panels)", "figures", "given_axes"),
    Mutant("plots.py", "if on_grids else params", "if False else params", "plots", "codes_and_scales"),
    Mutant("plots.py", "x[np.isfinite(x)]", "x", "plots", "not_finite"),
    Mutant("plots.py", "x / unit", "x", "plots", "same_unit"),
    Mutant("plots.py", "in reversed(summarizing.", "in iter(summarizing.", "plots", "named_as_a_total"),
    Mutant("plots.py", "finite & (norm > threshold)", "norm > 0", "plotted", "mark"),
    Mutant(
        "plots.py",
        "len(saving.pack(quantized(params, opt_state) if on_grids else params))",
        'total["coded_bytes"]',
        "plots",
        "of_the_file",
    ),
    Mutant("plots.py", "(size[:, None] <= size)", "(size[:, None] < size)", "plots", "pareto_joins"),
    Mutant("_reports/figures.py", "(1, 2, 5) if span < 1e5 else (1,)", "(1, 2, 5)", "figures", "log_scales"),
)
