"""The site has a page for each public name, and nothing else has one."""

import importlib.util
import pathlib

import pytest

import clipjax

PAGES = pathlib.Path(__file__).parents[1] / "docs" / "site" / "pages.py"
if not PAGES.exists():
    pytest.skip("the site is no part of the source distribution", allow_module_level=True)


def loaded():
    spec = importlib.util.spec_from_file_location("pages", PAGES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_page():
    site = loaded()
    listed = [name for names in site.REFERENCE.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {*listed, *site.TYPES} == {*clipjax.__all__, "flax"}


def test_every_page_that_is_copied_is_there():
    site = loaded()
    for source in (site.COPIED | site.RESULTS).values():
        assert (site.ROOT / source).is_file()


def test_links_lead_to_pages_or_are_words():
    site = loaded()

    class Page:
        class file:
            src_uri = "results/claims.md"

    def shown(text):
        return site.on_page_markdown(text, page=Page)

    assert (
        shown("[a](lenet.md) [b](https://x.y/z.md) [c](#d)") == "[a](../results/lenet.md) [b](https://x.y/z.md) [c](#d)"
    )
    assert shown("[the guide](../../docs/clipping.md#nan)") == "[the guide](../clipping.md#nan)"
    assert (
        shown("[the results](../README.md#aotpy) [the method](../method.md#aotpy)")
        == "[the results](../results/benchmarks.md#aotpy) [the method](../results/method.md#aotpy)"
    )
    assert shown("[a script](claims.py) ![a figure](claims.png)") == "a script ![a figure](claims.png)"


def test_links_of_notebooks_lead_to_addresses():
    site = loaded()
    source = site.ROOT / "examples" / "gallery" / "vit.py"
    text = "[a](../../docs/pruning.md#x) [b](../../benchmarks/README.md) [c](../digits.py)"
    shown = site.relinked(text, source, "gallery/vit.py", addresses=True)
    assert shown == "[a](../../pruning/#x) [b](../../results/benchmarks/) c"


def test_a_page_says_where_its_name_is_used():
    site = loaded()
    assert "(../gallery/vit.py)" in site.used_in("shrink") and "(../shrinking.md)" in site.used_in("shrink")
    assert site.uses("clipjax.clip_norm(1.0), scores.taylor(), `clipjax.clipped`") == ["clip_norm", "scores"]
    for page, source in site.NOTEBOOKS.items():
        assert site.uses((site.ROOT / source).read_text()), page
        assert not site.title(site.ROOT / source).startswith("-")


def test_the_citation_is_of_this_version():
    root = loaded().ROOT
    assert f"version: {clipjax.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"{{{clipjax.__version__}}}" in (root / "docs" / "cite.md").read_text()
