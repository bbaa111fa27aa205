"""The trainer of Tunix, Google's library for training after pretraining, with a clipjax chain as its optimizer.

    pip install '.[flax]' google-tunix
    python examples/tunix_loop.py [--steps 60] [--out out/tunix]

Nothing of the loop is ours: `PeftTrainer` accumulates gradients (`optax.MultiSteps`), compiles the step, writes
checkpoints with Orbax and goes on from the last one when the script is started again with more steps. The model is the
toy transformer of Tunix's own tests, on sequences that count up. After every step half of the weights are zero and the
others are in blocks of 4 bits, those of a restored checkpoint too.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.sft import peft_trainer
from tunix.tests import test_common

import clipjax
from clipjax import formats

VOCABULARY, LENGTH, BATCH, ACCUMULATED = 16, 16, 4, 2


def optimizer():
    """Clip, Adam, and behind it the constraints; they see one update in `ACCUMULATED` batches, as Adam does."""
    return optax.chain(
        clipjax.clip_norm(1.0),
        optax.adam(3e-3),
        clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.5, 3, 30), every=5, stop=30),
        clipjax.fake_quantize(formats.nbits(4, 16), every=1),
    )


def batches(count, seed=0):
    """Sequences that count up from a random start."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = (rng.integers(0, VOCABULARY, (BATCH, 1)) + np.arange(LENGTH)) % VOCABULARY
        yield peft_trainer.TrainingInput(input_tokens=jnp.asarray(tokens), input_mask=jnp.ones(tokens.shape, bool))


def inputs(batch):
    """What Tunix's loss takes, of a batch; the toy transformer looks at the tokens alone."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.arange(batch.input_tokens.shape[1]),
        "attention_mask": batch.input_mask,
    }


def trainer(steps, out, seed=0):
    """A trainer of the toy transformer, with the state of the last checkpoint in OUT."""
    model = test_common.ToyTransformer(test_common.ModelConfig(vocab_size=VOCABULARY), rngs=nnx.Rngs(seed))
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=20,
        max_steps=steps,
        gradient_accumulation_steps=ACCUMULATED,
        checkpoint_root_directory=str(out.absolute()),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=10),
    )
    return peft_trainer.PeftTrainer(model, optimizer(), config).with_gen_model_input_fn(inputs)


def main():
    """Train, and say what the params and the state are like."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/tunix"))
    options = parser.parse_args()
    found = trainer(options.steps, options.out)
    print(f"begins at step {found.train_steps}")
    found.train(batches(options.steps * ACCUMULATED))
    params, state = nnx.state(found.model, nnx.Param), found.optimizer.opt_state
    broken = [str(row) for row in clipjax.check(params, state) if row.kind != "unchecked"]
    print(clipjax.summarize(params, state, widths=()))
    print("every constraint holds" if not broken else "\n".join(broken))


if __name__ == "__main__":
    main()
