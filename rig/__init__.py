"""A virtual machine for what most machines do not have: two NUMA nodes, NVMe drives, older kernels, power cuts.

``python -m rig`` (or ``make rig``) boots distribution kernels under QEMU's software emulation, with this machine's own
files as their root, and runs the tests marked ``rig`` inside, and the page cache's tests on the older kernel. Nothing
of this machine is changed but for the packages that are missing, which are installed; kernels are unpacked in the
user's cache.

Each job is a boot. Python, the packages that tests need and this checkout are in an image of their own, as an
interpreter that starts from a shared directory takes eight seconds to import numpy. What a job prints and its results
come back through a directory that both sides see.

Hardware virtualisation is not used, even where it is offered: inside another virtual machine it can hang or fail.
"""
