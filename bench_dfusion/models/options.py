"""What a track says of its base model, and of the memory that it may take."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    id: str = Field(description="'micro' (embedded), a local pipeline directory, or a Hub id")
    revision: str | None = Field(None, description="Hub revision (commit or tag); None: the default branch")
    sha256: str | None = Field(
        None, description="hash of the pipeline directory's weights and configs; None: not fixed"
    )
    dtype: str = Field("float32", description="dtype of the frozen weights: float32, bfloat16 or float16")
    autocast: str | None = Field(None, description="dtype of the network's arithmetic; None: its own")
    resolution: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,  # tracks from before it keep their hash
        description="side of the pictures (pixels); None: the model's own",
    )
    vae_tile: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="side of the tiles in which larger pictures are decoded and encoded (pixels), to save memory; they are "
        "blended, so pictures differ; None: no tiles",
    )


class MemorySection(Section):
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them: slower"
    )
    vae_slicing: bool = Field(False, description="decode and encode pictures one at a time")
    offload_text: bool = Field(
        False, description="text encoders stay on the CPU and go to the device only while they encode new prompts"
    )
    drop_text: bool = Field(
        False, description="every prompt is encoded before the first round, then the text encoders leave memory"
    )
    offload_vae: bool = Field(
        False, description="the autoencoder stays on the CPU and goes to the device only while it decodes or encodes"
    )
    offload_network: bool = Field(
        False,
        description="the network's frozen weights stay in the CPU's memory, each block on the device while it works",
    )
    shard: bool = Field(
        False,
        description="the network's frozen weights are sharded over a run's processes (FSDP), each block gathered while it "
        "works; nothing where there is one process",
    )
    offload_rewards: bool = Field(
        False, description="reward and judges stay on the CPU and go to the device only while they score"
    )
