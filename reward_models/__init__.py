"""Rewards, one file each; importable as `bench_dfusion.reward_models.*`."""
