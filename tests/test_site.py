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
