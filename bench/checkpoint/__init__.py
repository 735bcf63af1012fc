"""How fast a checkpoint gets from disk into the memory of a process: ``python -m bench.checkpoint``.

Each arm is a process of its own, which imports what it needs, says so, and then waits: the files are made cold, or
resident, only now. It then loads all tensors to the CPU; "loaded" means that every byte is in anonymous memory of the
process, so what is mapped is copied. With ``--device cuda`` they are loaded to the GPU, and loaded means that it has
done all it was asked for. The arms:

- ``penstock``: `penstock.load_checkpoint`; ``penstock-threads``: the same without io_uring;
- ``safetensors``: `safetensors.torch.load_file`, each tensor cloned (it maps the file);
- ``safetensors-pread``: the same library's pread backend;
- ``runai``: runai-model-streamer; ``fastsafetensors``: without GPUDirect, on the CPU;
- ``readinto``: each file into one buffer with `readinto`, the plain way: no tensors come of it;
- ``transformers``: `AutoModelForCausalLM.from_pretrained`, until every page of every parameter was touched;
  ``adapter``: the same model by `penstock.adapters.transformers.from_pretrained`. Their logits are compared too.

The limit is the disk's own: fio reads the same files sequentially, direct, 1 MiB with 32 in flight, in every round;
where there is no fio, 8 threads of 4 MiB do.

Memory is full of old page cache meanwhile, as on a server that has been up for a while (`bench.memory`). Rounds are
interleaved, figures are medians, ratios medians of the ratios within rounds. In the first round, which is not timed,
every tensor's bytes are hashed and compared between the arms. Peak memory is the process's, from before the load; the
page cache is looked at when it has ended.
"""
