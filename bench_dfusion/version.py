"""The package's version, and how to cite it."""

__version__ = "0.1.0"

BIBTEX = f"""@software{{bench_dfusion,
  title   = {{bench-dfusion: comparable preference optimisation for text-to-image diffusion models}},
  author  = {{{{The bench-dfusion developers}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}
@inproceedings{{hu2025dfusion,
  title     = {{D-Fusion: Direct Preference Optimization for Aligning Diffusion Models with Visually Consistent Samples}},
  author    = {{Hu and Zhang and Kuang}},
  booktitle = {{International Conference on Machine Learning}},
  year      = {{2025}}
}}"""
