"""The mutants of breaks/ fit the code and the tests: `make mutants` takes long, and would tell so late."""

import pathlib
import re

import pytest
from breaks import MUTANTS

TESTS = pathlib.Path(__file__).parent
CLIPJAX = TESTS.parent / "clipjax"


def of(mutant):
    return f"{mutant.file}: {mutant.old.strip()[:40]}"


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_stands_in_the_code_exactly_once(file):
    text = (CLIPJAX / file).read_text()
    found = {of(m): text.count(m.old) for m in MUTANTS if m.file == file}
    assert found == dict.fromkeys(found, 1)
    assert not [of(m) for m in MUTANTS if m.file == file and m.new == m.old]


@pytest.mark.parametrize("name", sorted({name for mutant in MUTANTS for name in mutant.tests.split()}))
def test_every_test_that_a_mutant_names_exists(name):
    """Each file, and each word of an expression in a function's or a case's name of one of the mutant's files."""
    assert list(TESTS.rglob(f"test_{name}.py"))
    for mutant in MUTANTS:
        if name in mutant.tests.split():
            texts = [path.read_text() for file in mutant.tests.split() for path in TESTS.rglob(f"test_{file}.py")]
            texts += [path.read_text() for path in TESTS.glob("contract_*.py")]
            words = set(re.findall(r"\w+", mutant.expression)) - {"and", "or", "not"}
            assert all(any(word in text for text in texts) for word in words), (of(mutant), words)
