"""A reader that maps each shard and copies every tensor through the staging ring; the host keeps nothing."""

from __future__ import annotations

from bench.page_cache.clients.staging import (
    Ring,
    Tally,
    map_file,
    parse_options,
    safetensors_index,
    weight_files,
)


def main() -> None:
    """Load, count, report."""
    options = parse_options(__doc__ or "")
    tally = Tally(options.verify)
    with tally.phase("ring"):
        ring = Ring(options.ring_bytes)
    with tally.phase("load"):
        for path in weight_files(options.path, reverse=options.reverse) * options.passes:
            file = map_file(path)
            tensors = safetensors_index(file)
            for tensor in reversed(tensors) if options.reverse else tensors:
                ring.copy(tally, tensor.name, file[tensor.start : tensor.stop])
            del file  # unmaps: as a loader that is done with a shard does
    tally.report()


if __name__ == "__main__":
    main()
