"""What llama.cpp computes with a GGUF file (the wheel `xllamacpp`): log-probabilities of a text, and answers."""

import json
import urllib.request

import numpy as np
import xllamacpp

FORCED = 1e4  # a bias that no logit reaches


def server(path, context=256, threads=1):
    """llama.cpp with a file, on the CPU, with keys and values in F32: a cached prefix is what would be computed again.

    A token alone is too little work to share: two threads wait for each other, for long where other jobs run.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.verbosity = context, 1, False, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def complete(running, prompt, length, **options):
    """A greedy continuation of a prompt, a string or tokens: what the server replies."""
    asked = {"prompt": prompt, "n_predict": length, "temperature": 0, **options}
    found = running.handle_completions(asked)
    return found if isinstance(found, dict) else json.loads(found)


def answer(running, prompt, length):
    """The text that follows a prompt."""
    return complete(running, prompt, length)["choices"][0]["text"]


def following(running, row, length):
    """The tokens that follow a row of them, also behind the end of an answer."""
    found = complete(running, row, length, n_probs=1, ignore_eos=True)["choices"][0]["logprobs"]["content"]
    return [token["id"] for token in found]


def tokens(running, string):
    """The tokens of a text, by the tokenizer of the file."""
    asked = json.dumps({"content": string}).encode()
    request = urllib.request.Request(f"{running.listening_address}/tokenize", asked)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["tokens"]


def log_probabilities(running, row, cache=True):
    """Log p of each token of a row behind all that stand before it: f64[tokens - 1].

    A bias makes llama.cpp choose the token that follows, whose log-probability it reports as the logits have it,
    without the bias. The server keeps the common prefix of two prompts, so that a row costs one evaluation a token.
    """
    row, found = [int(token) for token in row], []
    for n in range(1, len(row)):
        options = {"n_probs": 1, "cache_prompt": cache, "logit_bias": [[row[n], FORCED]]}
        chosen = complete(running, row[:n], 1, **options)["choices"][0]["logprobs"]["content"][0]
        if chosen["id"] != row[n]:
            raise RuntimeError(f"llama.cpp must choose token {row[n]}, which a bias forces, but chose {chosen['id']}.")
        found.append(chosen["logprob"])
    return np.array(found)


def nats(running, rows, each=lambda: None):
    """The mean loss on rows of a text, in nats a token. `each` is called after every row."""
    found = []
    for row in rows:
        found.append(-log_probabilities(running, row).mean())
        each()
    return float(np.mean(found))


def spread(ids, count, length):
    """Where `count` rows of a text begin that do not overlap and lie evenly in all of it."""
    if not 0 < count <= len(ids) // length:
        raise ValueError(f"A held-out text of {len(ids)} tokens has 1 to {len(ids) // length} rows, got {count}.")
    return np.linspace(0, len(ids) - length, count).astype(int)
