"""Train on several hosts, lose one, start again, go on bit for bit: with processes of this machine instead of hosts.

`python examples/multihost.py` starts two processes with two CPU devices each, that train one sharded model together
(`jax.distributed`, gloo for what crosses processes) and save it with Orbax. It does so once undisturbed and once with a
process killed on the way and both started again, and compares what every process has after every step.

On a pod the same worker runs on every host, `python examples/multihost.py --worker --folder gs://...`:
`jax.distributed.initialize()` finds the others by itself.
"""

import argparse
import hashlib
import os
import pathlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading

STEPS, EVERY, LAST = 12, 3, 8  # how many, how often one is saved, the last one before the kill
PROCESSES, DEVICES = 2, 2  # devices of each process


def work(folder: str, coordinator: str | None, process: int | None) -> None:
    """One host: joins the others, goes on from the last saved step, trains to the end."""
    import jax

    if coordinator is None:
        jax.distributed.initialize()
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, PROCESSES, process)
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import clipjax

    tx = optax.chain(
        clipjax.clip_norm(clipjax.thresholds.zscore(0.5, warmup=3)),
        optax.adam(1e-2),
        clipjax.clamp_weights(0.5),
        clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.8, 3, 9), every=2, stop=9),
        clipjax.fake_quantize(4, start=4, every=3, stop=10),
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def init() -> dict:
        keys = jax.random.split(jax.random.key(0), 2)
        params = {f"layer{i}": {"kernel": 0.1 * jax.random.normal(key, (64, 64))} for i, key in enumerate(keys)}
        return {"params": params, "state": tx.init(params)}

    # moments, masks and latent weights have the shape of the params and are split like them; the rest is everywhere
    shapes = jax.eval_shape(init)
    at = jax.tree.map(lambda x: split if x.shape == (64, 64) else whole, shapes)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["layer0"]["kernel"])
        return jnp.mean(jnp.square(hidden @ params["layer1"]["kernel"] - jnp.roll(x, 1, axis=1)))

    @jax.jit(donate_argnums=0, out_shardings=(at, whole))
    def train(saved: dict, step: jax.Array) -> tuple[dict, jax.Array]:
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (32, 64))
        x = jax.lax.with_sharding_constraint(x, split)
        value, grads = jax.value_and_grad(loss)(saved["params"], x)
        updates, state = tx.update(grads, saved["state"], saved["params"])
        return {"params": optax.apply_updates(saved["params"], updates), "state": state}, value

    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(save_interval_steps=EVERY))
    begin = manager.latest_step()
    if begin is None:
        begin, saved = 0, jax.jit(init, out_shardings=at)()
    else:
        template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, at)
        saved = manager.restore(begin, args=ocp.args.StandardRestore(template))
    for step in range(begin + 1, STEPS + 1):
        saved, value = train(saved, jnp.int32(step))
        manager.save(step, args=ocp.args.StandardSave(saved))
        print(f"step {step} loss {float(value):.6f} digest {digest(saved)}", flush=True)
    manager.wait_until_finished()
    manager.close()
    report = {name: round(float(value), 4) for name, value in clipjax.report(saved["state"]).items()}
    print(f"from {begin} {report}", flush=True)


def digest(tree: object) -> str:
    """Of every bit that this process holds."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            found.update(np.asarray(shard.data).tobytes())
    return found.hexdigest()[:16]


def launch(folder: pathlib.Path, kill_after: int | None = None) -> tuple[dict, list[str]]:
    """Start all processes, kill one when it has done a step: (process, step) -> digest, and the last line of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    root = str(pathlib.Path(__file__).parents[1])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", __file__, "--worker", "--folder", str(folder), "--coordinator", address]
    workers = [
        subprocess.Popen(
            [*command, "--process", str(i)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(PROCESSES)
    ]
    lines: queue.Queue = queue.Queue()
    readers = [threading.Thread(target=read, args=(i, worker, lines)) for i, worker in enumerate(workers)]
    for reader in readers:
        reader.start()
    digests, seen, left = {}, [[] for _ in workers], len(workers)
    try:
        while left:
            i, line = lines.get(timeout=300)
            left -= line is None
            words = (line or "").split()
            seen[i].append(line or "")
            if words[:1] == ["step"]:
                digests[i, int(words[1])] = words[-1]
                if kill_after is not None and i == PROCESSES - 1 and int(words[1]) >= kill_after:
                    for worker in reversed(workers):  # the others cannot go on without it
                        worker.kill()
    finally:
        for worker, reader in zip(workers, readers, strict=True):
            worker.kill()
            worker.wait()
            reader.join()
    for i, worker in enumerate(workers):
        if kill_after is None and worker.returncode != 0:
            raise RuntimeError(f"process {i} ended with {worker.returncode}:\n" + "".join(seen[i][-40:]))
    return digests, [next((line.strip() for line in reversed(said) if line.startswith("from ")), "") for said in seen]


def read(i: int, worker: subprocess.Popen, lines: queue.Queue) -> None:
    """Pass on what a process prints, and None at its end."""
    with worker.stdout:
        for line in worker.stdout:
            lines.put((i, line))
    lines.put((i, None))


def compare(folder: pathlib.Path) -> dict:
    """An undisturbed run, and one that loses a process and starts again: what each step of both has left."""
    undisturbed, _ = launch(folder / "undisturbed")
    before, _ = launch(folder / "killed", kill_after=LAST)
    after, last = launch(folder / "killed")
    return {"undisturbed": undisturbed, "before": before, "after": after, "last": last}


def main() -> None:
    """Run a worker, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", action="store_true", help="be one host")
    parser.add_argument("--folder", help="where checkpoints go")
    parser.add_argument("--coordinator", help="address of the first process; on a pod it is found")
    parser.add_argument("--process", type=int)
    options = parser.parse_args()
    if options.worker:
        return work(options.folder, options.coordinator, options.process)
    with tempfile.TemporaryDirectory() as name:
        runs = compare(pathlib.Path(options.folder or name))
    again = min(step for _, step in runs["after"])
    print(f"{PROCESSES} processes of {DEVICES} devices, {STEPS} steps, saved every {EVERY}")
    print(f"killed after step {max(step for _, step in runs['before'])}, went on with step {again}")
    print("\n".join(runs["last"][:1]))
    same = all(runs["undisturbed"][at] == found for at, found in (runs["before"] | runs["after"]).items())
    whole = {at for at in runs["undisturbed"] if at[1] >= again} == set(runs["after"])
    print("bit for bit the same as undisturbed" if same and whole else "NOT the same as undisturbed")


if __name__ == "__main__":
    main()
