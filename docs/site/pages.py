"""The pages that are made of other files: the reference, the results, the changelog. Run by `mkdocs build`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

REFERENCE: dict[str, dict[str, str]] = {
    "Gradients": {
        "clip": "Entries held within a threshold.",
        "clip_norm": "Norms held within a threshold: of all arrays, or of each.",
        "scale_to_norm": "Gradients of one norm.",
        "skip_spikes": "Updates left out where a norm or a loss is too large.",
        "with_gradient": "Hands the gradient to transformations that need it.",
    },
    "Weights": {
        "clamp_weights": "Weights held in an interval.",
        "clip_logits": "Queries and keys rescaled where attention logits are too large.",
        "prune_mask": "Exact zeros, by any score, of weights, units or blocks.",
        "fake_quantize": "Weights held on a grid, or on the bytes of a format.",
        "project": "Weights held in any set.",
        "hold_once": "All constraints of a chain on a trained model, without training.",
        "check": "Which constraints do not hold, and where.",
        "Violation": "What `check` finds.",
        "quantized": "The integers of weights on a grid.",
        "choose_bits": "Bit widths by the distribution of the weights.",
        "choose_step": "The step of a grid.",
        "make_mask": "A mask of exactly so many zeros.",
    },
    "Programs": {
        "analyze": "Which units belong together, read from the program.",
        "Analysis": "What `analyze` finds.",
        "shrink": "A model without its zero units.",
        "Shrunk": "What `shrink` returns.",
        "sensitivity": "The mean squared input of each weight, from some batches.",
        "snip": "Saliency of the first loss.",
        "synflow": "Saliency without data.",
    },
    "Files": {
        "save": "The small file.",
        "load": "The same bits back.",
        "pack": "The small file in memory.",
        "unpack": "Params of its bytes.",
        "export_gguf": "A file for llama.cpp.",
        "import_gguf": "Params of such a file.",
        "llama_names": "The names of llama.cpp for a Llama's params.",
        "llama_metadata": "What llama.cpp must know of a Llama.",
        "export_onnx": "Codes and scales in an ONNX graph.",
        "export_safetensors": "A folder for vLLM and transformers.",
        "import_safetensors": "Params of such a folder.",
    },
    "Reports": {
        "report": "Metrics of a chain, inside jit too.",
        "summarize": "A table of sparsity, bits and bytes by leaf.",
        "Summary": "What `summarize` returns.",
    },
    "Arrays": {
        "clamp": "One array held in an interval.",
        "quantize": "Codes of an array.",
        "dequantize": "Values of codes.",
        "Quantized": "Codes, a step and what else a grid has.",
        "round_to_step": "The nearest multiple of a step.",
        "fake_quant": "Rounding with a straight-through gradient.",
        "dot": "A product with the integers of a file.",
        "per_leaf": "An argument that differs by leaf.",
    },
    "Families": {
        "thresholds": "Rules that follow the history of norms.",
        "selections": "Which entries may be touched.",
        "scores": "How much each weight matters.",
        "structures": "Units, blocks, n of m.",
        "projections": "Sets that weights are held in.",
        "formats": "Deployment formats: GGUF, MX, ONNX, compressed-tensors.",
        "steps": "Steps of grids.",
        "roundings": "Which code a weight takes.",
        "widths": "Rules for bit widths.",
        "plots": "Figures of weights, layers, norms and bytes.",
        "flax": "What Flax needs.",
        "typing": "The types that a function of yours may meet.",
    },
}
"""Each public name with what it is, by the group of its page. The types of the families stand on the page `typing`."""

TYPES = ("Context", "Format", "Projection", "Rounding", "Rule", "Score", "Selection", "Step", "Structure", "Width")
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
NOTEBOOKS = {"gallery/compression.ipynb": "examples/compression.ipynb"} | {
    f"gallery/{path.name}": str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples" / "gallery").glob("*.py"))
}
TITLES = ("Results", "Method", "Claims", "LeNets")
RESULTS = {
    "results/benchmarks.md": "benchmarks/README.md",
    "results/method.md": "benchmarks/method.md",
    "results/claims.md": "benchmarks/weights/claims.md",
    "results/lenet.md": "benchmarks/weights/lenet.md",
}


_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def sources() -> dict[Path, str]:
    """For each file that becomes a page the path of the page."""
    guides = {path: path.name for path in (ROOT / "docs").glob("*.md")}
    return guides | {ROOT / source: page for page, source in (COPIED | RESULTS | NOTEBOOKS).items()}


def relinked(text: str, source: Path, page: str, *, addresses: bool = False) -> str:
    """Text whose links are right in the tree, with links to pages; a link to another file becomes its words.

    With ``addresses`` links are those of the built pages, `pruning/` instead of `pruning.md`: MkDocs does not see the
    links of notebooks.
    """
    pages = sources()
    up = "../" * (page.count("/") + addresses)

    def link(match: re.Match[str]) -> str:
        words, (path, _, anchor) = match[1], match[2].partition("#")
        target = (source.parent / path).resolve()
        if re.match(r"[a-z]+:", path) or not re.search("[./]", path):
            return match[0]  # also what only looks like a link, x[0](y)
        if target.is_relative_to(ROOT / "docs" / "api"):
            return f"[{words}]({up}{target.relative_to(ROOT / 'docs')})"
        if target in pages and words.endswith(".md"):
            words = title(target)
        if target not in pages or pages[target] == "rooms.md":
            return words
        to = pages[target]
        return f"[{words}]({up}{_address(to) if addresses else to}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(link, text)


def _address(page: str) -> str:
    return re.sub(r"(index)?\.(md|py|ipynb)$", "", page).rstrip("/") + "/"


def on_config(config: Any, **kwargs: Any) -> Any:
    """A hook of MkDocs: every page says of which version it is."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "clipjax" / "__init__.py").read_text())
    assert version
    config.copyright = f"clipjax {version[1]}"
    return config


