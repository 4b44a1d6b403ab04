"""One process of the collective's benchmark: our one-bit mean and JAX's own float32 all-reduce, over gloo."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from network import own_counters
from side_by_side import serve_and_leave

from dsjax.collectives.hlo import count_collectives, table
from dsjax.collectives.one_bit import Feedback, Scheme, exchanged, gathered, one_bit_mean
from dsjax.mesh.processes import start_processes

SPLIT = PartitionSpec("data")


class Bench:
    """x [W, 1, N], a row for each process; each call replaces every row by the mean (or sum) of all, in place."""

    def __init__(self, values: int, seed: int) -> None:
        start_processes()
        self.values, self.seed = values, seed
        self.num_workers = jax.process_count()
        self.mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        self.sharding = NamedSharding(self.mesh, SPLIT)
        self.schemes = {"one_bit": Scheme(), "peer": Scheme(server_scale="chunk", deepspeed_padding=True)}
        self.compiled = {name: self._compile(name, values) for name in ("one_bit", "float32", *MESSAGES)}

    def _compile(self, name: str, values: int) -> Any:
        shape = jax.ShapeDtypeStruct((self.num_workers, 1, values), jnp.float32, sharding=self.sharding)
        if name in MESSAGES:
            message = Scheme().padded(values, self.num_workers) // self.num_workers // 8 + 4
            bits = jax.ShapeDtypeStruct((self.num_workers**2, message), jnp.uint8, sharding=self.sharding)
            messages = partial(MESSAGES[name], num_workers=self.num_workers)
            there_and_back = jax.shard_map(messages, mesh=self.mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
            return jax.jit(there_and_back, donate_argnums=0).lower(bits).compile()
        if name == "float32":
            add = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=self.mesh, in_specs=SPLIT, out_specs=SPLIT)
            return jax.jit(add, donate_argnums=0).lower(shape).compile()
        feedback = jax.eval_shape(partial(self._zeros, name, values))
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding)
        mean = partial(mean_of_rows, scheme=self.schemes[name], num_workers=self.num_workers)
        # As `dsjax train` maps its updates.
        mapped = jax.shard_map(mean, mesh=self.mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
        return jax.jit(mapped, donate_argnums=(0, 1)).lower(shape, jax.tree.map(place, feedback)).compile()

    def _zeros(self, name: str, values: int) -> Feedback:
        one = Feedback.zeros([(1, values)], self.num_workers, self.schemes[name])
        return jax.tree.map(lambda x: jnp.zeros((self.num_workers, *x.shape), x.dtype), one)

    def row(self, number: int, values: int) -> jax.Array:
        """This process's row of the inputs with a number: the same as the peer's, by the same generator."""
        rng = np.random.default_rng((self.seed, number, jax.process_index()))
        own = rng.standard_normal((1, 1, values), np.float32)
        return jax.make_array_from_process_local_data(self.sharding, own)

    def state(self, name: str, values: int) -> tuple[Any, ...]:
        """The arguments of the first call."""
        if name in MESSAGES:
            shape = self.compiled[name].in_avals[0][0].shape
            return (jax.device_put(np.zeros(shape, np.uint8), self.sharding),)
        if name == "float32":
            return (self.row(0, values),)
        feedback = jax.jit(partial(self._zeros, name, values), out_shardings=self.sharding)()
        return self.row(0, values), feedback

    def calls(self, name: str, calls: int) -> dict[str, Any]:
        """Seconds of each call, and what the interface sent and received in all of them."""
        call, state = self.compiled[name], self.state(name, self.values)
        again = lambda state: (lambda new: new if isinstance(new, tuple) else (new,))(call(*state))
        state = jax.block_until_ready(again(state))  # also lets the processes wait for each other
        before, seconds = own_counters(), []
        for _ in range(calls):
            began = time.perf_counter()
            state = jax.block_until_ready(again(state))
            seconds.append(time.perf_counter() - began)
        moved = own_counters() - before
        return {"calls": seconds, "sent": moved.sent, "received": moved.received}

    def results(self, values: int, rounds: int, path: str) -> dict[str, Any]:
        """Means of the inputs 0, 1, ... by the peer's scheme, one after the other, for comparing with the peer's."""
        call, feedback, means = self._compile("peer", values), self.state("peer", values)[1], []
        for number in range(rounds):
            mean, feedback = call(self.row(number, values), feedback)
            means.append(np.asarray(mean.addressable_data(0)).reshape(-1))
        np.save(f"{path}-{jax.process_index()}.npy", np.stack(means))
        return {}

    def about(self) -> dict[str, Any]:
        """Versions, and what one call sends by the compiled program: rows (kind, axes, dtype, count, bytes, total)."""
        sizes = {"data": self.num_workers}
        rows = {name: table(count_collectives(call.as_text(), sizes)) for name, call in self.compiled.items()}
        return {"versions": {"jax": jax.__version__, "numpy": np.__version__}, "collectives": rows}


def mean_of_rows(x: jax.Array, feedback: Feedback, *, scheme: Scheme, num_workers: int) -> tuple[jax.Array, Feedback]:
    """The one-bit mean of this device's part [1, 1, N] of x with the others'."""
    own = jax.tree.map(lambda leaf: leaf[0], feedback)
    means, own = one_bit_mean([x[0]], own, axis="data", num_workers=num_workers, scheme=scheme)
    return means[0][None], jax.tree.map(lambda leaf: leaf[None], own)


def two_messages(bits: jax.Array, *, num_workers: int) -> jax.Array:
    """Bytes of one_bit_mean, [W, bytes] to and from every process, without anything computed."""
    return gathered(exchanged(bits, "data")[:1], "data", num_workers)


def two_exchanges(bits: jax.Array, *, num_workers: int) -> jax.Array:
    """The same by the collectives that one would take, and that one_bit_mean takes of more than two processes."""
    arrived = jax.lax.all_to_all(bits, "data", 0, 0, tiled=True)
    return jax.lax.all_gather(arrived[:1], "data", tiled=True)


MESSAGES = {"messages": two_messages, "exchanges": two_exchanges}


def idle(seconds: float) -> dict[str, Any]:
    """Bytes of the idle interface: the coordinator's heartbeats."""
    before = own_counters()
    time.sleep(seconds)
    moved = own_counters() - before
    return {"sent": moved.sent, "received": moved.received}


def load(values: int, seed: int) -> Mapping[str, Callable[..., dict[str, Any]]]:
    bench = Bench(values, seed)
    return {"about": bench.about, "calls": bench.calls, "results": bench.results, "idle": idle}


if __name__ == "__main__":
    serve_and_leave(load)
