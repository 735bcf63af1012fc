"""One layer of `NVMeCache`, and what the layers of a cache share.

A row of the store is what one token adds to one layer: [batch, heads, head_dim]. Attention wants [batch, heads, tokens,
head_dim], so rows are transposed while they are copied. Beams are not rewritten when they are reordered: each token
remembers which sequence of the stored row is meant by which of the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from transformers.cache_utils import CacheLayerMixin

from penstock.device.base import Device
from penstock.device.choose import open_device
from penstock.kv.cache import KVCache
from penstock.kv.fetch import Fetch
from penstock.kv.residency import KVTensor

_TRANSFORMERS = Version(transformers.__version__).release  # what `crop` is asked for has changed twice
_SPARE_TOKENS = 64  # by which buffers are larger than needed, so that not every token wants a new one


class SharedRows:
    """What the layers of one cache share: the store, and the order in which they are asked."""

    def __init__(self, cache: KVCache, reserve_tokens: int) -> None:
        self.cache = cache
        self.reserve_tokens = reserve_tokens
        self.layers: list[NVMeLayer] = []
        self.free_slots: list[_Slot] = []
        self.new = 1  # tokens that a layer gets at once, as the last one did
        self._devices: dict[str, Device | None] = {}
        self.reordered = False  # since the last step: what is fetched beforehand would be fetched in vain

    def device(self, name: str) -> Device | None:
        """The device of that name, with the buffers known to it; None for host memory."""
        if name not in self._devices:
            device = self._devices[name] = open_device(name)
            if device is not None:
                self.cache.pin(device)
        return self._devices[name]

    def layer(self) -> NVMeLayer:
        made = NVMeLayer(self, len(self.layers))
        self.layers.append(made)
        return made

    def wanted(self, number: int) -> None:
        """A layer's rows are waited for: have the device go on with the next one's, be it the next step's."""
        following = (number + 1) % len(self.layers)
        if following or not self.reordered:
            self.layers[following].begin()

    def ended(self, number: int) -> None:
        """A layer has been updated: fetch the next one's rows while it computes."""
        following = (number + 1) % len(self.layers)
        if not following:
            self.cache.step()
            if self.reordered:
                self.reordered = False
                return
        self.layers[following].begin()

    def slot(self, layer: NVMeLayer, tokens: int) -> _Slot:
        """Memory for a layer's keys and values that nobody uses."""
        for slot in self.free_slots:
            if slot.fits(layer, tokens) and not slot.is_used:
                self.free_slots.remove(slot)
                return slot
        self.free_slots = [slot for slot in self.free_slots if slot.is_used or slot.shares_shape(layer)][-2:]
        return _Slot(layer, tokens + _SPARE_TOKENS)

    def close(self) -> None:
        for layer in self.layers:
            layer.forget()
        self.free_slots.clear()
        self.cache.close()
        for device in self._devices.values():
            if device is not None:
                device.close()
        self._devices.clear()


