"""Sentences of English out of the files of a package: documentation, docstrings, READMEs, WordNet's glosses."""

from __future__ import annotations

import ast
import gzip
import html.parser
import json
import re
import tarfile
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

LARGEST = 8_000_000  # bytes of one file; what is larger is data
WORDS = 5, 40  # how many a sentence has
ENGLISH = frozenset("the and of to this that with for from by which be are you your not it if when".split())
PROSE = (".txt", ".md", ".rst", ".markdown", ".pod", ".page", ".xml", "/metadata")
PAGES = (".html", ".htm", ".xhtml", ".page", ".xml")
DICT = re.compile(r"dictd/[\w-]+\.dict(\.dz)?$|/data\.(noun|verb|adj|adv)$|games/fortunes/[\w-]+$|/man/man\d/[\w.-]+$")
SKIPPED = re.compile(r"/(licen[cs]es?|copying|copyright|changelog|tests?|test_data|locale|_vendor)\b", re.IGNORECASE)


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a wheel, or of a tar file, that may hold prose."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if wanted(entry.filename, entry.file_size):
                    yield entry.filename, wheel.read(entry)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and wanted(member.name, member.size):
                held = tar.extractfile(member)
                assert held is not None
                yield member.name, held.read()


def wanted(name: str, size: int) -> bool:
    """True for a file of prose, or with docstrings, that is no licence and no test."""
    name = name.lower()
    plain = name.removesuffix(".gz")
    dictionary = DICT.search(plain) is not None
    known = plain.endswith((*PROSE, *PAGES, ".py", ".ts")) or dictionary or name.endswith("service-2.json.gz")
    return known and not SKIPPED.search("/" + name) and size <= LARGEST * (4 if dictionary else 1)


def sentences(name: str, raw: bytes) -> Iterator[str]:
    """The sentences of one file."""
    name = name.lower()
    if name.endswith((".gz", ".dz")):
        raw, name = gzip.decompress(raw), name.rsplit(".", 1)[0]
    text = raw.decode("utf-8", errors="ignore")
    for paragraph in paragraphs(name, text):
        yield from split(paragraph)


def paragraphs(name: str, text: str) -> Iterable[str]:
    """The paragraphs of one file, without markup."""
    if re.search(r"/data\.(noun|verb|adj|adv)$", name):
        glosses = (line.split("|", 1)[1].split(";") for line in text.splitlines() if "|" in line)
        # A gloss is a definition, without a full stop, and quoted examples.
        return (part.strip(' ".').capitalize() + "." for parts in glosses for part in parts)
    if name.endswith(".py"):
        return (p for doc in docstrings(text) for p in blocks(doc))
    if name.endswith(".ts"):
        comments = re.findall(r"/\*\*(.*?)\*/", text, re.DOTALL)
        return (p for doc in comments for p in blocks(re.sub(r"(?m)^\s*\*", "", doc)))
    if name.endswith(".json"):
        found = re.findall(r'"documentation":("(?:[^"\\]|\\.)*")', text)
        return (p for doc in found for p in blocks(page(json.loads(doc))))
    if name.endswith(PAGES):
        return blocks(page(text))
    if "/man/man" in name:
        return blocks(re.sub(r"\\f[A-Z]|\\&|\\-", "", re.sub(r"(?m)^[.'].*$", "\n", text)))
    if "/fortunes/" in name:
        return (p for saying in re.split(r"(?m)^%$", text) for p in blocks(saying))
    if name.endswith(".dict"):
        return blocks(re.sub(r"[{}]", "", text))
    return blocks(text)


def docstrings(text: str) -> Iterator[str]:
    """Those of a module, its classes and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the strings of others
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield found


class _Page(html.parser.HTMLParser):
    """The text of a page, with an empty line where a block ends."""

    IGNORED = ("script", "style", "pre", "nav", "head")
    BLOCKS = ("p", "li", "td", "dd", "dt", "div", "h1", "h2", "h3", "h4", "section", "br", "title", "para")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.IGNORED:
            self._inside.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data)


def page(text: str) -> str:
    """What a page shows, without code."""
    parser = _Page()
    parser.feed(text)
    return "".join(parser.parts)


def blocks(text: str) -> Iterator[str]:
    """Paragraphs of plain text, Markdown or reStructuredText, without code, tables and links."""
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1", "\n\n", text.expandtabs())
    text = re.sub(r"<[^<>\n]{1,300}>|!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]\n]+)\](\([^)\n]*\)|\[[^\]\n]*\])", r"\1", text)
    text = re.sub(r":[\w:]+:`~?([^`<]+?)\s*(<[^`]*>)?`", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+•]|\d+\.)\s)", textwrap.dedent(text)):
        yield re.sub(r"\s+", " ", re.sub(r"[`*_]{1,3}(?=\S)|(?<=\S)[`*_]{1,3}", "", paragraph)).strip(" -*+•#|>")


def split(paragraph: str) -> Iterator[str]:
    """Its English sentences: words with a capital in front and a full stop behind, few signs between."""
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", paragraph):
        sentence = part.strip().replace("\u2019", "'")
        words = sentence.lower().split()
        letters = sum(c.isalpha() or c == " " for c in sentence)
        shaped = sentence.isascii() and re.match(r"[A-Z][\w'-]* .*[a-z)][.!?]$", sentence)
        english = not ENGLISH.isdisjoint(words) and WORDS[0] <= len(words) <= WORDS[1]
        if shaped and english and letters >= 0.92 * len(sentence):
            yield sentence
