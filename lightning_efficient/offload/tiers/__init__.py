"""Where bytes can be: host memory, a disk, a NUMA node; and how they get there."""
