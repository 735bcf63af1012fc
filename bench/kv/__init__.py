"""KV caches larger than memory: what a decode step takes at every memory limit.

The workload is FlexLLMGen's, as DUAL-BLADE (arXiv 2604.26557) measures it: for each layer keys and values, a row a
token. Prefill writes the prompt's rows of all tensors; a decode step reads all rows so far of each tensor, in the order
of the layers, copies them to the device, and writes one row each. The device is a ring of 64 MiB that one copy at a
time goes to, as one copy engine would, in pieces of just under 1 MiB whoever copies, all that it is handed in one call;
rows are random bytes that are known, and the last step of each run compares all of them. With ``--device cuda`` the
ring is a GPU's, and takes what it gets. With ``--model`` a real model decodes instead, see `bench.kv.model`.

Each run is a process of its own in a cgroup with a limit on memory, a share of the cache's size. Its disk space has
been written to before, see `bench.space`. Arms take turns:

========== ==========================================================================================
memmap     np.memmap files, as FlexLLMGen has them, with the machine's read-ahead
memmap-128 the same with read_ahead_kb 128, as most servers have it
buffered   penstock's store with every tensor on the page-cache path
direct     penstock's store with every tensor on the direct path
penstock   `penstock.kv.cache.KVCache` with memory "auto"
========== ==========================================================================================

The floor is max((KV − X) / bandwidth of the disk, KV / bandwidth of one copy), both measured in the same run. X is the
limit less what the benchmark itself takes: the interpreter, the device and the known rows.
"""