def on_nav(nav: Any, *, files: Any, **kwargs: Any) -> Any:
    """A hook of MkDocs: the lists that the navigation was made of are no pages."""
    for file in [file for file in files if file.name == "SUMMARY"]:
        files.remove(file)
    return nav


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """A hook of MkDocs: links that are right in the tree lead to pages; those to other files become their names."""
    source = {page: path for path, page in sources().items()}.get(page.file.src_uri)
    return markdown if source is None else relinked(markdown, source, page.file.src_uri)


def uses(text: str) -> list[str]:
    """The public names that a program, or the code of a guide, uses."""
    names = (name for group in REFERENCE.values() for name in group)
    return [name for name in names if re.search(rf"clipjax\.{name}\b|(?<![\w./`\[]){name}\.[a-z_]\w*\(", text)]


def title(path: Path) -> str:
    """The first heading of a guide or of a notebook."""
    start = {".md": "# ", ".py": "# # ", ".ipynb": '    "# '}[path.suffix]
    lines = (line.removeprefix(start) for line in path.read_text().splitlines() if line.startswith(start))
    return next(lines).removesuffix('\\n",')


def used_in(name: str) -> str:
    """Where a public name is used, as the last section of its page."""
    guides = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in ("rooms.md", "gallery.md")]
    gallery = [ROOT / source for source in NOTEBOOKS.values()]
    programs = [path for path in sorted((ROOT / "examples").glob("*.py")) if name in uses(path.read_text())]
    lines = [
        ("Gallery", [f"[{title(path)}](../{sources()[path]})" for path in gallery if name in uses(path.read_text())]),
        ("Guides", [f"[{title(path)}](../{path.name})" for path in guides if name in uses(path.read_text())]),
        ("Examples", [f"[`{path.name}`](../gallery.md)" for path in programs]),
    ]
    found = [f"- {kind}: {', '.join(links)}" for kind, links in lines if links]
    return "\n".join(["\n## Used in\n", *found, ""]) if found else ""


def notebook(source: Path, page: str) -> str:
    """A notebook with links to pages, and to the page of each name that it uses."""
    text = source.read_text()
    used = ", ".join(f"[`{name}`](../../api/{name}/)" for name in uses(text))
    text, last = relinked(text, source, page, addresses=True), f"**Uses** {used}."
    if source.suffix == ".py":
        return f"{text.rstrip()}\n\n# %% [markdown]\n# {last}\n"
    cells = json.loads(text)
    cells["cells"].append({"cell_type": "markdown", "id": "uses", "metadata": {}, "source": [last]})
    return json.dumps(cells)


def main() -> None:
    """Writes the pages that are no files of docs/."""
    import mkdocs_gen_files as site

    index, summary = ["# Reference\n"], ["* [Reference](index.md)"]
    for group, names in REFERENCE.items():
        summary.append(f"* {group}")
        index.append(f"\n## {group}\n")
        for name, words in names.items():
            with site.open(f"api/{name}.md", "w") as page:
                page.write(f"---\ntitle: {name}\n---\n\n::: clipjax.{name}\n{used_in(name)}")
            summary.append(f"    * [{name}]({name}.md)")
            index.append(f"- [`{name}`]({name}.md): {words}")
    results = [f"* [{title}]({Path(page).name})" for title, page in zip(TITLES, RESULTS, strict=True)]
    texts = {"api/SUMMARY.md": summary, "api/index.md": index, "results/SUMMARY.md": results}
    for path, lines in texts.items():
        with site.open(path, "w") as page:
            page.write("\n".join(lines) + "\n")
    for path, source in (COPIED | RESULTS).items():
        with site.open(path, "w") as page:
            page.write((ROOT / source).read_text())
    gallery = ["* [All examples](../gallery.md)"]
    for path, source in NOTEBOOKS.items():
        with site.open(path, "w") as page:
            page.write(notebook(ROOT / source, path))
        gallery.append(f"* [{title(ROOT / source)}]({Path(path).name})")
    with site.open("gallery/SUMMARY.md", "w") as page:
        page.write("\n".join(gallery) + "\n")
    for image in (ROOT / "benchmarks").rglob("*.png"):
        below = image.relative_to(ROOT / "benchmarks")
        for path in {f"results/{below}", f"results/{below.name}"}:
            with site.open(path, "wb") as page:
                page.write(image.read_bytes())


if __name__ in ("__main__", "<run_path>"):
    main()
