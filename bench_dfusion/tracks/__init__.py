"""Tracks for real checkpoints, as entry points: functions that return the path of a TOML file."""

from pathlib import Path

HERE = Path(__file__).parent


def paper() -> Path:
    """D-Fusion's own settings for any supported checkpoint (--model) and your prompts (--prompts)."""
    return HERE / "paper-v2.toml"


def sd21_animals() -> Path:
    """Stable Diffusion 2.1-base, animals at human activities (D-Fusion's first template)."""
    return HERE / "sd21-animals-v2.toml"


def sd21_materials() -> Path:
    """Stable Diffusion 2.1-base, objects made of a material (D-Fusion's second template)."""
    return HERE / "sd21-materials-v2.toml"


def sd21_relations() -> Path:
    """Stable Diffusion 2.1-base, one thing beside, above or below another (D-Fusion's third template)."""
    return HERE / "sd21-relations-v2.toml"


def sd15_animals() -> Path:
    """Stable Diffusion 1.5, animals at human activities (D-Fusion's first template)."""
    return HERE / "sd15-animals-v2.toml"


def sd15_materials() -> Path:
    """Stable Diffusion 1.5, objects made of a material (D-Fusion's second template)."""
    return HERE / "sd15-materials-v2.toml"


def sd15_relations() -> Path:
    """Stable Diffusion 1.5, one thing beside, above or below another (D-Fusion's third template)."""
    return HERE / "sd15-relations-v2.toml"


def geneval() -> Path:
    """Stable Diffusion 2.1-base on GenEval's prompts, from your copy (--prompts)."""
    return HERE / "geneval-v2.toml"


def t2i_compbench() -> Path:
    """Stable Diffusion 2.1-base on T2I-CompBench's prompts, from your copy (--prompts)."""
    return HERE / "t2i-compbench-v2.toml"


def partiprompts() -> Path:
    """Stable Diffusion 2.1-base on PartiPrompts, from your copy or the Hub (--prompts)."""
    return HERE / "partiprompts-v2.toml"


def dsg() -> Path:
    """Stable Diffusion 2.1-base on DSG-1k's prompts, from your copy (--prompts)."""
    return HERE / "dsg-v2.toml"


def dfusion_animals() -> Path:
    """D-Fusion's own settings on Stable Diffusion 2.1-base, with its first template's prompts, from your copy (--prompts)."""
    return HERE / "dfusion-animals-v1.toml"


def dfusion_materials() -> Path:
    """D-Fusion's own settings on Stable Diffusion 2.1-base, with its second template's prompts, from your copy (--prompts)."""
    return HERE / "dfusion-materials-v1.toml"


def dfusion_relations() -> Path:
    """D-Fusion's own settings on Stable Diffusion 2.1-base, with its third template's prompts, from your copy (--prompts)."""
    return HERE / "dfusion-relations-v1.toml"
