"""A cache for `generate` of transformers whose keys and values live on a storage device.

Built on what transformers documents for caches of one's own: `Cache` and `CacheLayerMixin`. Layers that attend to
everything are kept on the device; all others (sliding windows, linear attention, shared layers) are transformers' own,
as they are small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from penstock.adapters import nvme_session
from penstock.adapters.nvme_layer import SharedRows
from penstock.kv.cache import KVCache, KVStatistics, Memory
from penstock.kv.residency import Ranking, spread
from penstock.kv.session import session_path
from penstock.storage.choose import EngineName
from penstock.units import parse_size


class NVMeCache(Cache):
    """Keys and values on a storage device, as many of them in memory as there is room for.

    Takes the place of `DynamicCache`: the tokens are the same. Not for torch.compile, nor for training.

    Args:
        config: of the model.
        path: a directory on the device, a file to be made, or a block device; see `penstock.kv.cache.KVCache`.
        memory: bytes of keys and values that may stay in memory, such as ``2GiB`` or 0, or ``auto``: what there is.
        tokens: that there will be, for one batch, if that is known: then their space is set aside in one piece.
        engine: ``auto``, ``uring`` or ``threads``.
        ranking: which layers are worth memory.
        overwrite: a block device may be overwritten though it carries something; see `Region.create`.
        destroying: what it carries.

    Raises:
        RegionError: the device carries something, or is in use.
        OSError: ENOSPC, or whatever the file system says.
        ValueError: memory is no size.
    """

    def __init__(
        self,
        config: Any = None,
        path: str | os.PathLike[str] = ".",
        *,
        memory: str | int = "auto",
        tokens: int = 0,
        engine: EngineName = "auto",
        ranking: Ranking = spread,
        overwrite: bool = False,
        destroying: str = "",
    ) -> None:
        budget: Memory = "auto" if memory == "auto" else parse_size(memory) if isinstance(memory, str) else memory
        self._config = config
        self._directory = Path(path) if os.path.isdir(path) else Path(path).parent
        self._rows = SharedRows(
            KVCache(path, memory=budget, engine=engine, ranking=ranking, overwrite=overwrite, destroying=destroying),
            tokens,
        )
        theirs = DynamicCache(config=config)
        if config is None:
            super().__init__(layer_class_to_replicate=self._rows.layer)  # type: ignore[arg-type]
        else:
            super().__init__(
                layers=[self._rows.layer() if type(layer) is DynamicLayer else layer for layer in theirs.layers]
            )

    def statistics(self) -> KVStatistics:
        """What is where and why, and what was read and written."""
        return self._rows.cache.statistics()

    def save(self, name: str, tokens: torch.Tensor, *, directory: str | os.PathLike[str] | None = None) -> Path:
        """Keep what it holds in a file that outlives the process; returns the file's path.

        It has its name when all of it is on the device: whatever happens meanwhile, one of the same name stays as it
        was. The cache goes on as before.

        Args:
            name: of the session: letters, digits, dots, dashes and underscores.
            tokens: their ids, [batch, tokens]. What the cache holds comes first; more may follow, such as the last
                one generated, which is not in it yet.
            directory: where the file is to be; where the cache is by default.

        Raises:
            SessionError: a layer keeps what cannot be saved.
            ValueError: the cache is empty, was made without a configuration, or holds more tokens than were given.
            OSError: ENOSPC, or whatever the file system says.
        """
        if self._config is None:
            raise ValueError("a cache made without a configuration cannot be saved: nobody could tell whose it is")
        path = session_path(self._directory if directory is None else Path(directory), name)
        nvme_session.save(path, self._config, self.layers, tokens)
        return path

    @classmethod
    def load(
        cls,
        name: str,
        config: Any,
        path: str | os.PathLike[str] = ".",
        *,
        tokens: torch.Tensor,
        directory: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> Self:
        """A cache that goes on where a saved one ended: only what follows its tokens has to be computed.

        Args:
            name: of the session.
            config: of the model.
            path: for the cache, as in the constructor.
            tokens: ids, [batch, tokens], that begin with those that were saved.
            directory: where the session is; where the cache is by default.
            device: the model's.
            options: as in the constructor.

        Raises:
            SessionError: it is damaged, another model's, or of other tokens.
            FileNotFoundError: there is none of that name.
        """
        made = cls(config, path, **options)
        try:
            file = session_path(made._directory if directory is None else Path(directory), name)
            nvme_session.load(file, config, made.layers, tokens, device)
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Give everything back; what it holds is lost. A second time does nothing."""
        self._rows.close()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys, values and, where there is one, the window of each layer, read from the device; as `DynamicCache`."""
        for layer in self.layers:
            held: Any = layer  # those of linear attention have neither
            yield held.keys, held.values, getattr(held, "_sliding_window_tensor", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """How transformers' guides use a prompt again; a context on a device is saved once and loaded as often."""
        raise TypeError("an NVMeCache cannot be copied: use save(), and load() for each copy")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