def _writable(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
    """Memory that may be written to in any thread: a tensor made in inference mode may only be in that mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, **options)


class _Slot:
    """Keys and values of one layer where they are computed with: [batch, heads, capacity, head_dim] each."""

    def __init__(self, layer: NVMeLayer, capacity: int) -> None:
        self._views: list[weakref.ref[torch.Tensor]] = []
        self.capacity = capacity
        self.shapes = layer.shapes()
        self.dtype, self.device = layer.dtype, layer.device
        self.tensors = [
            _writable((*shape[:2], capacity, shape[2]), dtype=self.dtype, device=self.device) for shape in self.shapes
        ]

    def shares_shape(self, layer: NVMeLayer) -> bool:
        return (self.shapes, self.dtype, self.device) == (layer.shapes(), layer.dtype, layer.device)

    def fits(self, layer: NVMeLayer, tokens: int) -> bool:
        return self.capacity >= tokens and self.shares_shape(layer)

    @property
    def is_used(self) -> bool:
        """Somebody still has what was handed out."""
        return any(view() is not None for view in self._views)

    def hand_out(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (tensor[:, :, :tokens] for tensor in self.tensors)
        self._views = [weakref.ref(keys), weakref.ref(values)]
        return keys, values


class _CpuTarget:
    """Rows of the store, [batch, heads, head_dim] each, into host memory [batch, heads, tokens, head_dim]."""

    def __init__(self, tensor: torch.Tensor, stored_batch: int, lineage: NDArray[np.int32] | None) -> None:
        # Bytes without a copy, and then one element a head: copied whole, not byte by byte.
        bytes_of = tensor.view(torch.uint8).numpy()
        self._head = np.dtype((np.void, bytes_of.shape[-1]))
        self._heads = bytes_of.view(self._head)[..., 0]
        self._lineage = lineage
        self._row_shape = (stored_batch, tensor.shape[1])

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        parts = rows.view(self._head).reshape(len(rows), *self._row_shape)
        if self._lineage is not None:
            lineage = self._lineage[first : first + len(rows)]
            parts = parts[np.arange(len(rows))[:, None], lineage]
        # numpy and not torch, which would start threads of its own in each thread that copies.
        np.copyto(self._heads[:, :, first : first + len(rows)], parts.transpose(1, 2, 0))


class _DeviceTarget:
    """The same into the memory of a device: copied there as they are, and transposed there, beside what it computes."""

    def __init__(
        self, tensor: torch.Tensor, stored_batch: int, lineage: NDArray[np.int32] | None, device: Device
    ) -> None:
        self._tensor = tensor
        self._row_shape = (stored_batch, tensor.shape[1], tensor.shape[3])
        self._lineage = lineage
        self._device = device
        device.follow([tensor])  # somebody may still compute with what is in that memory

    def write(self, first: int, rows: NDArray[np.uint8]) -> None:
        with self._device.beside():
            landed = self._device.allocate(rows.nbytes)
            transfer = self._device.copy(landed, 0, rows.reshape(-1).data)
            parts = landed.view(self._tensor.dtype).view(len(rows), *self._row_shape)
            if self._lineage is not None:
                lineage = torch.from_numpy(self._lineage[first : first + len(rows)].astype(np.int64))
                parts = parts[torch.arange(len(rows))[:, None], lineage]
            self._tensor[:, :, first : first + len(rows)].copy_(parts.permute(1, 2, 0, 3))
        transfer.wait()  # the rows' memory is somebody else's then


class NVMeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values in the store. Made by `NVMeCache`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, rows: SharedRows, number: int) -> None:
        self._shared = rows
        self.number = number
        self._names = (KVTensor(number, "keys"), KVTensor(number, "values"))
        self._tokens = 0
        self._stored_batch = 0
        self._lineage: NDArray[np.int32] | None = None  # [tokens, batch]: which of the stored sequences; None: the same
        self._slot: _Slot | None = None
        self._fetches: list[Fetch] = []
        super().__init__()  # type: ignore[no-untyped-call]

    # What the cache of a layer has in transformers.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over shapes, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads, _, self.key_dim = key_states.shape
        self.value_dim = value_states.shape[-1]
        self.value_heads = value_states.shape[1]
        self._stored_batch = self.batch
        for name, (batch, heads, dim) in zip(self._names, self.shapes(), strict=True):
            row_bytes = batch * heads * dim * self.dtype.itemsize
            self._shared.cache.add(name, row_bytes, reserve_tokens=self._shared.reserve_tokens)
        self.is_initialized = True

    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of a token's keys and of its values: [batch, heads, head_dim]."""
        return (self.batch, self.heads, self.key_dim), (self.batch, self.value_heads, self.value_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens, [batch, heads, tokens, head_dim]; returns those of all tokens."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self._tokens, key_states.shape[-2]
        if key_states.dtype != self.dtype or value_states.dtype != self.dtype:
            raise ValueError(f"layer {self.number}: states are {key_states.dtype}, the cache holds {self.dtype}")
        if len(key_states) != self.batch:
            raise ValueError(f"layer {self.number}: states of {len(key_states)} sequences, the cache has {self.batch}")
        if not before:
            self._append(key_states, value_states)
            self._shared.ended(self.number)
            return key_states, value_states
        self._shared.new = new
        slot = self._fetched(before + new)
        for tensor, states in zip(slot.tensors, (key_states, value_states), strict=True):
            tensor[:, :, before : before + new] = states
        self._append(key_states, value_states)
        keys, values = slot.hand_out(before + new)
        self._shared.free_slots.append(slot)
        self._shared.ended(self.number)
        return keys, values

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of what `update` is going to return, for so many tokens or, before 5.4, their positions."""
        new = len(query_length) if isinstance(query_length, torch.Tensor) and query_length.ndim else int(query_length)
        return self._tokens + new, 0

    def get_seq_length(self) -> int:
        """Tokens there are."""
        return self._tokens

    def get_max_length(self) -> int:
        """None, which is −1."""
        return -1

    get_max_cache_shape = get_max_length  # as it was called before 5.13

    def reset(self) -> None:
        """Forget all tokens."""
        self.forget()
        if self.is_initialized:
            for name in self._names:
                self._shared.cache.remove(name)
        self._tokens = 0
        self._lineage = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Forget the last tokens; the number is negative.

        Up to 5.19 transformers also gives the number of tokens to keep, as a positive one; up to 5.13, zero is such.

        Raises:
            ValueError: it is positive, and transformers later than that.
        """
        asked = int(tokens_to_remove)
        if asked > 0 and _TRANSFORMERS >= (5, 20):
            raise ValueError(f"crop({asked}): give the number of tokens to remove as a negative number")
        keeps = asked > 0 or (asked == 0 and _TRANSFORMERS < (5, 14))
        kept = asked if keeps else max(0, self._tokens + asked)
        if not self.is_initialized or kept >= self._tokens:
            return
        self.forget()
        self._tokens = kept
        for name in self._names:
            self._shared.cache.truncate(name, self._tokens)
        if self._lineage is not None:
            self._lineage = self._lineage[: self._tokens]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Have sequence i continue sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep these sequences, in this order: whatever may index a tensor's first dimension, as in `DynamicLayer`."""
        if not self._tokens:
            return
        self.forget()
        self._shared.reordered = True
        if self._lineage is None:
            self._lineage = self._same()
        index = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        chosen = torch.arange(self.batch)[index, ...].numpy()
        self._lineage = self._lineage[:, chosen]
        self.batch = len(chosen)
        if self.batch > self._stored_batch:
            self._store_again()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence so many times, side by side."""
        self.batch_select_indices(torch.arange(self.batch if self.is_initialized else 0).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing is kept on the device."""

    def prefetch(self) -> None:
        """Begin to fetch what `update` is going to return."""
        self.begin()

    @property
    def keys(self) -> torch.Tensor | None:
        """All of them, read from the store; None before there are any."""
        return self._read(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> torch.Tensor | None:
        """All of them, read from the store; None before there are any."""
        return self._read(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._refuse(value)

    # What the cache's own do.

    def begin(self) -> None:
        """Begin to fetch what there is, unless that has begun."""
        if not self._tokens or self._fetches:
            return
        self._slot = self._shared.slot(self, self._tokens + self._shared.new)
        self._fetches = [
            self._shared.cache.fetch(name, self._target(tensor))
            for name, tensor in zip(self._names, self._slot.tensors, strict=True)
        ]

    def forget(self) -> None:
        """Stop what `begin` has begun."""
        fetches, self._fetches = self._fetches, []
        for fetch in fetches:
            fetch.cancel()
        if self._slot is not None:
            self._publish(self._slot.tensors)  # what was written until then comes before whatever is next
            self._shared.free_slots.append(self._slot)
            self._slot = None

    def _target(self, tensor: torch.Tensor) -> _CpuTarget | _DeviceTarget:
        device = self._shared.device(str(tensor.device))
        if device is None:
            return _CpuTarget(tensor, self._stored_batch, self._lineage)
        return _DeviceTarget(tensor, self._stored_batch, self._lineage, device)

    def _fetched(self, capacity: int) -> _Slot:
        """All rows so far, in memory for so many."""
        self.begin()
        self._shared.wanted(self.number)
        fetches, self._fetches = self._fetches, []
        slot, self._slot = self._slot, None
        assert slot is not None
        self._wait(fetches, slot.tensors)
        if slot.capacity >= capacity:
            return slot
        larger = self._shared.slot(self, capacity)
        for into, tensor in zip(larger.tensors, slot.tensors, strict=True):
            into[:, :, : self._tokens] = tensor[:, :, : self._tokens]
        self._shared.free_slots.append(slot)
        return larger

    def _wait(self, fetches: Sequence[Fetch], tensors: Sequence[torch.Tensor]) -> None:
        """Until the rows are in the tensors, for whatever the caller computes with them."""
        for fetch in fetches:
            fetch.wait()
        self._publish(tensors)

    def _publish(self, tensors: Sequence[torch.Tensor]) -> None:
        device = self._shared.device(str(self.device))
        if device is not None:
            device.publish(tensors)

    def _append(self, *states: torch.Tensor) -> None:
        new = states[0].shape[-2]
        try:
            for name, each in zip(self._names, states, strict=True):
                rows = each.detach().permute(2, 0, 1, 3)
                if self.batch < self._stored_batch:
                    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, self._stored_batch - self.batch))
                packed = rows.contiguous().cpu().view(torch.uint8).numpy()
                self._shared.cache.append(name, packed.reshape(new, -1))
        except BaseException:  # the device is full, say: keys without values would be rows too many
            for name in self._names:
                if self._shared.cache.tokens(name) > self._tokens:
                    self._shared.cache.truncate(name, self._tokens)
            raise
        if self._lineage is not None:
            more = np.tile(np.arange(self.batch, dtype=np.int32), (new, 1))
            self._lineage = np.concatenate((self._lineage, more))
        self._tokens += new

    def _store_again(self) -> None:
        """Put all rows down anew, as the stored ones have no room for so many sequences."""
        keys, values = self._read(0), self._read(1)
        assert keys is not None
        assert values is not None
        for name in self._names:
            self._shared.cache.remove(name)
        self._tokens, self._lineage = 0, None
        self.lazy_initialization(keys, values)
        self._append(keys, values)

    def _same(self) -> NDArray[np.int32]:
        return np.tile(np.arange(self.batch, dtype=np.int32), (self._tokens, 1))

    def _read(self, which: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        batch, heads, dim = self.shapes()[which]
        found = _writable((batch, heads, self._tokens, dim), dtype=self.dtype, device=self.device)
        self._wait([self._shared.cache.fetch(self._names[which], self._target(found))], [found])
        return found

    def _refuse(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise AttributeError(f"layer {self.number}: keys and values are set by update, or cut off by crop")
