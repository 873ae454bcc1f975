"""Training backends, one file each; importable as `bench_dfusion.algorithms.*`."""
