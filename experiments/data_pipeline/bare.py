"""The same batches by numpy alone, in one thread: what the pipeline is compared with."""

import numpy as np

from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.pack import PackIndex

Batch = dict[str, np.ndarray]


class Copies:
    """Rows that are known already, piece by piece, by slices: the quickest loop for rows of documents."""

    def __init__(self, store: TokenStore, index: PackIndex) -> None:
        self.tokens, self.offsets, self.index = store.tokens, store.offsets, index

    def __call__(self, rows: np.ndarray) -> Batch:
        length = self.index.length
        counting = np.arange(length, dtype=np.int32)
        names = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
        batch["loss_mask"] = np.zeros((len(rows), length), bool)
        tokens, targets, segments, positions, mask = (batch[name] for name in (*names, "loss_mask"))
        for place, row in enumerate(rows.tolist()):
            pieces = self.index.pieces[self.index.rows[row] : self.index.rows[row + 1]].tolist()
            begin = 0
            for number, (document, start, size) in enumerate(pieces, 1):
                end, origin = begin + size, self.offsets[document] + start
                tokens[place, begin:end] = self.tokens[origin : origin + size]
                targets[place, begin:end] = self.tokens[origin + 1 : origin + size + 1]
                segments[place, begin:end] = number
                positions[place, begin:end] = counting[:size]
                mask[place, begin:end] = True
                begin = end
        return batch


class Windows:
    """Rows that are known already, out of one long stream, by one fancy index: nothing can be quicker."""

    def __init__(self, store: TokenStore, length: int) -> None:
        self.windows = np.lib.stride_tricks.sliding_window_view(store.tokens, length + 1)[::length]

    def __call__(self, rows: np.ndarray) -> Batch:
        both = self.windows[rows].astype(np.int32)
        mask = np.ones((len(rows), both.shape[1] - 1), bool)
        return {"tokens": both[:, :-1], "targets": both[:, 1:], "loss_mask": mask}


class Clusters:
    """A curriculum as a plain loop has it: shuffled clusters, a place in each, one generator; batches in order only."""

    def __init__(self, values: np.ndarray, visible: list[int], batch_size: int) -> None:
        """`visible`: how many of the easiest rows may be drawn at each step; the last one stays."""
        self.order, self.visible, self.batch_size = np.argsort(values, kind="stable"), visible, batch_size
        self.generator = np.random.default_rng(0)
        self.clusters: list[np.ndarray] = []
        self.places: list[int] = []
        self.reached = self.step = 0

    def __call__(self) -> np.ndarray:
        reached = self.visible[min(self.step, len(self.visible) - 1)]
        self.step += 1
        if reached > self.reached:
            self.clusters.append(self.generator.permutation(self.order[self.reached : reached]))
            self.places.append(0)
            self.reached = reached
        sizes = np.array([len(cluster) for cluster in self.clusters])
        drawn = self.generator.choice(len(sizes), self.batch_size, p=sizes / sizes.sum())
        found: list[np.ndarray] = []
        for number, count in enumerate(np.bincount(drawn, minlength=len(sizes)).tolist()):
            while count:
                cluster, place = self.clusters[number], self.places[number]
                some = cluster[place : place + count]
                found.append(some)
                count -= len(some)
                self.places[number] = place + len(some)
                if self.places[number] == len(cluster):
                    self.clusters[number] = self.generator.permutation(cluster)
                    self.places[number] = 0
        return self.generator.permutation(np.concatenate(found))
