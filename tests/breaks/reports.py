"""Breaks of clipjax/_reports."""

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
)
