"""A reader of one GGUF file through one mapping, as llama.cpp: tensors in file order, through the ring."""

from __future__ import annotations

from gguf import GGUFReader

from bench.page_cache.clients.staging import Ring, Tally, parse_options


def main() -> None:
    """Load, count, report."""
    options = parse_options(__doc__ or "")
    tally = Tally(options.verify)
    with tally.phase("ring"):
        ring = Ring(options.ring_bytes)
    with tally.phase("load"):
        reader = GGUFReader(options.path)
        tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset, reverse=options.reverse)
        for tensor in tensors:
            data = reader.data[tensor.data_offset : tensor.data_offset + int(tensor.n_bytes)]
            ring.copy(tally, tensor.name, data)
    tally.report()


if __name__ == "__main__":
    main()
